"""Rows of another store among those that are trained on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoint import save_tiny_checkpoint
from tiny_codec import save_tiny_codec
from tiny_runs import make_recordings, recipe
from training_world import train_unproven

import higgstune
from higgstune.batch.dataset import RowExamples
from higgstune.config.recipe import Recipe
from higgstune.data.store import CodeStore, MixedRows
from higgstune.errors import ConfigError, DataError
from higgstune.planning.survey import packs_of, survey_recipe
from higgstune.planning.training_data import TrainingData


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a store of 7 + 1 rows, and another one of 4."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_checkpoint(folder / "base")
    save_tiny_codec(folder / "base" / "codec")
    for name, clips, fraction in (("own", 8, 0.25), ("other", 4, 0.0)):
        higgstune.prepare(
            make_recordings(folder / f"{name}-recordings", clips=clips), folder / name,
            codec=folder / "base" / "codec", speaker=name, validation_fraction=fraction,
        )  # fmt: skip
    return folder


def replaying(world: Path, share: float = 0.4, store: Path | None = None, **changes: object) -> Recipe:
    replay = {"store": str(store or world / "other"), "share": share}
    return recipe(world, data={"store": str(world / "own"), "replay": replay}, **changes)


@pytest.mark.parametrize(("share", "drawn"), [(0.1, 1), (0.4, 5), (0.5, 7), (0.75, 21)])
def test_as_many_rows_as_make_the_share(world: Path, share: float, drawn: int) -> None:
    own = CodeStore.open(world / "own").split("train")
    mixed = MixedRows(own, CodeStore.open(world / "other").split("train"), share=share, seed=3)
    assert len(mixed) == len(own) + drawn
    speakers = [row.speaker for row in mixed]
    assert speakers == ["own"] * 7 + ["other"] * drawn
    times = np.unique([row.id for row in list(mixed)[7:]], return_counts=True)[1]
    assert times.max() - times.min() <= 1 or drawn < 4  # none twice before all were drawn


def test_the_seed_draws_them(world: Path) -> None:
    stores = [CodeStore.open(world / name).split("train") for name in ("own", "other")]
    drawn = [MixedRows(*stores, share=0.3, seed=seed).drawn for seed in range(8)]
    assert drawn[0] == MixedRows(*stores, share=0.3, seed=0).drawn
    assert len({tuple(indices) for indices in drawn}) > 1


def test_lengths_are_those_of_the_rows(world: Path) -> None:
    data = TrainingData.open(replaying(world))
    prompter = survey_recipe(replaying(world)).prompter
    examples = RowExamples(data.rows("train"), prompter, "transcript")
    assert examples.lengths().tolist() == [len(examples[i]) for i in range(len(examples))]
    assert len(examples) == 12
    assert len(data.rows("validation")) == 1  # never replayed


def test_a_plan_counts_them(world: Path) -> None:
    made = replaying(world)
    packs = packs_of(survey_recipe(made), made, made.stages[0], saves_probabilities=True)
    assert packs is not None
    assert len(packs.lengths) == 12


def test_they_are_trained_on(world: Path, tmp_path: Path) -> None:
    """One epoch of packs of a clip is as many steps as rows of both stores."""
    stage = {"name": "voice", "kind": "full", "epochs": 1, "batch_size": 1, "learning_rate": 1e-3}
    train_unproven(replaying(world, stages=[stage]), tmp_path / "run")
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert state["stages"]["voice"]["steps"] == 12
    assert len(state["trained_on"]["replay"]) == 1


def test_another_codec_is_refused(world: Path, tmp_path: Path) -> None:
    save_tiny_codec(tmp_path / "codec", seed=7)
    higgstune.prepare(make_recordings(tmp_path / "recordings", clips=2), tmp_path / "foreign", codec=tmp_path / "codec")
    with pytest.raises(DataError, match=r"data\.replay .*foreign was encoded by the codec"):
        train_unproven(replaying(world, store=tmp_path / "foreign"), tmp_path / "run")
    with pytest.raises(DataError, match="nowhere is not a code store"):
        train_unproven(replaying(world, store=tmp_path / "nowhere"), tmp_path / "run")


def test_a_run_does_not_resume_with_another_store(world: Path, tmp_path: Path) -> None:
    stage = {"name": "voice", "kind": "full", "max_steps": 2, "batch_size": 2}
    shutil.copytree(world / "other", tmp_path / "other")
    made = replaying(world, store=tmp_path / "other", stages=[stage])
    train_unproven(made, tmp_path / "run")
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(state | {"status": "running"}))
    shutil.rmtree(tmp_path / "other")
    shutil.copytree(world / "own", tmp_path / "other")
    with pytest.raises(ConfigError, match="started on another replay"):
        train_unproven(made, tmp_path / "run", resume=True)


@pytest.mark.parametrize("share", [0, 1, 1.5])
def test_a_share_is_between_0_and_1(world: Path, share: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.replay\.share"):
        replaying(world, share=share)
