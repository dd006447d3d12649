"""Recipes: the shipped ones hold, every mistake is reported with its place, and nothing is lost in a file."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from higgstune.config.recipe import (
    DataSettings,
    EvaluationSettings,
    Lora,
    ModelSettings,
    Recipe,
    Replay,
    Stage,
    load_recipe,
    parse_recipe,
    save_recipe,
)
from higgstune.config.shipped import shipped_recipes
from higgstune.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = list(shipped_recipes().values())
DEMO = ROOT / "src" / "higgstune" / "demo" / "assets" / "recipe.yaml"


def tree(**changes: Any) -> dict[str, Any]:
    """The smallest whole recipe, as plain data."""
    return {"data": {"store": "data"}, "stages": [{"name": "voice", "kind": "full", "epochs": 1}]} | changes


def stage(**changes: Any) -> dict[str, Any]:
    """The recipe with one stage of these settings."""
    return tree(stages=[{"name": "voice", "kind": "full", "epochs": 1} | changes])


@pytest.fixture
def file(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a recipe file from plain data or text."""

    def write(content: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def test_seven_recipes_are_shipped() -> None:
    of_each_family = ["clone.yaml", "new_language.yaml", "voice.yaml"]
    assert sorted(path.name for path in SHIPPED) == sorted([*of_each_family, *of_each_family, "whisper.yaml"])


@pytest.mark.parametrize("path", [*SHIPPED, DEMO], ids=lambda path: path.name)
def test_a_shipped_recipe_is_valid(path: Path) -> None:
    assert load_recipe(path).stages[-1].kind == "full"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_recipe_for_the_released_checkpoint_fits_a_card_of_24_gb(path: Path) -> None:
    recipe = load_recipe(path)
    released = {"higgs_audio_v2": "bosonai/higgs-tts-2-3b-base", "higgs_tts_3": "bosonai/higgs-tts-3-4b"}
    assert recipe.model.checkpoint == released[recipe.model.family]
    assert recipe.gradient_checkpointing
    assert all(stage.batch_tokens is not None and stage.batch_tokens <= 4096 for stage in recipe.stages)


def test_a_new_language_has_a_text_stage_before_the_full_one() -> None:
    recipe = load_recipe("new_language")
    assert [stage.kind for stage in recipe.stages] == ["text", "full"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_saved_recipe_is_the_same_recipe(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, ["stages.0.codebook_weights=[8, 4, 2, 1, 1, 1, 1, 1]", "data.store=dätä/stimme"])
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    assert [item.name for item in tmp_path.iterdir()] == ["saved.yaml"]


def test_a_saved_recipe_holds_every_key(tmp_path: Path) -> None:
    save_recipe(parse_recipe(tree(), where="test"), tmp_path / "saved.yaml")
    saved = yaml.safe_load((tmp_path / "saved.yaml").read_text(encoding="utf-8"))
    assert saved.keys() == Recipe.model_fields.keys()
    assert saved["stages"][0].keys() == Stage.model_fields.keys()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (tree(modle={}), r"modle: unknown key; the nearest one is model"),
        (tree(model={"checkpoints": "x"}), r"model\.checkpoints: unknown key; the nearest one is checkpoint"),
        (tree(data={"store": "x", "replays": 1}), r"data\.replays: unknown key; the nearest one is replay"),
        (tree(lora={"rank": 8}), r"lora\.rank: unknown key; .* \(of r, alpha, dropout, rslora, dora\)"),
        (
            stage(learning_rates=1),
            r"stages\.0\.learning_rates: unknown key; the nearest one is learning_rate",
        ),
        (stage(grad_accum=1), r"stages\.0\.grad_accum: unknown key; write stages\.0\.gradient_accumulation \("),
        (tree(learning_rate=1), r"learning_rate: unknown key; write stages\.0\.learning_rate \(of model, "),
        (tree(lr=1), r"lr: unknown key; write stages\.0\.learning_rate"),
        (tree(checkpoint="x"), r"checkpoint: unknown key; write model\.checkpoint"),
        (stage(lora_alpha=1), r"stages\.0\.lora_alpha: unknown key; write lora\.alpha"),
        (stage(seeds=1), r"stages\.0\.seeds: unknown key; write seed, at the top"),
        (tree(model={"learning_rats": 1}), r"model\.learning_rats: unknown key; write stages\.0\.learning_rate"),
        (tree(optimizer="adam"), r"optimizer: unknown key; it is not like any other \(of model, "),
    ],
)
def test_an_unknown_key_names_the_nearest_one(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_recipe(wrong, where="test")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, r"data: Field required\n  stages: Field required"),
        (tree(data={}), r"data\.store: Field required"),
        (tree(stages=[]), r"recipe: stages is empty"),
        (stage(max_steps=50), r"stages\.0: epochs \(1\) and max_steps \(50\) are both given"),
        (stage(epochs=None), r"stages\.0: give epochs or max_steps"),
        (stage(epochs=0), r"stages\.0\.epochs: .*greater than 0"),
        (stage(kind="audio"), r"stages\.0\.kind: .*one of text, full"),
        (stage(name="../elsewhere"), r"stages\.0\.name: .*pattern"),
        (stage(learning_rate="fast"), r"stages\.0\.learning_rate: .*number"),
        (stage(learning_rate=float("inf")), r"stages\.0\.learning_rate: .*finite"),
        (stage(batch_size=0), r"stages\.0\.batch_size: .*greater than or equal to 1"),
        (
            {"data": {"store": "x"}, "stages": [], "gradient_checkpointing": "some"},
            "gradient_checkpointing: true, false or",
        ),
        (stage(batch_size=2, batch_tokens=4096), r"batch_tokens \(4096\) and batch_size \(2\) are both given"),
        (stage(text_targets="none"), r"stages\.0: text_weight has no effect with text_targets: none"),
        (stage(text_weight=0, audio_weight=0), r"stages\.0: .*nothing would be learned"),
        (stage(codebook_weights=[0, 0]), r"stages\.0: codebook_weights must be >= 0 and not all 0"),
        (stage(codebook_weights=[2, -1]), r"stages\.0: codebook_weights must be >= 0 and not all 0"),
        (tree(lora={"r": 0}), r"lora\.r: .*greater than or equal to 1"),
        (tree(lora={"dropout": 1}), r"lora\.dropout: .*less than 1"),
        (tree(model={"dtype": "float16"}), r"model\.dtype: .*'float32' or 'bfloat16'"),
    ],
)
def test_a_wrong_value_is_reported_with_its_place(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^my\.yaml:\n  (.|\n)*{message}"):
        parse_recipe(wrong, where="my.yaml")


def test_all_mistakes_are_reported_at_once_and_nothing_else() -> None:
    with pytest.raises(ConfigError) as message:
        parse_recipe(stage(epochs=0) | {"seed": -1, "lora": {"r": 0, "alpha": 0}}, where="my.yaml")
    places = [line.strip().partition(":")[0] for line in str(message.value).splitlines()]
    assert places == ["my.yaml", "lora.r", "lora.alpha", "stages.0.epochs", "seed"]


@pytest.mark.parametrize(
    ("kinds", "names", "message"),
    [
        (["full", "full"], ["a", "a"], "stages need different names, got a, a"),
        (["full", "text"], ["a", "b"], "a text stage cannot follow a full one"),
        (["text", "full", "full", "text"], ["a", "b", "c", "d"], "a text stage cannot follow a full one"),
    ],
)
def test_stages_that_do_not_fit_together(kinds: list[str], names: list[str], message: str) -> None:
    stages = [{"name": name, "kind": kind, "epochs": 1} for name, kind in zip(names, kinds, strict=True)]
    with pytest.raises(ConfigError, match=message):
        parse_recipe(tree(stages=stages), where="test")


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("stages.0.learning_rate=1e-4", "stages.0.learning_rate", 1e-4),
        ("stages.0.learning_rate=0.0002", "stages.0.learning_rate", 2e-4),
        ("stages.0.codebook_weights=[2, 1]", "stages.0.codebook_weights", (2.0, 1.0)),
        ("stages.0.scheduler=constant_with_warmup", "stages.0.scheduler", "constant_with_warmup"),
        ("lora.r=4", "lora.r", 4),  # a section that the file does not have
        ("model.device=cuda:1", "model.device", "cuda:1"),
        ("data.store=a=b", "data.store", "a=b"),
        ("model.revision=1e4f", "model.revision", "1e4f"),
        ("model.revision=12e4567", "model.revision", "12e4567"),  # a commit, though float() would take it
        ("gradient_checkpointing=true", "gradient_checkpointing", True),
        ("report_to=[]", "report_to", ()),
        ("report_to=", "report_to", ()),
        ("report_to=none", "report_to", ()),
        ("report_to=wandb", "report_to", ("wandb",)),
        ("report_to=[wandb, tensorboard]", "report_to", ("wandb", "tensorboard")),
        ("init_adapter=", "init_adapter", None),
    ],
)
def test_set(file: Callable[[Any], Path], override: str, where: str, value: Any) -> None:
    found: Any = load_recipe(file(tree()), [override])
    for key in where.split("."):
        found = found[int(key)] if key.isdecimal() else getattr(found, key)
    assert found == value
    assert type(found) is type(value)


