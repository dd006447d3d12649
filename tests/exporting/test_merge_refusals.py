"""What is not merged: strange bases and codecs, damage, folders and options that do not go; nothing is left."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from adapter_folders import copy_of, drop_a_key
from export_world import flip_byte, make_adapter, nothing_is_left, save_base
from full_disk import largest_file
from on_cpu import CPU
from tiny_codec import save_tiny_codec

from higgstune import BaseSpec, export
from higgstune.errors import CheckpointError, ConfigError, DataError, WorkError


@pytest.mark.parametrize("again", ["the same adapter", "another adapter"])
def test_merging_twice_is_refused(world: Path, merged: Path, tmp_path: Path, again: str) -> None:
    adapter, message = world / "plain" / "adapter", "was merged into .* already"
    if again == "another adapter":
        adapter, message = make_adapter(world, tmp_path / "adapter", strength=0.1), "is a merged checkpoint"
    with pytest.raises(CheckpointError, match=message):
        export(adapter, tmp_path / "out", base=BaseSpec(merged, device="cpu"))
    assert nothing_is_left(tmp_path / "out")


def test_another_base_is_refused(world: Path, tmp_path: Path) -> None:
    same_shape = save_base(tmp_path / "other", seed=5)
    with pytest.raises(CheckpointError, match="fingerprint"):
        export(world / "plain" / "adapter", tmp_path / "out", base=BaseSpec(same_shape, device="cpu"))
    adapter = copy_of(world / "plain" / "adapter", tmp_path / "moved")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone"}))
    with pytest.raises(CheckpointError, match="--model"):
        export(adapter, tmp_path / "out", base=CPU)
    assert nothing_is_left(tmp_path / "out")


def test_another_codec_is_refused(world: Path, tmp_path: Path) -> None:
    codec = save_tiny_codec(tmp_path / "codec")
    with pytest.raises(CheckpointError, match="another codec"):
        export(world / "plain" / "adapter", tmp_path / "out", base=BaseSpec(codec=codec, device="cpu"))
    other = tmp_path / "data"
    shutil.copytree(world / "data", other)
    index = json.loads((other / "store.json").read_text())
    index["info"]["codec_revision"] = "0123456789abcdef"
    (other / "store.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="--data"):
        export(world / "plain" / "adapter", tmp_path / "out", data=other, base=CPU)
    assert nothing_is_left(tmp_path / "out")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("adapter/adapter_model.safetensors", truncate, "truncated"),
        ("adapter/adapter_model.safetensors", flip_byte, "checksum differs"),
        ("adapter/adapter_model.safetensors", drop_a_key, "checksum differs"),
        ("adapter/adapter_model.safetensors", Path.unlink, "missing"),
        ("adapter/adapter_config.json", Path.unlink, "neither an adapter"),
        ("base/model.safetensors", truncate, "truncated"),
        ("base/model.safetensors", drop_a_key, "text_lm_head"),
        ("base/tokenizer.json", Path.unlink, r"tokenizer\.json is missing"),
    ],
)
def test_damage_is_one_clear_error_and_leaves_nothing(
    world: Path, tmp_path: Path, part: str, damage: Any, message: str
) -> None:
    copy_of(world / "plain" / "adapter", tmp_path / "adapter")
    shutil.copytree(world / "base", tmp_path / "base")
    damage(tmp_path / part)
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path / "adapter", tmp_path / "out", base=BaseSpec(tmp_path / "base", device="cpu"))
    assert nothing_is_left(tmp_path / "out")


def test_a_missing_key_is_reported_where_no_checksum_was_recorded(world: Path, tmp_path: Path) -> None:
    adapter = copy_of(world / "plain" / "adapter", tmp_path / "adapter", weights_sha256=None)
    drop_a_key(adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit this base: it has no tensor"):
        export(adapter, tmp_path / "out", base=CPU)


def test_folders_that_exist_are_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="is not overwritten"):
        export(world / "plain" / "adapter", tmp_path / "out", base=CPU)
    with pytest.raises(ConfigError, match="would lie inside"):
        export(world / "plain" / "adapter", world / "base" / "merged", base=CPU)


def test_a_full_disk_leaves_nothing(world: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="File too large"), largest_file(10_000):
        export(world / "plain" / "adapter", tmp_path / "out", base=CPU)
    assert nothing_is_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "extended"}, "--format extended has no effect"),
        ({"format": "extended", "drop_modules": True}, "--drop-modules has no effect with --format extended"),
        ({"format": "extended", "base_bits": 4}, "--base-bits has no effect with --format extended"),
        ({"format": "native", "drop_modules": True}, "--drop-modules has no effect"),
        ({"drop_modules": True}, "--drop-modules has no effect"),
        ({"whisper": "x"}, "--whisper has no effect"),
    ],
)
def test_options_without_effect_are_refused(world: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export(world / "plain" / "adapter", tmp_path / "out", base=CPU, **options)
