"""Where tests and scripts lie and what they import: folders mirror the package, no test imports another test."""

import ast
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = ROOT / "src" / "higgstune"
FILES = sorted(TESTS.rglob("*.py"))


def folders_with_code(parent: Path) -> set[str]:
    """Folders below `parent` that hold Python files, as relative paths."""
    return {path.parent.relative_to(parent).as_posix() for path in parent.rglob("*.py")}


def imported_by(path: Path) -> set[str]:
    """The first name of every module that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or "").partition(".")[0])
    return found


def test_folders_of_tests_mirror_those_of_the_package() -> None:
    assert folders_with_code(TESTS) - {".", "helpers"} <= folders_with_code(PACKAGE)
    packages = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert packages <= {path.parent.name for path in TESTS.glob("*/**/*.py")} | {"families"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_files_are_tests_helpers_or_fixtures_and_import_no_test(path: Path) -> None:
    helper = path.parent == TESTS / "helpers"
    assert path.name.startswith("test_") != (helper or path.name == "conftest.py")
    others = {other.stem for other in FILES if other.parent != TESTS / "helpers"}
    assert not imported_by(path) & (others | {"tests", "conftest"})
    assert not [name for name in imported_by(path) if name.startswith(".")]
    assert not helper or not re.search(r"^def test_", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_names_of_test_files_differ() -> None:
    """Without `__init__.py` pytest imports each file by its name alone."""
    names = [path.name for path in FILES if path.name != "conftest.py"]
    assert len(names) == len(set(names))


NAMING = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "dev", "docs", "fuzz", "bench", "tools", "src")


@pytest.mark.parametrize("name", NAMING)
def test_tests_that_docs_and_docstrings_name_exist(name: str) -> None:
    paths = [ROOT / name] if (ROOT / name).is_file() else sorted((ROOT / name).rglob("*"))
    for path in paths:
        if path.suffix in (".md", ".py") and path.name != "LOG.md":  # which is history
            for named in re.findall(r"\btests/[\w/]+\.py\b", path.read_text(encoding="utf-8")):
                assert (ROOT / named).is_file(), f"{path.relative_to(ROOT)}: {named}"


SCRIPTS = [
    ROOT / "unified_lora_training.py",
    *(p for d in ("bench", "fuzz", "tools") for p in (ROOT / d).rglob("*.py")),
]


@pytest.mark.parametrize("path", sorted(SCRIPTS), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_scripts_import_names_that_the_package_has(path: Path) -> None:
    """Scripts are not imported by tests: some need what is not installed."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "higgstune":
            for name in node.names:
                module = import_module(str(node.module))
                known = hasattr(module, name.name) or find_spec(f"{node.module}.{name.name}")
                assert known, f"line {node.lineno}: {node.module} has no {name.name}"
