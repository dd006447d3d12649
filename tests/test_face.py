"""What `import higgstune` gives: names that are listed, documented and typed, and that stay what they are."""

import dataclasses
import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import higgstune
from higgstune.config.recipe import load_recipe
from higgstune.errors import ConfigError

ROOT = Path(__file__).parent.parent
SOURCE = Path(higgstune.__file__).parent
CALLER = ROOT / "tests" / "helpers" / "face_caller.py"
PUBLIC = [name for name in higgstune.__all__ if name != "__version__"]
RECIPE = "data: {store: x}\nstages: [{name: a, kind: text, epochs: 1}, {name: b, kind: full, epochs: 1}]\n"


def modules() -> list[str]:
    found = [module.name for module in pkgutil.walk_packages(higgstune.__path__, "higgstune.")]
    return [name for name in found if name != "higgstune.__main__"]


def home_of(name: str) -> ModuleType:
    return importlib.import_module(higgstune._HOME[name])


def test_the_public_names_are_listed() -> None:
    assert dir(higgstune) == sorted(higgstune.__all__)
    assert set(PUBLIC) == set(higgstune._HOME)
    with pytest.raises(AttributeError, match="no attribute 'sing'"):
        higgstune.sing  # type: ignore[attr-defined]  # noqa: B018
    imports = re.findall(r"^    from (\S+) import (\w+) as \2$", (SOURCE / "__init__.py").read_text(), re.MULTILINE)
    assert {name: home for home, name in imports} == higgstune._HOME


def test_they_stay_what_they_are_whatever_was_imported() -> None:
    """Importing a package binds its name in `higgstune`: none may have the name of a function."""
    names = modules()
    assert len(names) > 100
    for name in names:
        importlib.import_module(name)
    for name in PUBLIC:
        assert getattr(higgstune, name) is vars(home_of(name))[name]
        assert not isinstance(getattr(higgstune, name), ModuleType), name


# Each module that is home to public names is the first of ours that is imported; torch and others stay loaded.
EACH_FIRST = """
import importlib, sys
import higgstune
assert "torch" not in sys.modules
for home in sorted(set(higgstune._HOME.values())):
    for ours in [loaded for loaded in sys.modules if loaded.split(".")[0] == "higgstune"]:
        del sys.modules[ours]
    importlib.import_module(home)
"""


@pytest.mark.processes
def test_a_name_is_imported_when_it_is_used() -> None:
    assert subprocess.run([sys.executable, "-c", EACH_FIRST], check=False).returncode == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_each_is_documented(name: str) -> None:
    found = getattr(higgstune, name)
    parts = {name: found}
    if inspect.isclass(found):
        methods = {key: value for key, value in vars(found).items() if not key.startswith("_")}
        parts |= {key: value for key, value in methods.items() if isinstance(value, FunctionType | property)}
    for part, value in parts.items():
        text = value.__doc__ or ""
        overrides = inspect.isclass(found) and any(hasattr(base, part) for base in found.__mro__[1:])
        assert (text and not text.startswith(f"{name}(")) or overrides, f"{name}.{part} has no docstring"


def results(kind: object) -> Iterator[tuple[str, object]]:
    """The fields of a result's class, and of those within it."""
    if not (inspect.isclass(kind) and dataclasses.is_dataclass(kind)):
        return
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        yield f"{kind.__name__}.{field.name}", hints[field.name]
        for part in (hints[field.name], *typing.get_args(hints[field.name])):
            yield from results(part)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.islower()])
def test_results_are_typed(name: str) -> None:
    kind = typing.get_type_hints(getattr(higgstune, name))["return"]
    assert not [f"{field}: {hint}" for field, hint in results(kind) if re.search(r"(dict|Mapping)\[.*Any", str(hint))]


def test_the_caller_uses_every_name() -> None:
    assert set(re.findall(r"\bhg\.(\w+)", CALLER.read_text())) == set(higgstune.__all__)
    assert (SOURCE / "py.typed").is_file()


@pytest.mark.processes
def test_a_caller_passes_the_strict_type_checker(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}"]
    options = ["--follow-imports=silent", "--ignore-missing-imports"]  # the package alone is checked by `make lint`
    environment = {**os.environ, "MYPYPATH": str(SOURCE.parent)}
    done = subprocess.run([*command, *options, CALLER], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "module",
    sorted(
        ".".join(("higgstune", *path.relative_to(SOURCE).with_suffix("").parts))
        for path in SOURCE.rglob("*.py")
        if ">>> " in path.read_text(encoding="utf-8")
    ),
)
def test_examples_in_docstrings_hold(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted
    assert not found.failed


def test_a_recipe_is_loaded_and_changed(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    recipe = higgstune.Recipe.load(path)
    changes = {"stages.0.epochs": None, "stages.0.max_steps": 50, "lora.r": 8, "model.checkpoint": "models/base"}
    overrides = [f"{key}={'null' if value is None else value}" for key, value in changes.items()]
    assert recipe.with_(changes) == load_recipe(path, overrides)
    assert recipe == higgstune.Recipe.load(path)
    for change, message in (
        ({"stages.0.max_step": 50}, "the nearest one is max_steps"),
        ({"stages.2.max_steps": 50}, "'2' is not an index of a list of 2 entries"),
        ({"seed.x": 1}, "'x' stands inside a plain value"),
        ({"stages.0.max_steps": 50}, "are both given"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipe.with_(change)
