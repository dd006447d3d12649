"""The comparison of an exported model with base + adapter: on which clips, and within which tolerance."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from higgstune.batch.collate import Batch, PaddedCollator
from higgstune.batch.dataset import PLAIN, Rendering, RowExamples, probe_rows
from higgstune.checkpoint_files import safetensors_keys
from higgstune.data.store import CodeStore
from higgstune.data.whisper_features import FeatureStore
from higgstune.errors import CheckpointError, DataError, VerificationError
from higgstune.exporting.source import Source
from higgstune.families import check_store_family
from higgstune.inputs import INDEX_NAME
from higgstune.kernels import IGNORE
from higgstune.model.adapter_folder import adapter_conditioning, stores_of_card
from higgstune.model.load import ModelAndTokenizers
from higgstune.training.verify import MARGIN, difference
from higgstune.training.verify import TOLERANCE as RELOAD_TOLERANCE

CLIPS = 4
_POSITIONS = 256  # labelled positions, audio and text each: as many as `probe_logits` takes


@dataclass(frozen=True)
class HeldOut:
    """A batch with labelled positions spread over all its clips, and the origin of the clips."""

    batch: Batch
    clips: int
    origin: str


def held_out(
    source: Source, loaded: ModelAndTokenizers, data: str | Path | None = None, *, with_whisper: bool = True
) -> HeldOut:
    """Validation rows of the store `data`, else of the store that the adapter was trained on, else the run's probe.

    Without `with_whisper`, rows of a store are rendered for a model without Whisper: all audio as codes.

    Raises DataError when the store was encoded by another codec, or when there is neither store nor probe.
    """
    places = stores_of_card(source.card)
    recorded = next((place for place in places if (place / INDEX_NAME).exists()), None)
    if data is not None:
        return _from_store(Path(data), source, loaded, with_whisper)
    if recorded is not None:
        return _from_store(recorded, source, loaded, with_whisper)
    probe = source.run / "verify" / "probe.safetensors"
    if probe.exists():
        return _from_probe(probe)
    store = places[0] if places else "that the adapter was trained on"
    raise DataError(
        f"no clips to compare on: neither the store {store} nor {probe} exists; name a prepared store with --data"
    )


def _from_store(folder: Path, source: Source, loaded: ModelAndTokenizers, with_whisper: bool) -> HeldOut:
    store = CodeStore.open(folder)
    check_store_family(folder, store.info.model_type, loaded.family.info, loaded.checkpoint)
    if store.info.codec_revision != loaded.audio_tokenizer.revision:
        raise DataError(
            f"{folder} was encoded by the codec {store.info.codec} (revision {store.info.codec_revision}); this "
            f"model uses {loaded.codec} (revision {loaded.audio_tokenizer.revision}): name another store with --data"
        )
    rendering = _rendering(folder, source, with_whisper)
    splits = [("validation", store.split("validation")), ("training", store.split("train"))]
    what, rows = probe_rows(splits, rendering)
    if not rows:
        raise DataError(f"{folder} has no rows to compare on: name another store with --data")
    examples = RowExamples(rows, loaded.prompter, loaded.family.info.text_targets[0], rendering)
    collate = PaddedCollator.of(loaded.spec)
    clips = min(CLIPS, len(examples))
    return HeldOut(
        _spread(collate([examples[i] for i in range(clips)])), clips, f"{what} clips of the store {folder.name}"
    )


def _rendering(store: Path, source: Source, with_whisper: bool) -> Rendering:
    """How the adapter's training rendered rows. Raises DataError when its Whisper features are not in the store."""
    shape = adapter_conditioning(source.adapter).whisper
    place = source.card.get("recipe", {}).get("data", {}).get("reference", PLAIN.reference)
    if shape is None or not with_whisper:
        return Rendering(place)
    try:
        return Rendering(place, FeatureStore.open(store, shape.checkpoint, shape.revision))
    except DataError as error:
        raise DataError(f"{error}; or name another store with --data") from error


def _from_probe(path: Path) -> HeldOut:
    safetensors_keys(path)  # a truncated file has a message of its own
    batch = {key: value for key, value in load_file(path).items() if not key.endswith("_logits")}
    if "input_ids" not in batch:
        raise CheckpointError(f"{path} holds no batch: name a prepared store with --data")
    return HeldOut(_spread(batch), len(batch["input_ids"]), "the clips of the run's own verification")


