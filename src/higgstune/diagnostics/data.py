"""The code store: it opens, its rows can be read, and its codes are of the model's kind."""

from dataclasses import replace

import numpy as np

from higgstune.batch.dataset import Rendering
from higgstune.data.messages import whisper_clips
from higgstune.data.store import CodeStore, Row
from higgstune.data.whisper_features import FOLDER, FeatureStore, read_feature_index
from higgstune.diagnostics.report import Finding
from higgstune.families.base import Spec, WhisperSpec

CHECK = "data"
ROWS = 16  # as many are looked at
MAX_FRAMES = 250  # of a row's target that are looked at: 10 s
_NO_WHISPER_CLIPS = (
    "leave model.whisper out, or give rows a voice: `prepare --references same_speaker` and data.reference: scene, or "
    "conversations with audio in user turns"
)


def first_rows(store: CodeStore, limit: int = ROWS) -> list[Row]:
    """Up to `limit` rows, validation rows first. Raises DataError for a damaged shard."""
    validation, train = store.split("validation"), store.split("train")
    chosen = list(validation[:limit]) if len(validation) else []
    return chosen + list(train[: limit - len(chosen)])


def shortened(row: Row, frames: int = MAX_FRAMES) -> Row:
    """A row with no more than `frames` of its target."""
    return replace(row, codes=row.codes[:frames])


def find_features(
    store: CodeStore, rendering: Rendering, *, named: str | None, shape: WhisperSpec | None
) -> tuple[Rendering, list[Finding]]:
    """The rendering with the store's Whisper features: those of the checkpoint that a recipe has `named`, or of the
    encoder (`shape`) of an adapter or a checkpoint. Without either, audio is read by its codes.

    Raises DataError if those of the recipe are missing.
    """
    if named is None and shape is None:
        return rendering, []
    if not any(whisper_clips(row, rendering.reference) for row in store.contexts()):
        text = f"model.whisper has no effect: no row of {store.folder} has audio for Whisper"
        return rendering, [] if named is None else [Finding(CHECK, "failed", text, _NO_WHISPER_CLIPS)]
    features = _features_of(store, shape) if named is None else FeatureStore.open(store.folder, named)
    if features is None:
        assert shape is not None
        text = f"the store has no features of {shape.checkpoint}: its audio is read by its codes instead"
        advice = f"prepare the data again with --whisper {shape.checkpoint} to examine it as it is used"
        return rendering, [Finding(CHECK, "warning", text, advice)]
    text = f"the store has features of {features.index.checkpoint} for its audio"
    return replace(rendering, features=features), [Finding(CHECK, "ok", text)]


def read_by_codes(row: Row) -> Row:
    """A row as a plain base sees it: all audio by its codes, whatever its conversation says of Whisper."""
    if row.messages is None:
        return row
    messages = [
        {**m, "content": [{k: v for k, v in part.items() if k != "as"} for part in m["content"]]} for m in row.messages
    ]
    return replace(row, messages=messages)


def check_store(store: CodeStore, rows: list[Row], spec: Spec | None) -> list[Finding]:
    """Splits, number of codebooks and range of the codes."""
    counts = {name: len(store.split(name)) for name in ("train", "validation")}
    text = f"{store.folder}: {counts['train']} training rows, {counts['validation']} for validation"
    if not counts["train"]:
        advice = "prepare more recordings, or a smaller --validation-fraction"
        return [Finding(CHECK, "failed", f"{text}: nothing to train on", advice)]
    if problem := _code_problem(rows, spec):
        return [Finding(CHECK, "failed", f"{store.folder}: {problem}", "prepare the data with the checkpoint's codec")]
    if not counts["validation"]:
        advice = "training cannot distinguish learning from memorising: raise --validation-fraction in prepare"
        return [Finding(CHECK, "warning", text, advice)]
    return [Finding(CHECK, "ok", text)]


def _code_problem(rows: list[Row], spec: Spec | None) -> str | None:
    for row in rows:
        if row.codes.ndim != 2 or not len(row.codes):
            return f"row {row.id} has no codes"
        if spec is None:
            continue
        if row.codes.shape[1] != spec.num_codebooks:
            return f"row {row.id} has {row.codes.shape[1]} codebooks, the checkpoint {spec.num_codebooks}"
        if int(np.max(row.codes)) >= spec.codes:
            last = spec.codes - 1
            return f"row {row.id} has the code {np.max(row.codes)}, the checkpoint's last is {last}"
    return None


def _features_of(store: CodeStore, shape: WhisperSpec | None) -> FeatureStore | None:
    """By the encoder's revision: its name may be another one here."""
    if shape is None:
        return None
    path = store.folder / FOLDER / shape.revision / "index.json"
    return FeatureStore(path.parent, read_feature_index(path)) if path.exists() else None
