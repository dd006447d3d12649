"""Whose voice a clip has: similarities to recordings of the speakers, and which speakers are confused."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from higgstune.errors import WorkError
from higgstune.evaluation.clips import Clip
from higgstune.evaluation.judges.base import SpeakerJudge
from higgstune.metrics import Confusion

Rows = Sequence[dict[str, Any]]
Voices = Mapping[str, Sequence[Path]]


def voice_of(clip: Clip, voices: Voices) -> str | None:
    """The voice that a clip is compared with: its speaker's or, for a clip that names none, the only voice there is.

    A clip that names no speaker but has a reference imitates the reference, and none of the voices.
    """
    if clip.speaker is not None:
        return clip.speaker if clip.speaker in voices else None
    return next(iter(voices)) if len(voices) == 1 and clip.reference is None else None


def add_reference_similarity(clips: Sequence[Clip], rows: Rows, judge: SpeakerJudge) -> None:
    """Fill in `similarity_reference` (and `similarity_reference MODEL` for each model) for clips with a reference."""
    by_reference = defaultdict(list)
    for index, clip in enumerate(clips):
        if clip.reference is not None:
            by_reference[clip.reference].append(index)
    for reference, chosen in by_reference.items():
        _fill(rows, chosen, "similarity_reference", _similarities(judge, [reference], [clips[i].file for i in chosen]))


def add_similarity(clips: Sequence[Clip], rows: Rows, voices: Voices, judge: SpeakerJudge) -> Confusion | None:
    """Fill in `similarity` (and `similarity MODEL`) for clips with a known voice, and `right_speaker` if there are two
    voices or more.

    The judge is called once for each voice. Only its main model decides who is nearest.
    """
    chosen = [index for index, clip in enumerate(clips) if voice_of(clip, voices) is not None]
    if not chosen:
        return None
    owners = [str(voice_of(clips[index], voices)) for index in chosen]
    with_clips = [voice for voice in voices if voice in owners]
    names = with_clips + [voice for voice in voices if voice not in owners]
    files = [clips[index].file for index in chosen]
    found = [_similarities(judge, voices[name], files) for name in names]
    own = [names.index(owner) for owner in owners]
    models = list(found[0])
    _fill(rows, chosen, "similarity", {m: [found[at][m][row] for row, at in enumerate(own)] for m in models})
    if len(names) < 2:
        return None
    table = np.array([by_model[models[0]] for by_model in found])  # [voices, clips]
    nearest = table.argmax(axis=0)
    for row, index in enumerate(chosen):
        as_near = table[:, row] >= table[own[row], row]
        rows[index]["right_speaker"] = int(as_near.sum() == 1)  # a tie is not right
    return _confusion(names, len(with_clips), table, nearest, np.array(own))


def _confusion(names: list[str], rows: int, table: np.ndarray, nearest: np.ndarray, own: np.ndarray) -> Confusion:
    means = [table[:, own == row].mean(axis=1).round(6).tolist() for row in range(rows)]
    counts = [np.bincount(nearest[own == row], minlength=len(names)).tolist() for row in range(rows)]
    return Confusion(names, means, counts)


def _similarities(judge: SpeakerJudge, references: Sequence[Path], files: Sequence[Path]) -> dict[str, list[float]]:
    found = judge.similarities(references, files)
    check_answers(judge.name, found, len(files))
    return found


def check_answers(judge: str, found: Mapping[str, Sequence[float]], files: int) -> None:
    """Raises WorkError if a judge did not give one finite number for each file, by at least one model."""
    if not found:
        raise WorkError(f"the judge {judge} gave no numbers")
    for model, values in found.items():
        if len(values) != files or not np.isfinite(values).all():
            raise WorkError(f"the judge {judge} ({model}) did not give one finite number for each of {files} files")


def _fill(rows: Rows, chosen: Sequence[int], column: str, by_model: Mapping[str, Sequence[float]]) -> None:
    fill(rows, chosen, column, next(iter(by_model.values())))
    for model, values in by_model.items():
        fill(rows, chosen, f"{column} {model}", values)


def fill(rows: Rows, chosen: Sequence[int], column: str, values: Sequence[float]) -> None:
    """Put the values of the chosen clips into a column of their rows."""
    for index, value in zip(chosen, values, strict=True):
        rows[index][column] = round(float(value), 6)