def _spread(batch: Batch) -> Batch:
    """At most `_POSITIONS` labelled positions of each kind, evenly over the batch: the first are all of one clip."""
    result = dict(batch)
    for kind in ("audio", "text"):
        positions = batch[f"{kind}_positions"]
        taken = torch.linspace(0, len(positions) - 1, min(_POSITIONS, len(positions))).round().long()
        result |= {f"{kind}_positions": positions[taken], f"{kind}_targets": batch[f"{kind}_targets"][taken]}
    return result


Logits = Mapping[str, Tensor]
# For the largest difference of a logit (float32) or the mean difference (bfloat16, where each weight is rounded once
# more, to 1 part in 256). docs/sharing.md has the measurements.
TOLERANCE = {"float32": 5e-4, "bfloat16": 0.2}
# An adapter changes the base's logits by more than this: training refuses a weaker one.
MIN_CHANGE = {dtype: MARGIN * tolerance for dtype, tolerance in RELOAD_TOLERANCE.items()}
MIN_RATIO = 2  # the merged model must be this many times nearer to base + adapter than to the base


@dataclass(frozen=True)
class ExportCheck:
    """The result of the comparison; differences are the largest (float32) or mean (bfloat16) one of a logit."""

    dtype: str
    tolerance: float
    from_adapter: float  # |merged - (base + adapter)|
    from_base: float  # |merged - base|
    clips: int
    origin: str  # of the clips

    @property
    def summary(self) -> str:
        """In one line, for people."""
        kind = "at most" if self.dtype == "float32" else "on average"
        base = f"by {self.from_base:.2g} from the base's"
        clips = f"on {self.clips} {self.origin}"
        if not self.tolerance:
            return f"its logits differ {base}, {kind}, {clips}"
        return (
            f"loaded from disk, it gives the outputs of base + adapter: logits differ {kind} by "
            f"{self.from_adapter:.2g} ({self.tolerance:g} is allowed), and {base}, {clips}"
        )


def check_merged(merged: Logits, adapted: Logits, base: Logits, *, dtype: str, held_out: HeldOut) -> ExportCheck:
    """Compare logits on the same positions. Raises VerificationError unless merged is adapted, and not base."""
    result = ExportCheck(
        dtype=dtype,
        tolerance=TOLERANCE[dtype],
        from_adapter=difference(merged, adapted, dtype),
        from_base=difference(merged, base, dtype),
        clips=held_out.clips,
        origin=held_out.origin,
    )
    what = "largest" if dtype == "float32" else "mean"
    if not result.from_base > MIN_CHANGE[dtype]:
        raise VerificationError(
            f"the merged model hardly differs from the base: its logits by {result.from_base:.2e} ({what} difference, "
            f"{dtype}), not more than {MIN_CHANGE[dtype]:.0e}: the adapter is not in it, or too weak for {dtype}"
            + ("; --dtype float32 preserves a weak one" if dtype == "bfloat16" else "")
        )
    if not result.from_adapter <= result.tolerance:
        raise VerificationError(
            f"the merged model is not the base with its adapter: logits differ by {result.from_adapter:.2e} ({what} "
            f"difference, {dtype}), more than {result.tolerance:.0e}; it was not kept"
        )
    if not MIN_RATIO * result.from_adapter <= result.from_base:
        raise VerificationError(
            f"the merged model differs from the base with its adapter by {result.from_adapter:.2e} and from the base "
            f"alone by {result.from_base:.2e} ({what} difference, {dtype}): rounding drowns this adapter; "
            "--dtype float32 preserves it"
        )
    return result


def audio_loss(logits: Logits, batch: Batch) -> float:
    """Mean cross entropy of the label entries, in nats: audio logits [M, K * V], targets [M, K]."""
    targets = batch["audio_targets"]
    entries = logits["audio_logits"].unflatten(-1, (targets.shape[1], -1)).flatten(0, 1)
    return F.cross_entropy(entries, targets.flatten(), ignore_index=IGNORE).item()
