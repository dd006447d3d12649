"""From base and adapter to one checkpoint, proven by loading what was written.

    load base -> logits -> load adapter -> logits -> merge in float32 -> write -> load what was written -> logits

The last logits must be those of base + adapter, and not those of the base, or nothing is left.
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import HiggsAudioV2ForConditionalGeneration

from higgstune.batch.collate import Batch
from higgstune.codec import DEFAULT_CODEC
from higgstune.codec.whisper_encoder import load_whisper
from higgstune.errors import CheckpointError, ConfigError, VerificationError
from higgstune.exporting.card import Written, describe, public_name
from higgstune.exporting.layouts import LAYOUTS, LayoutName, copy_codec, write_checkpoint
from higgstune.exporting.source import Progress, Source, open_source, stored_dtype
from higgstune.exporting.verify import Logits, MergeCheck, audio_loss, check_merged, held_out
from higgstune.families.higgs_v2.extensions import conditioning_modules, conditioning_of, remove_conditioning
from higgstune.files import check_new, new_folder
from higgstune.files import writing_folder as writing
from higgstune.hub import fetch
from higgstune.model.adapter_folder import base_fingerprint
from higgstune.model.adapters import load_adapter
from higgstune.model.load import ModelAndTokenizers, load_model, load_model_and_tokenizers
from higgstune.training.verify import probe_logits

_PROBES = 4  # random inputs on which a layer is compared before and after its merge
_SAME = 1e-4  # of the largest output: a thousand times what float32 rounds, a thousandth of what a lost update does


def merge_layers(model: PeftModel, dtype: torch.dtype, show: Progress) -> HiggsAudioV2ForConditionalGeneration:
    """The base with the adapter in its weights, in place, in `dtype`.

    Each layer is merged in float32, whatever the base's dtype, and rounded once; one layer at a time, so that the model
    is never in memory in float32. Modules that were trained in full take the place of the base's. Raises
    VerificationError when a merged layer computes something else than layer and adapter did, CheckpointError when
    the adapter holds numbers that are not finite.
    """
    layers = [(name, part) for name, part in model.named_modules() if isinstance(part, LoraLayer)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index, (name, layer) in enumerate(layers):
            _merge_layer(name.removeprefix("base_model.model."), layer, generator)
            layer.get_base_layer().to(dtype)
            show("merging layers", index + 1, len(layers))
    base = model.unload()  # not `merge_and_unload`: the layers are merged already
    assert isinstance(base, HiggsAudioV2ForConditionalGeneration)
    for parameter in base.parameters():
        parameter.data = parameter.data.to(dtype)
    return base


def _merge_layer(name: str, layer: Any, generator: torch.Generator) -> None:
    layer.float()
    weight: Tensor = layer.get_base_layer().weight
    inputs = torch.randn(_PROBES, weight.shape[1], generator=generator).to(weight.device)
    before = layer(inputs)
    try:
        layer.merge(safe_merge=True)
    except ValueError as error:
        raise CheckpointError(f"the adapter cannot be merged into {name}: {error}") from error
    _check_same(before, layer(inputs), name)


def _check_same(before: Tensor, after: Tensor, name: str) -> None:
    gap, size = (after - before).abs().max().item(), before.abs().max().item()
    if not gap <= _SAME * size:  # nor where a number is not finite
        raise VerificationError(
            f"merging {name} changed what it computes: by {gap:.2e} where its outputs reach {size:.2e}"
        )


@dataclass(frozen=True)
class MergeResult:
    """A merged checkpoint."""

    folder: Path
    layout: LayoutName
    dtype: str
    check: MergeCheck
    dropped: tuple[str, ...]  # modules that were left out
    loss: dict[str, float] | None  # where some were: audio loss on the compared clips, with and without them


@dataclass(frozen=True)
class _Wanted:
    """What was asked for, checked as far as it can be without the weights."""

    layout: str | None
    drop_modules: bool
    dtype: str  # of what is written
    computed_in: str  # the wider one of what is read and what is written
    whisper: str | Path | None
    device: str | None
    show: Progress


def merge(
    run: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    codec: str | Path | None = None,
    data: str | Path | None = None,
    dtype: str | None = None,
    layout: str | None = None,
    drop_modules: bool = False,
    base_bits: int | None = None,
    whisper: str | Path | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge the adapter of a run's or an adapter's folder into its base, and write a checkpoint into `out`.

    `model`, `revision` and `codec` name base and codec where they have moved; `data` is a store to compare on. `dtype`
    (float32, bfloat16) is that of the base's files where not given. `layout` is native, extended (our own: audio
    attention and Whisper have no place in the native class) or original (boson_multimodal's); where not given, native
    for a plain adapter and extended for another. `whisper` names the encoder for the original layout, where it has
    moved. `drop_modules` writes such an adapter as native all the same, without
    these modules. `base_bits` (4, 8) only puts into the card how to load the result so.

    Raises ConfigError, CheckpointError or DataError for wrong input, VerificationError when what was written does not
    give the logits of base + adapter. Nothing is left under `out` then.
    """
    out = Path(out)
    check_new(out)
    _check_options(layout, drop_modules, dtype, base_bits)
    if whisper is not None and layout != "original":
        raise ConfigError("--whisper goes with the original layout: the others do not bring the encoder along")
    source = open_source(run, model=model, revision=revision, codec=codec)
    check_new(out, source.base, source.adapter)
    stored = stored_dtype(source.layout, wanted=dtype)
    narrow = stored == (dtype or stored) == "bfloat16"
    wanted = _Wanted(
        layout=layout,
        drop_modules=drop_modules,
        dtype=dtype or stored,
        computed_in="bfloat16" if narrow else "float32",
        whisper=whisper,
        device=device,
        show=progress or (lambda *_: None),
    )
    with new_folder(out) as folder:
        written = _write(source, folder, wanted, data)
        check, fingerprint = _prove(folder, written, wanted)
        with writing(out):
            describe(source, folder, out.name, written, check, fingerprint, base_bits)
    return MergeResult(out, written.layout, wanted.dtype, check, written.dropped, written.loss)


