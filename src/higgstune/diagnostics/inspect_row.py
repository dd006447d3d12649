"""One row as a training example: `inspect --tokens`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from higgstune.batch.dataset import Rendering, row_example
from higgstune.config.recipe import ModelSettings
from higgstune.data.entry import stored_measures
from higgstune.data.measures import Measures
from higgstune.data.messages import ReferencePlace
from higgstune.data.overview import row_index
from higgstune.data.store import CodeStore, Row
from higgstune.data.whisper_features import FeatureStore
from higgstune.errors import CheckpointError, ConfigError, DataError
from higgstune.families import check_store_family, family_in
from higgstune.families.base import Example, Prompter, TextTargets
from higgstune.hub import fetch
from higgstune.kernels import IGNORE
from higgstune.model.tokenizer import load_prompter


@dataclass(frozen=True)
class RowInspection:
    """One row as an example. Positions count from 0; a label at position p is predicted by position p - 1."""

    id: str
    split: str
    prompt: str  # exactly as it is tokenized; each audio is one placeholder
    tokens: int
    text_tokens: int
    feature_positions: int  # tokens with Whisper features
    audio_rows: int  # delayed frames of all audio in the prompt
    frames: int  # of the target
    seconds: float
    text_labels: list[tuple[int, int, str]]  # position, token id, token
    audio_labels: list[tuple[int, list[int | None]]]  # position of an audio frame, its labels (None: ignored)
    audio_label_entries: int
    measures: Measures | None  # None: not measured, as an earlier version stored the row


def inspect_row(
    store: str | Path,
    row: int | str,
    *,
    model: str | Path | None = None,
    text_targets: TextTargets = "transcript",
    reference: ReferencePlace = "turn",
    whisper: str | None = None,
) -> RowInspection:
    """A row of a code store, by number (train rows first) or id, as a stage with `text_targets` trains on it.

    `reference` and `whisper` are the recipe's `data.reference` and `model.whisper`.

    The tokenizer is that of `model`; without it, of the checkpoint that the store was prepared for.
    Raises DataError, ConfigError, CheckpointError.
    """
    for what, value, known in (("text_targets", text_targets, TextTargets), ("reference", reference, ReferencePlace)):
        if value not in get_args(known):
            raise ConfigError(f"{what} is {value!r}: use one of {', '.join(get_args(known))}")
    opened = CodeStore.open(store)
    index = row_index(opened, row)
    name = model or opened.info.settings.get("model") or ModelSettings.model_fields["checkpoint"].default
    try:
        prompter = load_prompter(name)
        info = family_in(fetch(name, what="checkpoint", weights=False))[0]
        check_store_family(opened.folder, opened.info.model_type, info, name)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nName the checkpoint whose tokenizer reads the text with --model") from error
    found = opened[index]
    try:
        features = None if whisper is None else FeatureStore.open(opened.folder, whisper)
        example = row_example(prompter, found, text_targets, Rendering(reference, features))
    except DataError as error:
        raise DataError(f"{store}, row {index} ({found.id}): {error}") from error
    measures = stored_measures(opened.metadata.slice(index, 1).to_pylist()[0])
    return _inspection(found, example, prompter, measures)


def _inspection(row: Row, example: Example, prompter: Prompter, measures: Measures | None) -> RowInspection:
    text = np.flatnonzero(example.text_labels != IGNORE)
    tokens = [(int(p), int(example.text_labels[p])) for p in text]
    rows = np.flatnonzero(example.audio_mask)
    features = 0 if example.whisper_features is None else len(example.whisper_features)
    labelled = [
        (int(position), [None if label == IGNORE else int(label) for label in labels])
        for position, labels in zip(rows, example.audio_labels, strict=True)
        if (labels != IGNORE).any()
    ]
    return RowInspection(
        id=row.id,
        split=row.split,
        prompt=example.prompt,
        tokens=len(example),
        text_tokens=int((~example.audio_mask).sum()) - features,
        feature_positions=features,
        audio_rows=len(rows),
        frames=len(row.codes),
        seconds=row.duration,
        text_labels=[(position, token, prompter.tokenizer.decode([token])) for position, token in tokens],
        audio_labels=labelled,
        audio_label_entries=int((example.audio_labels != IGNORE).sum()),
        measures=measures,
    )


def label_table(inspection: RowInspection, *, head: int = 12, tail: int = 10) -> list[list[Any]]:
    """Table rows with the position and one label per codebook (`.`: no label); rows in the middle are left out."""
    rows: list[list[Any]] = [
        [position, *("." if label is None else label for label in labels)]
        for position, labels in inspection.audio_labels
    ]
    if len(rows) <= head + tail:
        return rows
    return [*rows[:head], ["..."] * len(rows[0]), *rows[-tail:]]
