"""The clips on which a written checkpoint is compared with what it was made from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from higgstune.batch.collate import Batch, PaddedCollator
from higgstune.batch.dataset import PLAIN, Rendering, RowExamples, probe_rows
from higgstune.checkpoint_files import safetensors_keys
from higgstune.data.shard_reader import INDEX_NAME
from higgstune.data.store import CodeStore
from higgstune.data.whisper_features import FeatureStore
from higgstune.errors import CheckpointError, DataError, VerificationError
from higgstune.exporting.source import Source
from higgstune.kernels.loss import IGNORE
from higgstune.model.adapter_folder import adapter_conditioning
from higgstune.model.load import ModelAndTokenizers
from higgstune.training.verify import MARGIN
from higgstune.training.verify import TOLERANCE as RELOAD_TOLERANCE

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
    what, rows = probe_rows(splits, rendering)
    if not rows:
        raise DataError(f"{folder} has no rows to compare on: name another store with --data")
    prompter = loaded.prompter
    examples = RowExamples(rows, prompter, "transcript", rendering)
    collate = PaddedCollator.of(loaded.spec)
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
        return Rendering(place, FeatureStore.open(store, shape.checkpoint, shape.revision))
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


Logits = Mapping[str, Tensor]
# Of the largest difference of a logit (float32), of the mean difference (bfloat16, where each weight is rounded once
# more, to 1 part in 256). What was measured, and where: docs/sharing.md.
TOLERANCE = {"float32": 5e-4, "bfloat16": 0.2}
# An adapter moves the base's logits by more than this, or training would not have let it pass.
MOVES = {dtype: MARGIN * tolerance for dtype, tolerance in RELOAD_TOLERANCE.items()}
NEARER = 2  # the merged model is this many times nearer to base + adapter than to the base


@dataclass(frozen=True)
class MergeCheck:
    """What was compared, and how it came out; differences are those of `TOLERANCE`'s dtype."""

    dtype: str
    tolerance: float
    from_adapter: float  # |merged - (base + adapter)|
    from_base: float  # |merged - base|
    clips: int
    origin: str  # of the clips


def check_merged(merged: Logits, adapted: Logits, base: Logits, *, dtype: str, held_out: HeldOut) -> MergeCheck:
    """Compare logits on the same positions. Raises VerificationError unless merged is adapted, and not base."""
    result = MergeCheck(
        dtype=dtype,
        tolerance=TOLERANCE[dtype],
        from_adapter=difference(merged, adapted, dtype),
        from_base=difference(merged, base, dtype),
        clips=held_out.clips,
        origin=held_out.origin,
    )
    what = "largest" if dtype == "float32" else "mean"
    if not result.from_base > MOVES[dtype]:
        raise VerificationError(
            f"the merged model hardly differs from the base: its logits by {result.from_base:.2e} ({what} difference, "
            f"{dtype}), which is not more than {MOVES[dtype]:.0e}: the adapter is not in it, or too weak for {dtype}"
            + ("; --dtype float32 keeps a weak one" if dtype == "bfloat16" else "")
        )
    if not result.from_adapter <= result.tolerance:
        raise VerificationError(
            f"the merged model is not the base with its adapter: logits differ by {result.from_adapter:.2e} ({what} "
            f"difference, {dtype}), more than {result.tolerance:.0e}; it was not kept"
        )
    if not NEARER * result.from_adapter <= result.from_base:
        raise VerificationError(
            f"the merged model differs from the base with its adapter by {result.from_adapter:.2e} and from the base "
            f"alone by {result.from_base:.2e} ({what} difference, {dtype}): rounding drowns this adapter; "
            "--dtype float32 keeps it"
        )
    return result


def difference(a: Logits, b: Logits, dtype: str) -> float:
    """The largest (float32) or mean (bfloat16) difference, of audio or text logits, whichever is larger."""
    gaps = [(a[key] - b[key]).abs() for key in a if a[key].numel()]
    return max((gap.max() if dtype == "float32" else gap.mean()).item() for gap in gaps)


def audio_loss(logits: Logits, batch: Batch) -> float:
    """Mean cross entropy of the labelled cells, in nats: audio logits [M, K * V], targets [M, K]."""
    targets = batch["audio_targets"]
    cells = logits["audio_logits"].unflatten(-1, (targets.shape[1], -1)).flatten(0, 1)
    return F.cross_entropy(cells, targets.flatten(), ignore_index=IGNORE).item()