def _check_options(layout: str | None, drop_modules: bool, dtype: str | None, base_bits: int | None) -> None:
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(f"--layout {layout}: one of {', '.join(LAYOUTS)}")
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"--dtype {dtype}: float32 or bfloat16")
    if drop_modules and layout != "native":
        raise ConfigError("--drop-modules goes with --layout native: name both; the other layouts keep all")
    check_base_bits(base_bits)


def check_base_bits(base_bits: int | None) -> None:
    """Raises ConfigError for a width that bitsandbytes does not have."""
    if base_bits not in (None, 4, 8):
        raise ConfigError(f"--base-bits {base_bits}: 4 or 8")


def _write(source: Source, folder: Path, wanted: _Wanted, data: str | Path | None) -> Written:
    """Load, merge, write. The models are freed when this returns."""
    loaded = load_source(source, wanted.computed_in, wanted.device)
    wanted.show("reading the base", 1, 1)
    clips = held_out(source, loaded, data)
    fingerprint, base = base_fingerprint(loaded.model), logits_of(loaded.model, clips.batch)
    model = load_adapter(loaded.model, source.adapter)
    layout = _layout(wanted, model)
    adapted = logits_of(model, clips.batch)
    dropped: tuple[str, ...] = ()
    loss = None
    if wanted.drop_modules:
        dropped, with_them = summary_of(conditioning_modules(model)), audio_loss(adapted, clips.batch)
        remove_conditioning(loaded.model)
        clips = held_out(source, loaded, data, hears=False)  # as the native class will be asked
        adapted = logits_of(model, clips.batch)
        with model.disable_adapter():
            base = logits_of(model, clips.batch)
        loss = {"with": with_them, "without": audio_loss(adapted, clips.batch)}
    merged = merge_layers(model, getattr(torch, wanted.dtype), wanted.show)
    codec = _codec_folder(loaded.codec)
    tower = loaded.whisper if wanted.whisper is None else load_whisper(wanted.whisper)
    with writing(folder):
        write_checkpoint(folder, merged, layout, base=source.layout, tokenizer=loaded.tokenizer, tower=tower)
        if codec is not None:
            copy_codec(codec, folder)
    wanted.show("writing", 1, 1)
    return Written(
        layout=layout,
        dtype=wanted.dtype,
        held_out=clips,
        base=base,
        adapted=adapted,
        base_fingerprint=fingerprint,
        codec=DEFAULT_CODEC if codec is None else loaded.codec,
        codec_comes_along=codec is not None,
        conditioning=_extensions(merged),
        dropped=dropped,
        loss=loss,
    )