def test_set_steps_in_place_of_epochs(file: Callable[[Any], Path]) -> None:
    path = file(tree())
    with pytest.raises(ConfigError, match="are both given: leave one out, or set it to null"):
        load_recipe(path, ["stages.0.max_steps=50"])
    recipe = load_recipe(path, ["stages.0.max_steps=50", "stages.0.epochs=null"])
    assert (recipe.stages[0].max_steps, recipe.stages[0].epochs) == (50, None)


def test_set_inside_a_section_that_was_left_empty(file: Callable[[Any], Path]) -> None:
    text = "data: {store: data}\nlora:\nstages: [{name: voice, kind: full, epochs: 1}]\n"
    assert load_recipe(file(text), ["lora.r=4"]).lora.r == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.epochs", "write key=value"),
        ("stages.1.epochs=2", "'1' is not an index of a list of 1 entries; they count from 0"),
        ("stages.-1.epochs=2", "'-1' is not an index of a list of 1 entries"),
        ("stages.voices.epochs=2", "'voices' is not an index of a list of 1 entries"),
        ("stages.voice.epochs=2", r"entries of a list are named by their number, from 0: write stages\.0\.epochs$"),
        ("stages.1={}", "'1' is not an index of a list of 1 entries"),
        ("data.store.folder=2", "'folder' stands inside a plain value"),
        ("data.store.folder.name=2", "'folder' stands inside a plain value"),
        ("lora.r=[", "the value is not valid YAML"),
        ("lora.rank=8", r"lora\.rank: unknown key; .* \(of r, alpha, "),
        ("epochs=2", r"epochs: unknown key; write stages\.0\.epochs"),
        ("stages.learning_rate=1", r"they count from 0: write stages\.0\.learning_rate"),
        ("report_to=wandbb", "report_to: there is no tracker 'wandbb'; did you mean 'wandb'"),
        ("report_to=[evil]", "report_to: there is no tracker 'evil'; the valid ones are tensorboard, "),
        ("report_to=[none, wandb]", "report_to: none stands alone"),
        ("report_to=3", "report_to: "),
        ("lora.r=1000000000000", r"lora\.r: "),
        ("seed=x", r"seed: .*integer"),
    ],
)
def test_set_that_cannot_be(file: Callable[[Any], Path], override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(file(tree()), [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stages: [", "is not valid YAML"),
        ("data: {store: x}\n\tstages: []", "is not valid YAML"),
        ("model: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("", "must be a mapping with model, data, lora and stages"),
        ("- name: voice", "must be a mapping"),
        ("just words", "must be a mapping"),
        ("1: 2", r"1: "),
        ("data: store", r"data: "),
        ("stages: {name: voice}", r"stages: "),
    ],
)
def test_a_file_that_is_not_a_recipe(file: Callable[[Any], Path], content: str, message: str) -> None:
    path = file(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_recipe(path)
    assert str(path) in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read: No such file"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("data: {store: dätä}".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_recipe(tmp_path / "latin.yaml")


def test_numbers_as_yaml_reads_them(file: Callable[[Any], Path]) -> None:
    """YAML 1.1 takes 1e-4 for a word; people write it all the same."""
    text = "data: {store: data}\nstages: [{name: voice, kind: full, epochs: 1, learning_rate: 1e-4}]\n"
    assert load_recipe(file(text)).stages[0].learning_rate == 1e-4


@pytest.mark.parametrize(
    "part",
    [Recipe, ModelSettings, DataSettings, Replay, EvaluationSettings, Lora, Stage],
    ids=lambda part: part.__name__,
)
def test_every_key_is_explained(part: type[BaseModel]) -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    explained = " ".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))  # first columns
    assert [key for key in part.model_fields if f"`{key}`" not in explained] == []


@pytest.mark.parametrize("key", ["asr", "speaker_judge", "quality_judge"])
@pytest.mark.parametrize("spec", ["rm -rf precious", "sh", '"open'])
def test_a_recipe_from_a_file_brings_no_command(
    file: Callable[[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, spec: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sh").touch()  # the path of a file is a command, too
    path = file(tree() | {"evaluation": {key: spec}})
    with pytest.raises(ConfigError, match=rf"evaluation\.{key} is a command to run"):
        load_recipe(path)
    assert getattr(load_recipe(path, commands=True).evaluation, key) == spec
    plain = file(tree() | {"evaluation": {key: "large-v3"}})
    assert getattr(load_recipe(plain, [f"evaluation.{key}='python judge.py'"]).evaluation, key) == "python judge.py"
