"""Faults of a store and of the codes in it: found in the losses that the model has on them."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doctor_world import examined, failed, messages_of, prepare
from tiny_checkpoint import save_tiny_checkpoint
from tiny_runs import DEMO_CODEC

from higgstune import BaseSpec
from higgstune.batch.dataset import Rendering
from higgstune.codec import MelCodec
from higgstune.data.store import CodeStore
from higgstune.diagnostics.data import find_features
from higgstune.diagnostics.examine import doctor
from higgstune.diagnostics.loss import DataLoss, judge_loss, never_trained
from higgstune.errors import DataError
from higgstune.families.base import WhisperSpec
from higgstune.model.load import load_model

CHANCE = math.log(1026)


class Other:
    """The demo's codec, whose codes go through a function, under its own revision or another one."""

    def __init__(
        self, inner: MelCodec, change: Callable[[np.ndarray], np.ndarray], revision: str | None = None
    ) -> None:
        self.inner, self.change = inner, change
        self.sample_rate, self.frame_rate = inner.sample_rate, inner.frame_rate
        self.num_codebooks, self.codebook_size = inner.num_codebooks, inner.codebook_size
        self.revision = revision or inner.revision
        self.reference_seconds = inner.reference_seconds

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        return self.change(self.inner.encode(waveform)).astype(np.uint16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return self.inner.decode(codes)


def test_a_store_of_another_codec_is_found(world: Path, tmp_path: Path) -> None:
    codec = Other(MelCodec.from_pretrained(DEMO_CODEC), lambda codes: codes[::-1], revision="another")
    report = examined(world, data=prepare(world, tmp_path / "other", codec))
    assert failed(report) == {"codec"}
    assert "revision another" in messages_of(report, "codec")
    assert "another codec" in messages_of(report, "loss", "skipped")


def permuted(codes: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).permutation(1024)[codes]


def delayed(codes: np.ndarray) -> np.ndarray:
    return np.stack([np.roll(codes[:, k], k) for k in range(8)], axis=1)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda codes: np.roll(codes, 1, axis=1), "not those of the model's codec"),
        (permuted, "not those of the model's codec"),
        (delayed, "already have a delay"),
        (lambda codes: codes[:, [0, 1, 2, 3, 4, 5, 7, 6]], "in the wrong place|not those of the model"),
    ],
    ids=["rolled", "permuted", "delayed", "swapped"],
)
def test_codes_that_do_not_fit_the_model_are_found(world: Path, tmp_path: Path, fault: Any, says: str) -> None:
    codec = Other(MelCodec.from_pretrained(DEMO_CODEC), fault)  # under the right name and revision
    report = examined(world, data=prepare(world, tmp_path / "shuffled", codec))
    assert failed(report) == {"loss"}
    assert any(part in messages_of(report, "loss") for part in says.split("|"))


def losses(real: float, rolled: float = 12.0, undelayed: float = 8.0, swapped: float = 7.0) -> DataLoss:
    return DataLoss(*((value,) * 8 for value in (real, rolled, undelayed, swapped)))


@pytest.mark.parametrize(
    ("loss", "status", "says"),
    [
        (losses(4.0), "ok", "4.00 nats"),
        (losses(6.5), "warning", "a new language"),
        (losses(0.3), "failed", "unseen audio cannot"),
        (losses(9.0, rolled=9.5), "failed", "another codec"),
        (losses(8.7, rolled=11.7, undelayed=9.0, swapped=9.0), "warning", "high"),
        (losses(6.0, rolled=6.0), "warning", "random weights"),
        (losses(5.0, undelayed=4.0), "failed", "already have a delay"),
        (losses(4.0, swapped=3.9), "warning", "words make no difference"),
        (losses(math.nan), "failed", "nan"),
        (dataclasses.replace(losses(4.0), real=(4.0,) * 7 + (13.0,)), "failed", "codebooks 7 "),
    ],
)
def test_losses_are_judged(loss: DataLoss, status: str, says: str) -> None:
    finding = judge_loss(loss, CHANCE, untrained=False, rows=16)[-1]
    assert finding.status == status
    assert says in f"{finding.message} {finding.advice}"


def test_high_losses_of_untrained_weights_are_not_a_failure() -> None:
    assert judge_loss(losses(9.0), CHANCE, untrained=True, rows=16)[0].status == "warning"


def test_random_weights_are_named_and_are_not_a_failure(world: Path, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "random")
    shutil.copytree(DEMO_CODEC, folder / "codec")
    report = doctor(BaseSpec(folder), data=world / "data")
    assert report.passed, failed(report)
    assert "random weights" in messages_of(report, "loss", "warning")
    assert never_trained(load_model(folder, device="cpu"))
    assert not never_trained(load_model(world / "base", device="cpu"))


def test_a_missing_or_empty_store_is_found(world: Path, tmp_path: Path) -> None:
    report = examined(world, data=world / "voices")
    assert failed(report) == {"data"}
    assert report.of("generation", "ok")
    store = shutil.copytree(world / "data", tmp_path / "data")
    index = json.loads((store / "store.json").read_text())
    index["shards"] = [shard for shard in index["shards"] if shard["split"] == "validation"]
    index["info"]["rows"]["train"] = 0
    (store / "store.json").write_text(json.dumps(index))
    assert "nothing to train on" in messages_of(examined(world, data=store), "data")


def test_missing_whisper_features_are_reported(world: Path) -> None:
    store, in_scene = CodeStore.open(world / "data"), Rendering(reference="scene")
    assert find_features(store, in_scene, named=None, shape=None) == (in_scene, [])
    _, [finding] = find_features(store, Rendering(), named="a/whisper", shape=None)
    assert finding.status == "failed"
    assert "has audio for Whisper" in finding.message
    with pytest.raises(DataError, match="--whisper a/whisper"):
        find_features(store, in_scene, named="a/whisper", shape=None)
    shape = WhisperSpec(checkpoint="a/whisper", revision="0", d_model=3, chunk_frames=4, token_id=11)
    rendering, [finding] = find_features(store, in_scene, named=None, shape=shape)
    assert finding.status == "warning"
    assert rendering == in_scene
