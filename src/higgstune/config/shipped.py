"""The recipes that ship with the package, which are found by name."""

import logging
from pathlib import Path

_LOG = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent.parent / "recipes"
_ENDINGS = (".yaml", ".yml")


def shipped_recipes() -> dict[str, Path]:
    """The files of the shipped recipes, by name; those of a further model family begin with its name."""
    return {path.relative_to(_FOLDER).with_suffix("").as_posix(): path for path in sorted(_FOLDER.rglob("*.yaml"))}


def summary_of(recipe: Path) -> str:
    """What a shipped recipe is for: its first line."""
    with open(recipe, encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def recipe_file(name: str | Path) -> Path:
    """The file that a user means by a path or by the name of a shipped recipe; an existing file of that name wins.

    Warns where a shipped recipe is taken although the working directory has a file of that name with its ending.
    """
    path, shipped = Path(name), shipped_recipes().get(str(name))
    if shipped is None or path.is_file():
        return path
    for edited in (path.with_suffix(ending) for ending in _ENDINGS):
        if edited.is_file():
            _LOG.warning("%s is the recipe that ships with Higgstune; write %s for the file here", name, edited)
    return shipped
