"""The clips on which a written checkpoint is compared with what it was made from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from higgstune.batch.padded import Batch, PaddedCollator
from higgstune.data.schema import INDEX_NAME
from higgstune.data.store import CodeStore
from higgstune.data.whisper_features import WhisperFeatures
from higgstune.errors import CheckpointError, DataError
from higgstune.model.adapters import adapter_conditioning
from higgstune.model.layout import safetensors_keys
from higgstune.model.load import ModelAndTokenizers
from higgstune.prompt.example import Prompter, SpecialIds
from higgstune.prompt.rows import PLAIN, Rendering, RowExamples, telling_split
from higgstune.sharing.source import Source

CLIPS = 4
_POSITIONS = 256  # audio and text each: as many as `probe_logits` looks at


@dataclass(frozen=True)
class HeldOut:
    """A batch with labelled positions spread over all its clips, and where it is from."""

    batch: Batch
    clips: int
    origin: str


def held_out(
    source: Source, loaded: ModelAndTokenizers, data: str | Path | None = None, *, hears: bool = True
) -> HeldOut:
    """Validation rows of the store `data`, else of the store that the adapter was trained on, else the run's probe.

    Without `hears`, rows of a store are as a model without Whisper sees them: all audio by its codes.

    Raises DataError when the store was encoded by another codec, or when there is neither store nor probe.
    """
    recorded = _recorded_store(source.card)
    if data is not None:
        return _from_store(Path(data), source, loaded, hears)
    if recorded is not None and (recorded / INDEX_NAME).exists():
        return _from_store(recorded, source, loaded, hears)
    probe = source.run / "verify" / "probe.safetensors"
    if probe.exists():
        return _from_probe(probe)
    raise DataError(
        f"there is nothing to compare on: the store {recorded or 'that the adapter was trained on'} is not here, and "
        f"{probe} is not, either; name a prepared store with --data"
    )


def _recorded_store(card: dict[str, Any]) -> Path | None:
    store = card.get("data", {}).get("store") or card.get("recipe", {}).get("data", {}).get("store")
    return Path(store).expanduser() if store else None


def _from_store(folder: Path, source: Source, loaded: ModelAndTokenizers, hears: bool) -> HeldOut:
    store = CodeStore.open(folder)
    if store.info.codec_revision != loaded.audio_tokenizer.revision:
        raise DataError(
            f"{folder} was encoded by the codec {store.info.codec} (revision {store.info.codec_revision}); this "
            f"model speaks through {loaded.codec} (revision {loaded.audio_tokenizer.revision}): name another store "
            "with --data"
        )
    rendering = _rendering(folder, source, hears)
    splits = [("validation", store.split("validation")), ("training", store.split("train"))]
    what, rows = telling_split(splits, rendering)
    if not rows:
        raise DataError(f"{folder} has no rows to compare on: name another store with --data")
    prompter = Prompter(loaded.tokenizer, SpecialIds.from_config(loaded.config))
    examples = RowExamples(rows, prompter, "transcript", rendering)
    collate = PaddedCollator(pad_id=loaded.config.pad_token_id or 0, stream_eos=loaded.config.audio_stream_eos_id)
    clips = min(CLIPS, len(examples))
    return HeldOut(
        _spread(collate([examples[i] for i in range(clips)])), clips, f"{what} clips of the store {folder.name}"
    )


def _rendering(store: Path, source: Source, hears: bool) -> Rendering:
    """As the adapter was trained to see rows. Raises DataError when its Whisper features are not in the store."""
    shape = adapter_conditioning(source.adapter).whisper
    place = source.card.get("recipe", {}).get("data", {}).get("reference", PLAIN.reference)
    if shape is None or not hears:
        return Rendering(place)
    try:
        return Rendering(place, WhisperFeatures.open(store, shape.checkpoint, shape.revision))
    except DataError as error:
        raise DataError(f"{error}; or name another store with --data") from error


def _from_probe(path: Path) -> HeldOut:
    safetensors_keys(path)  # tells a truncated file with a message of its own
    batch = {key: value for key, value in load_file(path).items() if not key.endswith("_logits")}
    if "input_ids" not in batch:
        raise CheckpointError(f"{path} holds no batch: name a prepared store with --data")
    return HeldOut(_spread(batch), len(batch["input_ids"]), "the clips of the run's own verification")


def _spread(batch: Batch) -> Batch:
    """As many labelled positions as are looked at, evenly over the batch: the first ones are all of its first clip."""
    result = dict(batch)
    for kind in ("audio", "text"):
        positions = batch[f"{kind}_positions"]
        taken = torch.linspace(0, len(positions) - 1, min(_POSITIONS, len(positions))).round().long()
        result |= {f"{kind}_positions": positions[taken], f"{kind}_targets": batch[f"{kind}_targets"][taken]}
    return result
