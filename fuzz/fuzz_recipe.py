"""Fuzzes the reader of recipes: YAML as it comes, damaged recipes, and overrides."""

import json

import atheris

with atheris.instrument_imports(include=["yaml"]):  # first of all: whoever imports it later gets this one
    import yaml  # noqa: F401

from common import damaged, fuzz, odd_value, scratch

import higgstune.model.adapters  # noqa: F401, brings torch, which is not to be watched

with atheris.instrument_imports(include=["higgstune.config.recipe", "yaml"]):
    from hostile_input import RECIPE, check_recipe, recipe_seeds

    import higgstune.config.recipe as recipe

NAMES = [
    name
    for part in (recipe.Recipe, recipe.ModelSettings, recipe.DataSettings, recipe.Lora, recipe.Stage)
    for name in part.model_fields
]
NAMES += ["auto", "4bit", "full", "text", "lora", "turn", "none", "..", "CON", "a/b", "1e-4", "2001-13-45", "<<"]
WORDS = [
    *NAMES,
    "!!python/object/apply:os.system",
    "!!int",
    "&a ",
    "*a",
    "<<: ",
    "? ",
    "- ",
    ": ",
    "0x",
    "0b_",
    "1:1",
    ".inf",
]
FOLDER = scratch()


def target(content: bytes) -> None:
    """The first byte says whether the rest is YAML, a damaged recipe, or overrides of a whole one."""
    kind = content[0] if content else 0
    if kind < 128:
        check_recipe(FOLDER, content[1:], [])
        return
    data = atheris.FuzzedDataProvider(content[1:])
    if kind % 2:
        check_recipe(FOLDER, json.dumps(damaged(data, RECIPE, NAMES)).encode(), [])  # JSON is YAML, and soon written
        return
    paths = [".".join(data.PickValueInList([*NAMES, "0", "1", "9"]) for _ in range(1 + n % 3)) for n in range(3)]
    values = [json.dumps(odd_value(data, NAMES)) for _ in paths]
    raw = data.ConsumeUnicode(30)
    check_recipe(
        FOLDER, json.dumps(RECIPE).encode(), [*map("=".join, zip(paths, values, strict=True)), raw][: kind % 5]
    )


if __name__ == "__main__":
    odd = [bytes([200 + n]) + bytes(range(256)) for n in range(4)]
    fuzz(target, [*(b"\0" + seed for seed in recipe_seeds()), *odd], WORDS, FOLDER)
