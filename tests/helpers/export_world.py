"""A base with its codec, a store, and adapters that need no training: what merging and exporting are tested on."""

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from tiny_checkpoint import save_tiny_checkpoint
from tiny_runs import DEMO_CODEC, make_recordings
from tiny_whisper import save_tiny_whisper
from torch import Tensor

import higgstune
from higgstune.batch.collate import Batch, PaddedCollator
from higgstune.batch.dataset import PLAIN, Rendering, RowExamples
from higgstune.codec import load_codec
from higgstune.codec.whisper_encoder import load_whisper
from higgstune.config.recipe import Lora
from higgstune.data.store import CodeStore
from higgstune.data.whisper_features import FeatureStore
from higgstune.families.base import Conditioning, WhisperSpec
from higgstune.families.higgs_v2.extensions import add_conditioning, conditioning_of, whisper_spec
from higgstune.families.higgs_v2.family import FAMILY
from higgstune.families.higgs_v2.prompt import AUDIO_IN
from higgstune.families.higgs_v2.prompter import Prompter, SpecialIds
from higgstune.model.adapter_folder import base_fingerprint
from higgstune.model.adapters import add_lora, load_adapter
from higgstune.model.base_identity import base_identity
from higgstune.model.load import load_model, load_tokenizer
from higgstune.training.save import save_adapter
from higgstune.training.verify import probe_logits

STAGES = [
    {"name": "stage1", "kind": "text", "steps": 40, "metrics": {"eval_text_loss": 2.5}},
    {"name": "stage2", "kind": "full", "steps": 300, "metrics": {}},
]


def save_base(folder: Path, **changes: Any) -> Path:
    """A checkpoint of the golden weights' sizes, with codec and licence, and a file that has no business in a copy."""
    save_tiny_checkpoint(folder, **({"num_hidden_layers": 3, "intermediate_size": 160} | changes))
    shutil.copytree(DEMO_CODEC, folder / "codec")
    (folder / "LICENSE").write_text("The terms of the base.")
    (folder / "codec" / "LICENSE").write_text("The terms of the codec.")
    (folder / "diary.json").write_text("{}")
    return folder


def make_world(folder: Path, *, whisper: bool = False) -> Path:
    """`base`, `data` and, on demand, `whisper`, whose features are in the store."""
    save_base(folder / "base")
    options: dict[str, Any] = {}
    if whisper:
        options["whisper"] = str(save_tiny_whisper(folder / "whisper"))
    higgstune.prepare(
        make_recordings(folder / "recordings", clips=6), folder / "data", codec=folder / "base" / "codec",
        validation_fraction=0.5, references="same_speaker", speaker="anna", **options,
    )  # fmt: skip
    return folder


def whisper_spec_of(world: Path) -> WhisperSpec:
    """The shape of the world's Whisper encoder."""
    config = load_model(world / "base", device="cpu").config
    tokenizer = load_tokenizer(world / "base", FAMILY, config)
    return whisper_spec(load_whisper(world / "whisper"), tokenizer.convert_tokens_to_ids(AUDIO_IN))


def make_adapter(
    world: Path,
    folder: Path,
    *,
    base: Path | None = None,
    conditioning: Conditioning | None = None,
    attention: Literal["lora", "full"] = "lora",
    strength: float = 0.05,
    **lora: Any,
) -> Path:
    """An adapter folder with random weights, as a run would have saved it after two stages."""
    base = base or world / "base"
    model = load_model(base, device="cpu", dtype="float32")
    fingerprint, has = base_fingerprint(model), conditioning or Conditioning()
    add_conditioning(model, has)
    shape = Lora(**({"r": 4, "alpha": 8} | lora))
    adapted = add_lora(model, shape, "full", has, attention)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(strength * torch.randn_like(parameter))
            elif "magnitude" in name:
                parameter.mul_(1 + strength * torch.rand_like(parameter))
    folder.parent.mkdir(parents=True, exist_ok=True)
    card = {
        "higgstune": higgstune.__version__,
        "checkpoint": str(base),
        "revision": None,
        "codec": str(world / "base" / "codec"),
        "codec_revision": load_codec(world / "base" / "codec").revision,
        "base_fingerprint": fingerprint,
        "base_identity": base_identity(FAMILY, model.config, base),
        "conditioning": has.model_dump(),
        "stage": "stage2",
        "stages": STAGES,
        "data": {
            "store": str(world / "data"), "train_rows": 4, "validation_rows": 2, "train_hours": 0.25,
            "validation_hours": 0.125,
            "origin": {
                "source": [{"says": str(world / "phone"), "rows": 6}],
                "licence": [{"says": "CC-BY-4.0", "rows": 4}, {"says": None, "rows": 2}],
            },
        },
        "recipe": {
            "lora": shape.model_dump(),
            "data": {"store": str(world / "data"), "reference": "scene" if has.whisper else "turn"},
        },
    }  # fmt: skip
    weights = {name: value.detach() for name, value in adapted.named_parameters()}  # of which peft takes its own
    save_adapter(folder, adapted, card, weights)
    return folder


def batch_of(model: Any, world: Path) -> Batch:
    """All rows of the store, as the model would be trained on them."""
    config = model.config
    tokenizer = load_tokenizer(world / "base", FAMILY, config)
    shape = conditioning_of(model).whisper
    rendering = Rendering("scene", FeatureStore.open(world / "data", str(world / "whisper"))) if shape else PLAIN
    prompter = Prompter(tokenizer, SpecialIds.from_config(config))
    examples = RowExamples(CodeStore.open(world / "data"), prompter, "transcript", rendering)
    collate = PaddedCollator(pad_id=config.pad_token_id, stream_eos=config.audio_stream_eos_id)
    return collate([examples[i] for i in range(len(examples))])


def logits(model: Any, world: Path) -> dict[str, Tensor]:
    """Audio and text logits on all rows of the store."""
    return probe_logits(model, batch_of(model, world))


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference."""
    return max((a[key] - b[key]).abs().max().item() for key in a)


def adapted_logits(world: Path, adapter: Path) -> dict[str, Tensor]:
    """Those of base + adapter in float32."""
    return logits(load_adapter(load_model(world / "base", device="cpu", dtype="float32"), adapter), world)


def flip_byte(path: Path) -> None:
    """Change one byte near the end of a file; its length stays."""
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder with its bytes and its time of change."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def nothing_is_left(out: Path) -> bool:
    """Neither the folder nor one under a temporary name."""
    return not list(out.parent.glob(f"{out.name}*"))
