"""A base that has changed is recognised by its configuration and its tokenizer, in whatever layout it is stored."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foreign_adapters import save_foreign
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny_checkpoint, tiny_config, tiny_tokenizer

from higgstune.checkpoint_files import write_checksums
from higgstune.errors import CheckpointError
from higgstune.families.higgs_v2.family import FAMILY
from higgstune.families.higgs_v2.original import native_config, original_config
from higgstune.model.adapter_folder import check_base, check_tokenizer, write_card
from higgstune.model.base_identity import (
    base_identity,
    changes,
    config_identity,
    read_weight_files,
    tokenizer_sha256,
)
from higgstune.model.load import load_model

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_checkpoint(tmp_path / "base")


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=7, sort_keys=True), encoding="utf-8")


def identity(base: Path) -> dict[str, Any]:
    return base_identity(FAMILY, FAMILY.read_config(base), base)


@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "default", "rope_theta": 1e4}, None])
def test_both_layouts_of_a_base_have_one_identity(rope: dict[str, Any] | None) -> None:
    native = tiny_config(tiny_tokenizer(), rope_parameters=rope)
    written = json.loads(json.dumps(original_config(native, tokens={"<|AUDIO|>": 11, "<|audio_eos|>": 8})))
    written["text_config"] |= {"bos_token_id": 5, "max_position_embeddings": 131072, "use_cache": False}
    assert config_identity(FAMILY, native_config(written)) == config_identity(FAMILY, native)
    assert json.loads(json.dumps(config_identity(FAMILY, native))) == config_identity(FAMILY, native)


def test_what_is_not_computed_with_does_not_matter(base: Path, tmp_path: Path) -> None:
    before = identity(base)
    for name in ("config.json", "tokenizer.json"):
        edit(base / name, lambda content: None)  # another order and spacing
    edit(base / "config.json", lambda c: c.update(dtype="bfloat16", use_cache=False, transformers_version="9"))
    edit(base / "tokenizer.json", lambda c: c.update(truncation={"max_length": 5}, padding=None, decoder=None))
    edit(base / "tokenizer.json", lambda c: c["model"].update(merges=[" ".join(m) for m in c["model"]["merges"]]))
    (base / "chat_template.jinja").write_text("another")
    (base / "generation_config.json").write_text("{}")
    assert identity(shutil.move(base, tmp_path / "moved")) == before
    path = tmp_path / "moved" / "model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    assert (
        config_identity(FAMILY, load_model(tmp_path / "moved", device="cpu").config)["config_sha256"]
        == (before["config_sha256"])
    )


def deal_again(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def theta(content: dict[str, Any]) -> None:
    content["rope_parameters"]["rope_theta"] *= 10


CHANGES: list[tuple[str, Callable[[Any], object], str]] = [
    ("config.json", theta, r"rope_parameters\.rope_theta is 5000000, not 500000"),
    ("config.json", lambda c: c.update(rms_norm_eps=0.1), "rms_norm_eps is 0.1, not 1e-05"),
    ("config.json", lambda c: c.update(hidden_act="relu"), "hidden_act is relu, not silu"),
    ("config.json", lambda c: c.update(audio_delay_token_id=3), "audio_delay_token_id is 3, not 10"),
    ("tokenizer.json", deal_again, r"tokenizer\.json has changed"),
    ("tokenizer.json", lambda c: c["added_tokens"].pop(), r"tokenizer\.json has changed"),
    ("tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"}), r"tokenizer\.json has changed"),
    ("tokenizer.json", lambda c: c["model"]["merges"].pop(), r"tokenizer\.json has changed"),
]


@pytest.mark.parametrize(("file", "change", "message"), CHANGES)
def test_a_changed_base_is_refused_by_name(
    base: Path, tmp_path: Path, file: str, change: Callable[[Any], object], message: str
) -> None:
    adapter = save_foreign(base, tmp_path / "adapter")
    write_card(adapter, {"base_identity": identity(base)})
    sealed = shutil.copytree(base, tmp_path / "sealed")
    write_checksums(sealed, **identity(sealed))

    def check() -> None:
        check_base(adapter, load_model(base, device="cpu"))
        check_tokenizer(adapter, base)

    check()
    load_model(sealed, device="cpu")
    for folder in (base, sealed):
        edit(folder / file, change)
    with pytest.raises(CheckpointError, match=message):
        check()
    with pytest.raises(CheckpointError, match=f"sealed is not as it was written.*{message}"):
        load_model(sealed, device="cpu")


def test_what_was_not_recorded_is_not_compared(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = identity(base)
    assert changes({}, now) is None
    assert changes({"config_sha256": "x", "architecture": 5}, now) == "config.json has changed (its architecture)"
    write_checksums(base)
    load_model(base, device="cpu")
    assert [record.message for record in caplog.records] == [
        f"{base} does not record config.json and tokenizer.json of its base: whether they have changed is unknown"
    ]


def test_a_weight_file_is_read_again_where_its_size_or_times_differ(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_weight_files(base, {})
    path = base / "model.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("higgstune.model.base_identity.sha256_of", lambda path: "read again")
        assert read_weight_files(base, before) == before
        assert read_weight_files(base, {})[path.name].sha256 == "read again"
    times, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the time of change cannot be set back
    after = read_weight_files(base, before)
    assert after[path.name].sha256 != before[path.name].sha256
    assert after[path.name].modified == before[path.name].modified


def test_the_tokenizer_belongs_to_the_base(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        tokenizer_sha256(tmp_path)
