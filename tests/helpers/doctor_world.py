"""What the doctor examines: the demo's base, a small store and an adapter, and ways to plant faults in them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import higgstune
from higgstune import BaseSpec
from higgstune.codec import MelCodec
from higgstune.config.recipe import Lora
from higgstune.data.manifest import Utterance, read_manifest, write_manifest
from higgstune.data.store import Row
from higgstune.diagnostics.examine import doctor
from higgstune.diagnostics.prompt import built_in_row
from higgstune.diagnostics.report import Report
from higgstune.families import family_of
from higgstune.families.base import Conditioning
from higgstune.families.higgs_v2.extensions import add_conditioning
from higgstune.model.adapter_folder import base_fingerprint
from higgstune.model.adapters import AttentionTraining, add_lora
from higgstune.model.base_identity import base_identity
from higgstune.model.load import load_model

ASSETS = Path(higgstune.__file__).parent / "demo" / "assets"


def failed(report: Report) -> set[str]:
    """The checks that failed."""
    return {finding.check for finding in report.findings if finding.status == "failed"}


def messages_of(report: Report, check: str, status: str = "failed") -> str:
    """Messages and advice of a check's findings, joined."""
    return " | ".join(f"{f.message} -> {f.advice}" for f in report.of(check, status))  # type: ignore[arg-type]


def save_adapter(base: Path, folder: Path, *, attention: AttentionTraining | None = None) -> Path:
    """An adapter that moves every layer, as training writes one; with `attention`, on audio attention, too."""
    model = load_model(base, dtype="float32", device="cpu")
    fingerprint = base_fingerprint(model)
    conditioning = Conditioning(audio_attention=attention is not None)
    add_conditioning(model, conditioning)
    torch.manual_seed(0)
    peft_model = add_lora(model, Lora(r=4, alpha=8), "full", attention=attention or "lora")
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if "lora_B" in name or ".modules_to_save." in name:
                weight.add_(0.02 * torch.randn_like(weight))
    peft_model.peft_config["default"].base_model_name_or_path = str(base)
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    card = {
        "base_shape": family_of(model).spec(model.config).card(),
        "checkpoint": str(base), "revision": None, "codec": str(base / "codec"), "stage": "voice",
        "codec_revision": MelCodec.from_pretrained(base / "codec").revision,
        "base_identity": base_identity(family_of(model), model.config, base),
        "base_fingerprint": fingerprint, "conditioning": conditioning.model_dump(),
        "recipe": {"lora": {"r": 4, "alpha": 8.0, "rslora": False, "dora": False}, "stages": [
            {"name": "voice", "text_weight": 1.0, "audio_weight": 1.0}]},
    }  # fmt: skip
    write_card(folder, card)
    return folder


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """An adapter's card, with the checksum of the weights that lie beside it."""
    checksum = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    (folder / "higgstune.json").write_text(json.dumps(card | {"weights_sha256": checksum}))


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Change an adapter's tensors, and the checksum with them: what was trained was wrong already."""
    path = folder / "adapter_model.safetensors"
    save_file({key: change(key, value).contiguous() for key, value in load_file(path).items()}, path)
    write_card(folder, json.loads((folder / "higgstune.json").read_text()))


def prepare(world: Path, out: Path, codec: Any) -> Path:
    """A store of six short clips of one voice."""
    rows = [row for _, row in read_manifest(world / "voices" / "metadata.jsonl") if isinstance(row, Utterance)]
    manifest = world / "voices" / "some.jsonl"
    mine = [row for row in rows if row.speaker == "rms"]
    write_manifest(manifest, sorted(mine, key=lambda row: (world / "voices" / str(row.audio)).stat().st_size)[:6])
    higgstune.prepare(
        manifest, out, codec=codec, codec_name="a codec", model=str(world / "base"), validation_fraction=0.2,
        references="same_speaker",
    )  # fmt: skip
    return out


def examined(world: Path, **changes: Any) -> Report:
    """The report on the healthy setup, or on one with some parts replaced."""
    named = {"checkpoint": changes.pop("model", world / "base"), "codec": changes.pop("codec", None)}
    return doctor(BaseSpec(**named), **({"adapter": world / "adapter", "data": world / "data"} | changes))


def cut_off(base: Path) -> None:
    """Lose the end of the weights."""
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def change_weights(base: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a base's tensors."""
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def change_config(base: Path, **changes: Any) -> None:
    """Change a base's configuration."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))


def rows() -> list[Row]:
    """Two rows that need no store."""
    return [built_in_row(8, 1024, seed=seed) for seed in (0, 1)]
