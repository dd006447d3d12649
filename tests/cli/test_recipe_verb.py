"""The verb `recipe`: it lists what ships, and writes one out that `train` takes."""

import json
from pathlib import Path

import pytest
from commands import Command

from higgstune.config.recipe import load_recipe


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_a_name_it_lists_them(command: Command) -> None:
    code, out, _ = command("recipe")
    assert code == 0
    assert "voice                     One speaker" in out
    assert max(map(len, out.splitlines())) <= 120
    names = list(json.loads(command("recipe", "--json")[1])["recipes"])
    assert names[:2] == ["clone", "higgs_tts_3/clone"]
    assert len(names) == 7


def test_it_writes_one_out_once(command: Command) -> None:
    code, out, _ = command("recipe", "voice")
    assert code == 0
    assert "next: edit it, then higgstune train voice.yaml --out runs/voice" in out
    assert load_recipe("voice.yaml") == load_recipe("voice")
    Path("voice.yaml").write_text("mine")
    code, _, err = command("recipe", "voice")
    assert code == 2
    assert "voice.yaml exists and is not overwritten" in err
    assert Path("voice.yaml").read_text() == "mine"


def test_the_file_names_itself_in_its_commands(command: Command) -> None:
    code, out, _ = command("recipe", "clone", "--out", "my recipes/a.yaml", "--json")
    assert code == 0
    assert json.loads(out) == {"recipe": "clone", "file": "my recipes/a.yaml"}
    text = Path("my recipes/a.yaml").read_text()
    assert "higgstune train 'my recipes/a.yaml' --plan" in text
    assert "higgstune train clone" not in text


def test_an_unknown_recipe_is_refused(command: Command) -> None:
    code, _, err = command("recipe", "voise")
    assert code == 2
    assert "there is no recipe 'voise'; did you mean 'voice'?" in err
