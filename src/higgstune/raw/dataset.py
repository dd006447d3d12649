"""A data set on the disk: clips, the manifest that `prepare` reads, what was refused, and tables for people.

clips/talk.wav-00012340.flac   manifest.jsonl   refused.jsonl   review.csv   collect.json
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import soundfile

from higgstune.data.audio import resample
from higgstune.data.splits import VALIDATION
from higgstune.files import NOTHING_KEPT, remove_left, temporary_beside, write_file, writing
from higgstune.raw.choose import Chosen
from higgstune.raw.engines import work_folder
from higgstune.raw.journal import key_of
from higgstune.raw.measure import true_peak_of
from higgstune.raw.names import CACHE, CLIPS, MANIFEST, REFUSED, REVIEW
from higgstune.raw.recipe import CollectRecipe
from higgstune.raw.recording import Decoded, decode
from higgstune.raw.review_table import table_of

WRITTEN = "written.jsonl"
_HIGH_PASS = 20.0  # Hz
_MARGIN = 0.1  # seconds on both sides, which filters need


def write_clips(
    kept: Sequence[Chosen], raw: Path, out: Path, recipe: CollectRecipe, progress: Callable[[int, int], None]
) -> int:
    """Write the clips that are missing, of each recording at once; remove those without an utterance. -> how many.

    A clip is named by its utterance, and `written.jsonl` says what it was made of, so an unchanged one stays. Each line
    is appended once its clip is there.
    """
    folder, state = out / CLIPS, out / CACHE / WRITTEN
    with writing(folder, NOTHING_KEPT):
        folder.mkdir(parents=True, exist_ok=True)
    remove_left(folder.glob("*.tmp"))
    known = _read_written(state)
    wanted = {one.id: _clip_key(one, recipe) for one in kept}
    by_recording: dict[str, list[Chosen]] = defaultdict(list)
    for one in kept:
        if known.get(one.id) != wanted[one.id] or not clip_path(out, one.id).is_file():
            by_recording[one.part.path].append(one)
    missing = sum(map(len, by_recording.values()))
    # Before a clip is written: one that is left by a kill is known, and is not taken for what it was before.
    known |= {one.id: None for members in by_recording.values() for one in members}
    write_file(state, _lines([{name: key} for name, key in known.items()]))
    done = 0
    for path, members in by_recording.items():
        source = raw if raw.is_file() else raw / path
        with work_folder(out / CACHE / "clips") as place:
            decoded = decode(source, place)
            for one in members:
                _write_clip(clip_path(out, one.id), _clip(decoded, one, recipe), recipe.sample_rate)
                with writing(state, "the clips written so far are kept"), open(state, "a", encoding="utf-8") as file:
                    file.write(_lines([{one.id: wanted[one.id]}]))
                done += 1
                progress(done, missing)
    for stale in known.keys() - wanted.keys():
        clip_path(out, stale).unlink(missing_ok=True)
    write_file(state, _lines([{name: key} for name, key in wanted.items()]))
    return missing


def _read_written(state: Path) -> dict[str, str | None]:
    """What each clip was made of; None for one that may be half written. A line that a kill cut off does not count."""
    known: dict[str, str | None] = {}
    if state.is_file():
        with open(state, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    known.update(json.loads(line))
    return known


def clip_path(out: Path, utterance: str) -> Path:
    """Where the clip of an utterance lies."""
    return out / CLIPS / f"{utterance}.flac"


def _clip_key(one: Chosen, recipe: CollectRecipe) -> str:
    utterance = one.utterance
    return key_of(one.part.sha256, utterance.start, utterance.end, one.gain, recipe.sample_rate, recipe.true_peak)


def _clip(decoded: Decoded, one: Chosen, recipe: CollectRecipe) -> np.ndarray:
    """[samples] float32 of an utterance: above 20 Hz, at the rate of clips, at its level."""
    from scipy.signal import butter, sosfiltfilt

    utterance, full = one.utterance, decoded.full
    before = min(_MARGIN, utterance.start)
    samples = full.read(utterance.start - before, utterance.end + _MARGIN)
    steady = sosfiltfilt(butter(1, _HIGH_PASS, "highpass", fs=full.rate, output="sos"), samples)
    sound = resample(steady.astype(np.float32), full.rate, recipe.sample_rate)
    first = round(before * recipe.sample_rate)
    sound = sound[first : first + round(utterance.seconds * recipe.sample_rate)] * np.float32(10 ** (one.gain / 20))
    excess = true_peak_of(sound, recipe.sample_rate) - recipe.true_peak
    return sound if excess <= 0 else sound * np.float32(10 ** (-excess / 20))  # the filters moved the peak


def _write_clip(path: Path, sound: np.ndarray, rate: int) -> None:
    temporary = temporary_beside(path)
    with writing(path, NOTHING_KEPT):
        try:
            soundfile.write(temporary, np.clip(sound, -1, 1), rate, format="FLAC", subtype="PCM_16")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_lists(
    chosen: Sequence[Chosen], out: Path, raw: Path, *, copied: bool, origin: Mapping[str, str] = MappingProxyType({})
) -> None:
    """The manifest, what was refused, and the table for people, each as a whole; `origin` goes into each row."""
    kept = [one for one in chosen if one.refused is None]
    write_file(out / MANIFEST, _lines(_row(one, out, raw, copied=copied) | dict(origin) for one in kept))
    write_file(out / REFUSED, _lines(_refusal(one) for one in chosen if one.refused is not None))
    rows = (_row(one, out, raw, copied=copied) if one.refused is None else _refusal(one) for one in chosen)
    write_file(out / REVIEW, table_of(rows))


def _row(one: Chosen, out: Path, raw: Path, *, copied: bool) -> dict[str, Any]:
    utterance = one.utterance
    audio: dict[str, Any] = {"audio": f"{CLIPS}/{one.id}.flac"}
    if not copied:
        source = raw if raw.is_file() else raw / one.part.path
        audio = {"audio": os.path.relpath(source, out), "start": utterance.start, "end": utterance.end}
    row = {
        "id": one.id,
        **audio,
        "text": one.text,
        "speaker": one.speaker,
        "language": one.part.language,
        "held_out": one.split == VALIDATION,
        "segment": _segment(one),
        "recognised": utterance.recognised,
        "logprob": utterance.logprob,
        "measures": asdict(utterance.measures) | ({"gain": one.gain} if copied else {}),
        "history": [asdict(check) for check in one.checks],
    }
    return {key: value for key, value in row.items() if value is not None}


def _refusal(one: Chosen) -> dict[str, Any]:
    refused = one.refused
    assert refused is not None
    return {
        "id": one.id,
        "reason": refused.what,
        "message": refused.message,
        "text": one.text,
        "speaker": one.speaker,
        "segment": _segment(one),
        "recognised": one.utterance.recognised,
        "measures": asdict(one.utterance.measures),
        "history": [asdict(check) for check in one.checks],
    }


def _segment(one: Chosen) -> dict[str, Any]:
    utterance = one.utterance
    return {
        "recording": one.part.path,
        "start": utterance.start,
        "end": utterance.end,
        "speech": utterance.speech,
    }


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
