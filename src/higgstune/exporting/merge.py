"""Merge base and adapter into one checkpoint, and verify the checkpoint by loading it.

    load base -> logits -> load adapter -> logits -> merge in float32 -> write -> load the written files -> logits

The last logits must be those of base + adapter, and not those of the base, or nothing is kept.
"""

import gc
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from higgstune.batch.collate import Batch
from higgstune.codec import DEFAULT_CODEC, bundles_codec
from higgstune.codec.whisper_encoder import load_whisper
from higgstune.errors import CheckpointError, ConfigError, VerificationError
from higgstune.exporting.card import AudioLoss, Written, describe, public_name
from higgstune.exporting.layouts import LayoutName, copy_codec, write_checkpoint, write_sampling
from higgstune.exporting.options import Format
from higgstune.exporting.source import Source, stored_dtype
from higgstune.exporting.verify import ExportCheck, Logits, audio_loss, check_merged, held_out
from higgstune.families import family_of
from higgstune.files import NOTHING_KEPT, writing
from higgstune.generate.added import trained_sampling
from higgstune.hub import fetch
from higgstune.model.adapter_folder import base_fingerprint, check_tokenizer, doubts_of_card
from higgstune.model.adapters import load_adapter
from higgstune.model.load import ModelAndTokenizers, load_base, load_model
from higgstune.peft_compat import LoraLayer, PeftModel
from higgstune.progress import Progress
from higgstune.training.verify import probe_logits

_LOG = logging.getLogger(__name__)
FORMAT_OF: dict[LayoutName, Format] = {"native": "native", "extended": "extended", "original": "boson"}
_PROBES = 4  # random inputs on which a layer is compared before and after its merge
_SAME = 1e-4  # of the largest output: a thousand times float32's rounding, a thousandth of a lost update's effect


