"""Sampling settings: what a base's generation_config.json and an adapter's card recommend, and which comes first."""

import json
from pathlib import Path
from typing import Any

import pytest
from adapter_folders import copy_of
from export_world import make_adapter, make_world

from higgstune.errors import CheckpointError
from higgstune.exporting.layouts import write_sampling
from higgstune.families.sampling import GENERATION_CONFIG, Sampling, base_sampling
from higgstune.generate.added import trained_sampling
from higgstune.generate.speaker import load


def recommend(base: Path, **values: Any) -> None:
    (base / GENERATION_CONFIG).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Sampling()),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.8}, Sampling(0.6, 20, 0.8)),
        ({"do_sample": False, "temperature": 0.6}, Sampling(temperature=0)),
        ({"do_sample": True, "top_k": 0, "ras_win_len": 5, "ras_win_max_num_repeat": 3}, Sampling(1.0, 0, 0.95, 5, 3)),
        ({"ras_win_len": None, "temperature": None}, Sampling(repeat_window=0)),
    ],
)
def test_a_base_recommends_by_its_generation_config(tmp_path: Path, values: dict[str, Any], expected: Sampling) -> None:
    assert base_sampling(tmp_path) == Sampling() == base_sampling(None)  # ours, where it says nothing
    recommend(tmp_path, **values)
    assert base_sampling(tmp_path) == expected


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"temperature": True}, {"top_p": "much"}, {"top_k": [50]}, {"top_k": 5.5}]
)
def test_values_out_of_range_are_refused_with_the_file_that_has_them(tmp_path: Path, values: dict[str, Any]) -> None:
    recommend(tmp_path, **values)
    with pytest.raises(CheckpointError, match=GENERATION_CONFIG):
        base_sampling(tmp_path)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0), Sampling(0.3, 0, 1.0, 0, 1)])
def test_a_checkpoint_recommends_what_was_written_and_keeps_the_rest(tmp_path: Path, sampling: Sampling) -> None:
    recommend(tmp_path, temperature=0.9, eos_token_id=6)
    write_sampling(tmp_path, sampling)
    assert base_sampling(tmp_path) == sampling
    assert json.loads((tmp_path / GENERATION_CONFIG).read_text())["eos_token_id"] == 6


def test_the_card_comes_before_the_base_and_what_is_given_before_both(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    recommend(world / "base", temperature=0.6, top_k=20)
    silent = make_adapter(world, world / "silent")
    assert load(world / "base", device="cpu").sampling == Sampling(0.6, 20)
    assert load(silent, device="cpu").sampling == Sampling(0.6, 20)
    recorded = copy_of(silent, world / "recorded", sampling=Sampling(0.2, 5).generation_config())
    assert trained_sampling(recorded, world / "base").with_(temperature=0.4) == Sampling(0.4, 5)
    assert load(recorded, device="cpu").sampling == Sampling(0.2, 5)
