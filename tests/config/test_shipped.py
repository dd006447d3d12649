"""Recipes by name: which file a name means, in the command line's loader and in Python."""

import logging
from pathlib import Path

import pytest

import higgstune
from higgstune.config.recipe import load_recipe
from higgstune.config.shipped import recipe_file, shipped_recipes, summary_of
from higgstune.errors import ConfigError

PACKAGE = Path(higgstune.__file__).parent


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_shipped_recipes_lie_in_the_package_and_say_in_a_line_what_they_are_for() -> None:
    of_v2 = ["clone", "new_language", "voice", "whisper"]
    of_tts_3 = [f"higgs_tts_3/{name}" for name in of_v2[:3]]
    assert sorted(shipped_recipes()) == sorted(of_v2 + of_tts_3)
    assert {load_recipe(name).model.family for name in of_tts_3} == {"higgs_tts_3"}
    for path in shipped_recipes().values():
        assert path.is_relative_to(PACKAGE)
        assert summary_of(path).endswith(".")


def test_a_name_means_the_shipped_recipe(caplog: pytest.LogCaptureFixture) -> None:
    Path("voice").mkdir()  # a folder of recordings, maybe
    assert higgstune.Recipe.load("voice") == load_recipe(PACKAGE / "recipes" / "voice.yaml")
    assert not caplog.records


def test_a_file_of_that_name_wins() -> None:
    Path("voice").write_text("data: {store: mine}\nstages: [{name: a, kind: full, epochs: 1}]\n")
    assert load_recipe("voice").data.store == "mine"


def test_an_edited_copy_is_not_overlooked(caplog: pytest.LogCaptureFixture) -> None:
    Path("voice.yaml").write_text("")
    with caplog.at_level(logging.WARNING):
        assert recipe_file("voice") == shipped_recipes()["voice"]
    assert "write voice.yaml for the file here" in caplog.text


def test_an_unknown_name_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"the recipe voices cannot be read: No such file.*did you mean 'voice'"):
        load_recipe("voices")