def merge_layers(model: PeftModel, dtype: torch.dtype, show: Progress) -> Any:
    """The base with the adapter in its weights, in place, in `dtype`.

    Each layer is merged in float32, whatever the base's dtype, and rounded once; one layer at a time, so that the model
    is never in memory in float32. Modules that were trained in full take the place of the base's. Raises
    VerificationError when a merged layer does not compute what layer and adapter did, CheckpointError when the
    adapter holds numbers that are not finite.
    """
    layers = [(name, part) for name, part in model.named_modules() if isinstance(part, LoraLayer)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index, (name, layer) in enumerate(layers):
            _merge_layer(name.removeprefix("base_model.model."), layer, generator)
            layer.get_base_layer().to(dtype)
            show("merging layers", index + 1, len(layers))
    base: Any = model.unload()  # not `merge_and_unload`: the layers are merged already
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
    if not gap <= _SAME * size:  # false for NaN, too
        raise VerificationError(
            f"merging {name} changed what it computes: by {gap:.2e} where its outputs reach {size:.2e}"
        )


@dataclass(frozen=True)
class MergeOptions:
    """How `export` is to merge; checked as far as possible without the weights."""

    format: str | None  # None: native, or extended where native would lose modules
    drop_modules: bool
    dtype: str | None  # of the merged weights; None: that of the base's files
    base_bits: int | None
    whisper: str | Path | None


@dataclass(frozen=True)
class Merged:
    """A merged checkpoint that was verified."""

    format: Format
    dtype: str
    check: ExportCheck
    dropped: tuple[str, ...]
    loss: AudioLoss | None


@dataclass(frozen=True)
class _Dtypes:
    """Of the merged weights, and of the models that are compared: the wider one of what is read and written."""

    stored: str
    computed: str


def merge_into(
    folder: Path, name: str, source: Source, options: MergeOptions, data: str | Path | None, show: Progress
) -> Merged:
    """Merge an adapter into its base and write the checkpoint into the empty `folder`, which will be called `name`.

    `data` is a store to compare on. Raises as `export`.
    """
    read = stored_dtype(source.layout, wanted=options.dtype)
    stored = options.dtype or read
    dtypes = _Dtypes(stored, "bfloat16" if read == stored == "bfloat16" else "float32")
    written = _write(source, folder, options, dtypes, data, show)
    check, fingerprint = _prove(folder, written, dtypes, source.base.device)
    show("comparing", 1, 1)
    with writing(folder, NOTHING_KEPT):
        describe(source, folder, name, written, check, fingerprint, options.base_bits)
    return Merged(FORMAT_OF[written.layout], dtypes.stored, check, written.dropped, written.loss)


def _write(
    source: Source, folder: Path, options: MergeOptions, dtypes: _Dtypes, data: str | Path | None, show: Progress
) -> Written:
    """Load, merge, write. The models are freed when this returns."""
    loaded = load_source(source, dtypes.computed)
    show("reading the base", 1, 1)
    clips = held_out(source, loaded, data)
    fingerprint, base = base_fingerprint(loaded.model), logits_of(loaded.model, clips.batch)
    model = load_adapter(loaded.model, source.adapter)
    layout = _layout(options, model)
    adapted = logits_of(model, clips.batch)
    dropped: tuple[str, ...] = ()
    loss = None
    if options.drop_modules:
        dropped, with_modules = summary_of(family_of(model).extensions.modules(model)), audio_loss(adapted, clips.batch)
        loaded.family.extensions.remove(loaded.model)
        clips = held_out(source, loaded, data, with_whisper=False)  # as the native class sees prompts
        adapted = logits_of(model, clips.batch)
        with model.disable_adapter():
            base = logits_of(model, clips.batch)
        loss = AudioLoss(with_modules, audio_loss(adapted, clips.batch))
    merged = merge_layers(model, getattr(torch, dtypes.stored), show)
    codec = _codec_folder(loaded.codec)
    tower = loaded.whisper if options.whisper is None else load_whisper(options.whisper)
    with writing(folder, NOTHING_KEPT):
        write_checkpoint(folder, merged, layout, base=source.layout, tokenizer=loaded.tokenizer, tower=tower)
        write_sampling(folder, trained_sampling(source.adapter, folder))
        if codec is not None:
            copy_codec(codec, folder)
    show("writing", 1, 1)
    return Written(
        layout=layout,
        dtype=dtypes.stored,
        held_out=clips,
        base=base,
        adapted=adapted,
        base_fingerprint=fingerprint,
        codec=loaded.codec,
        has_codec=codec is not None,
        conditioning=_extensions(merged),
        dropped=dropped,
        loss=loss,
    )


def load_source(source: Source, dtype: str) -> ModelAndTokenizers:
    """Base, tokenizer and codec. Raises CheckpointError when the adapter was trained on codes of another codec."""
    loaded = load_base(replace(source.base, dtype=dtype))
    trained_with = source.card.get("codec_revision")
    if trained_with not in (None, loaded.audio_tokenizer.revision):
        raise CheckpointError(
            f"the adapter {source.adapter} was trained on codes of another codec (revision {trained_with}) than "
            f"{loaded.codec} (revision {loaded.audio_tokenizer.revision}): name its codec with --codec"
        )
    check_tokenizer(source.adapter, source.layout.folder)
    for doubt in doubts_of_card(source.adapter, source.layout.folder):
        _LOG.warning("%s", doubt)
    return loaded


def logits_of(model: Any, batch: Batch) -> Logits:
    """The model's logits at the labelled positions; a model without a projector does not get Whisper features."""
    uses_whisper = family_of(model).extensions.of(model).whisper is not None
    inputs = {key: value for key, value in batch.items() if uses_whisper or key != "whisper_features"}
    return probe_logits(model, inputs)


def summary_of(modules: list[str]) -> tuple[str, ...]:
    """Module names with `*` for the layer, each once: 28 layers have the same."""
    return tuple(dict.fromkeys(".".join("*" if part.isdecimal() else part for part in m.split(".")) for m in modules))


def _layout(options: MergeOptions, model: PeftModel) -> LayoutName:
    """The layout of the merged model. Raises ConfigError when modules would be lost, or an option has no effect."""
    chosen = next((layout for layout, format in FORMAT_OF.items() if format == options.format), None)
    modules = summary_of(family_of(model).extensions.modules(model))
    if not modules:
        if options.drop_modules or chosen == "extended":
            option = "--drop-modules" if options.drop_modules else "--format extended"
            raise ConfigError(f"{option} has no effect: the native class has all modules of this adapter")
        return chosen or "native"
    if options.drop_modules:
        return "native"
    if chosen == "native":
        raise ConfigError(
            f"the native class has no place for {', '.join(modules)} of this adapter, which would be lost: use "
            "--format extended or --format boson, or add --drop-modules to do without them (the card then says what "
            "that costs)"
        )
    if chosen is None and options.base_bits is not None:
        raise ConfigError("--base-bits has no effect: only Higgstune loads the layout that this adapter needs")
    return chosen or "extended"


def _extensions(model: Any) -> tuple[str, ...]:
    """In words, for the card."""
    has = family_of(model).extensions.of(model)
    names = ["audio self-attention"] if has.audio_attention else []
    if has.whisper is not None:
        names.append(f"a projector for features of the Whisper encoder {public_name(has.whisper.checkpoint)}")
    return tuple(names)


def _codec_folder(codec: str) -> Path | None:
    """The codec to include; None for the released one, which a checkpoint without a codec uses, and for one that the
    checkpoint's own weight files hold.
    """
    folder = None if codec == DEFAULT_CODEC else fetch(codec, what="codec")
    return None if folder is None or bundles_codec(folder) else folder


def _prove(folder: Path, written: Written, dtypes: _Dtypes, device: Any) -> tuple[ExportCheck, str]:
    """Load the written checkpoint and compare; with the fingerprint of its weights. Raises VerificationError."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model = load_model(folder, dtype=dtypes.computed, device=device)
    logits = logits_of(model, written.held_out.batch)
    check = check_merged(logits, written.adapted, written.base, dtype=dtypes.stored, held_out=written.held_out)
    return check, base_fingerprint(model)