def load_source(source: Source, dtype: str, device: str | None) -> ModelAndTokenizers:
    """Base, tokenizer and codec. Raises CheckpointError when the codec is not the one that the adapter speaks."""
    loaded = load_model_and_tokenizers(
        source.checkpoint, codec=source.codec, dtype=dtype, device=device, revision=source.revision
    )
    trained_with = source.card.get("codec_revision")
    if trained_with not in (None, loaded.audio_tokenizer.revision):
        raise CheckpointError(
            f"the adapter {source.adapter} was trained on codes of another codec (revision {trained_with}) than "
            f"{loaded.codec} (revision {loaded.audio_tokenizer.revision}): name its codec with --codec"
        )
    return loaded


def logits_of(model: Any, batch: Batch) -> Logits:
    """The model's logits at the labelled positions; a model without a projector is not given Whisper features."""
    hears = conditioning_of(model).whisper is not None
    return probe_logits(model, {key: value for key, value in batch.items() if hears or key != "whisper_features"})


def summary_of(modules: list[str]) -> tuple[str, ...]:
    """Module names with `*` for the layer, each once: 28 layers have the same."""
    return tuple(dict.fromkeys(".".join("*" if part.isdecimal() else part for part in m.split(".")) for m in modules))


def _layout(wanted: _Wanted, model: PeftModel) -> LayoutName:
    """Where the merged model goes. Raises ConfigError when modules would be lost, or an option means nothing."""
    modules = summary_of(conditioning_modules(model))
    if not modules:
        if wanted.drop_modules or wanted.layout == "extended":
            option = "--drop-modules" if wanted.drop_modules else "--layout extended"
            raise ConfigError(f"{option} has no effect: this adapter has no module beside those of the native class")
        return "original" if wanted.layout == "original" else "native"
    if wanted.layout == "native" and not wanted.drop_modules:
        raise ConfigError(
            f"the native layout has no place for {', '.join(modules)} of this adapter: they would be lost. Use the "
            "extended layout (`higgstune merge`) or the original one, or --drop-modules to go without them (the card "
            "then says what it costs)"
        )
    return next((name for name in LAYOUTS if name == wanted.layout), "extended")


def _extensions(model: HiggsAudioV2ForConditionalGeneration) -> tuple[str, ...]:
    has = conditioning_of(model)
    names = ["audio self-attention"] if has.audio_attention else []
    if has.whisper is not None:
        names.append(f"a projector for features of the Whisper encoder {public_name(has.whisper.checkpoint)}")
    return tuple(names)


def _codec_folder(codec: str) -> Path | None:
    """The codec to bring along; None for the released one, which a checkpoint without a codec speaks through."""
    return None if codec == DEFAULT_CODEC else fetch(codec, what="codec")


def _prove(folder: Path, written: Written, wanted: _Wanted) -> tuple[MergeCheck, str]:
    """Load what was written and compare; with the fingerprint of its weights. Raises VerificationError."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model = load_model(folder, dtype=wanted.computed_in, device=wanted.device)
    logits = logits_of(model, written.held_out.batch)
    check = check_merged(logits, written.adapted, written.base, dtype=wanted.dtype, held_out=written.held_out)
    wanted.show("comparing", 1, 1)
    return check, base_fingerprint(model)
