"""The proof of what was merged, on what was written: against base + adapter, on held-out clips."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import copy_of
from export_world import batch_of, make_adapter, nothing_is_left
from on_cpu import CPU
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from higgstune import export
from higgstune.errors import CheckpointError, DataError, VerificationError
from higgstune.exporting import layouts
from higgstune.exporting import merge as merging
from higgstune.exporting import verify as check
from higgstune.exporting.source import open_source
from higgstune.exporting.verify import HeldOut, held_out
from higgstune.model.load import load_model, load_model_and_tokenizers
from higgstune.training.verify import probe_logits, write_probe


def test_what_was_not_merged_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, out = world / "plain" / "adapter", tmp_path / "out"
    for message, broken in {
        "hardly differs from the base": lambda layers, dtype, show: layers.unload(),
        "is not the base with its adapter": forget_one_layer,
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(merging, "merge_layers", broken)
            with pytest.raises(VerificationError, match=message):
                export(adapter, out, base=CPU)
        assert nothing_is_left(out)


def forget_one_layer(model: Any, dtype: torch.dtype, show: Any) -> Any:
    first, *others = [part for part in model.modules() if isinstance(part, LoraLayer)]
    assert isinstance(first, LoraLayer)
    for layer in others:
        layer.merge()  # type: ignore[operator]
    return model.unload()


def test_a_layer_that_computes_something_else_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.merge", lambda self, **options: self.set_scale("default", 1.001))
    with pytest.raises(VerificationError, match=r"merging model\.layers\.0\.\S+ changed what it computes"):
        export(world / "plain" / "adapter", tmp_path / "out", base=CPU)
    assert nothing_is_left(tmp_path / "out")


def test_what_is_compared_is_what_lies_on_the_disk(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_badly(folder: Path, *rest: Any, **options: Any) -> None:
        layouts.write_checkpoint(folder, *rest, **options)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.audio_mlp.up_proj.weight"] *= 1.01
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merging, "write_checkpoint", write_badly)
    with pytest.raises(VerificationError, match="it was not kept"):
        export(world / "plain" / "adapter", tmp_path / "out", base=CPU)
    assert nothing_is_left(tmp_path / "out")


def test_an_adapter_that_rounding_drowns_is_refused(world: Path, tmp_path: Path) -> None:
    weak = make_adapter(world, tmp_path / "adapter", strength=3e-4)
    assert export(weak, tmp_path / "exact", dtype="float32", base=CPU).check.from_base > 1e-3
    with pytest.raises(VerificationError, match="--dtype float32"):
        export(weak, tmp_path / "rounded", dtype="bfloat16", base=CPU)
    nothing = make_adapter(world, tmp_path / "nothing", strength=1e-9)
    with pytest.raises(VerificationError, match="hardly differs"):
        export(nothing, tmp_path / "none", base=CPU)
    broken = make_adapter(world, tmp_path / "broken", strength=float("nan"))
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        export(broken, tmp_path / "none", base=CPU)
    assert nothing_is_left(tmp_path / "none")


def test_an_adapter_that_is_half_lost_in_rounding_is_refused() -> None:
    """Within the tolerance, and off the base, but no nearer to base + adapter than to the base."""
    held = HeldOut({}, 1, "clips")
    base, adapted = ({"audio_logits": torch.full((4, 8), value)} for value in (0.0, 0.2))
    for merged, message in ((0.15, None), (0.13, "rounding drowns"), (0.45, "not the base with"), (0.04, "hardly")):
        found = {"audio_logits": torch.full((4, 8), merged)}
        if message is None:
            assert check.check_merged(found, adapted, base, dtype="bfloat16", held_out=held).from_base > 0.1
            continue
        with pytest.raises(VerificationError, match=message):
            check.check_merged(found, adapted, base, dtype="bfloat16", held_out=held)
    unknown = {"audio_logits": torch.full((4, 8), float("nan"))}
    with pytest.raises(VerificationError):
        check.check_merged(unknown, adapted, base, dtype="float32", held_out=held)


def test_where_the_store_has_gone_the_runs_probe_is_compared_on(world: Path, tmp_path: Path) -> None:
    gone = {"data": {"store": "/gone/data"}, "recipe": {}}
    adapter = copy_of(world / "plain" / "adapter", tmp_path / "s" / "adapter", **gone)
    with pytest.raises(DataError, match=r"neither the store /gone/data nor .* exists.*--data"):
        export(adapter, tmp_path / "out", base=CPU)
    given = export(adapter, tmp_path / "given", data=world / "data", base=CPU)
    assert (given.check.clips, given.check.origin) == (3, "validation clips of the store data")
    (tmp_path / "s" / "verify").mkdir()
    probe, model = tmp_path / "s" / "verify" / "probe.safetensors", load_model(world / "base", device="cpu")
    batch = batch_of(model, world)
    write_probe(batch, probe_logits(model, batch), probe)
    probed = export(adapter, tmp_path / "probed", base=CPU)
    assert (probed.check.clips, probed.check.origin) == (6, "the clips of the run's own verification")
    probe.write_bytes(probe.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        export(adapter, tmp_path / "out", base=CPU)
    assert nothing_is_left(tmp_path / "out")


def test_every_clip_is_compared(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("higgstune.exporting.verify._POSITIONS", 9)
    source = open_source(world / "plain" / "adapter")
    loaded = load_model_and_tokenizers(world / "base", device="cpu")
    batch = held_out(source, loaded).batch
    clips, length = batch["input_ids"].shape
    for kind in ("audio", "text"):
        assert len(batch[f"{kind}_positions"]) == len(batch[f"{kind}_targets"]) == 9
        assert set((batch[f"{kind}_positions"] // length).tolist()) == set(range(clips))
