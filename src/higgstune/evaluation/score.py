"""All metrics of a set of clips, and the comparison of two systems that spoke the same texts.

clips -> rows (one per clip: columns of `METRICS`) -> sums -> estimates
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from higgstune.data.audio import read_audio
from higgstune.errors import DataError
from higgstune.evaluation.asr_errors import add_errors, add_leaks
from higgstune.evaluation.clips import Clip
from higgstune.evaluation.judges.base import Judges, QualityJudge
from higgstune.evaluation.prosody import PITCH_JUDGE, Prosody, against, average, prosody
from higgstune.evaluation.statistics import difference_interval, holm, permutation_p, ratio, ratio_interval
from higgstune.evaluation.voices import Voices, add_reference_similarity, add_similarity, check_answers, fill, voice_of
from higgstune.evaluation.waveform_checks import examine, find_loop, pace
from higgstune.generate.chunks import expected_seconds
from higgstune.metrics import METRICS, Confusion, Difference, Estimate, Evaluation, Metric
from higgstune.progress import Progress, silent

Rows = list[dict[str, Any]]
MAX_RECORDINGS = 32  # of a speaker, from which their usual prosody is computed
_NO_ASR = "no ASR was named (--asr)"
_NO_SPEAKER = "no speaker judge was named (--speaker-judge)"


def score(
    clips: Sequence[Clip],
    judges: Judges,
    voices: Mapping[str, Sequence[Path]] | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure everything that can be measured of these clips; `not_measured` gives the reasons for the rest.

    `voices` are recordings of the speakers, by name. The same clips, judges and seed give the same numbers. Raises
    DataError for a clip that cannot be read, WorkError if a judge fails.
    """
    report = progress or silent
    voices = dict(voices or {})
    rows: Rows = [_row(clip) for clip in clips]
    _add_waveform_measures(clips, rows, voices, report)
    confusion = _add_judged(clips, rows, judges, voices, report)
    summary = {metric.name: found for metric in METRICS if (found := _estimate(metric, rows, seed)) is not None}
    missing = {m.name: _why(m.name, clips, judges, voices) for m in METRICS if m.name not in summary}
    return Evaluation(_names(judges), summary, missing, rows, confusion)


def compare(a: Evaluation, b: Evaluation, *, seed: int = 0) -> dict[str, Difference]:
    """Each metric of b minus that of a, on the clips (by id) that both measured.

    Raises DataError if no clip is in both, if an id has two texts, or if the judges differ.
    """
    in_a, in_b = ({row["id"]: row for row in evaluation.clips} for evaluation in (a, b))
    pairs = [(in_a[name], in_b[name]) for name in in_a if name in in_b]
    if not pairs:
        raise DataError("no clip is in both evaluations: compare systems that spoke the same set")
    for row, other in pairs:
        if row["text"] != other["text"]:
            raise DataError(f"clip {row['id']} has two texts: {row['text']!r} and {other['text']!r}")
    for role in a.judges.keys() & b.judges.keys():
        if a.judges[role] != b.judges[role]:
            raise DataError(f"two judges ({role}): {a.judges[role]} and {b.judges[role]}: evaluate both with one")
    each = {metric.name: _difference(metric, pairs, seed) for metric in METRICS}
    found = {name: difference for name, difference in each.items() if difference is not None}
    varying = [name for name, difference in found.items() if (difference.low, difference.high) != (0, 0)]
    corrected = dict(zip(varying, holm([found[name].p for name in varying]), strict=True))
    return {name: replace(difference, p_holm=corrected.get(name, 1.0)) for name, difference in found.items()}


def _row(clip: Clip) -> dict[str, Any]:
    known = {"language": clip.language, "speaker": clip.speaker, "seed": clip.seed}
    return {"id": clip.id, "text": clip.text} | {key: value for key, value in known.items() if value is not None}


def _add_waveform_measures(clips: Sequence[Clip], rows: Rows, voices: Voices, report: Progress) -> None:
    """Fill in what needs the waveforms alone: health, loops, prosody."""
    usual = _usual_prosody(clips, voices)
    lengths, paces = _spoken_lengths(clips)
    for done, (clip, row) in enumerate(zip(clips, rows, strict=True)):
        report("measuring waveforms", done, len(clips))
        waveform, rate = _read(clip.file)
        if clip.recording is not None:
            expected = lengths[clip.recording]
        else:
            expected = paces.get(clip.speaker, 1.0) * expected_seconds(clip.text)
        health = examine(waveform, rate, clip.text, hit_cap=clip.hit_cap, expected=expected)
        row |= {name: _number(value) for name, value in vars(health).items() if value is not None}
        loop = find_loop(waveform, rate)
        row["loops"] = int(loop is not None)
        if loop is not None:
            row |= {"loop_start": loop.start, "loop_period": loop.period}
        speaker, own = usual.get(voice_of(clip, voices) or ""), prosody(waveform, rate)
        if speaker is not None and own is not None:
            row |= {name: _number(value) for name, value in against(own, speaker).items()}
    report("measuring waveforms", len(clips), len(clips))


def _spoken_lengths(clips: Sequence[Clip]) -> tuple[dict[Path, float], dict[str | None, float]]:
    """The length of every recording in seconds, and each speaker's pace over all recordings with a known text."""
    lengths: dict[Path, float] = {}
    spoken: dict[str | None, dict[Path, str]] = defaultdict(dict)
    for clip in clips:
        for file, text in ((clip.recording, clip.text), (clip.reference, clip.reference_text)):
            if file is not None and text is not None:
                spoken[clip.speaker][file] = text
    for file in {file for files in spoken.values() for file in files}:
        waveform, rate = _read(file)
        lengths[file] = len(waveform) / rate
    paces = {who: pace((lengths[file], text) for file, text in files.items()) for who, files in spoken.items()}
    return lengths, {who: value for who, value in paces.items() if value}


def _usual_prosody(clips: Sequence[Clip], voices: Voices) -> dict[str, Prosody]:
    """The usual prosody of the clips' speakers, from recordings spread evenly over all that each of them has."""
    usual = {}
    for name in sorted({voice for clip in clips if (voice := voice_of(clip, voices)) is not None}):
        files = voices[name]
        chosen = [files[len(files) * i // MAX_RECORDINGS] for i in range(MAX_RECORDINGS)]
        measured = [found for file in dict.fromkeys(chosen) if (found := prosody(*_read(file))) is not None]
        if measured:
            usual[name] = average(measured)
    return usual


def _add_judged(
    clips: Sequence[Clip], rows: Rows, judges: Judges, voices: Voices, report: Progress
) -> Confusion | None:
    """Fill in the judges' columns, and return which speakers are confused."""
    confusion = None
    if judges.asr is not None:
        report("transcribing", 0, len(clips))
        add_errors(clips, rows, judges.asr)
        add_leaks(clips, rows, judges.asr)
        report("transcribing", len(clips), len(clips))
    if judges.speaker is not None:
        report("comparing voices", 0, len(clips))
        confusion = add_similarity(clips, rows, voices, judges.speaker)
        add_reference_similarity(clips, rows, judges.speaker)
        report("comparing voices", len(clips), len(clips))
    if judges.quality is not None:
        report("rating", 0, len(clips))
        _add_naturalness(clips, rows, judges.quality)
        report("rating", len(clips), len(clips))
    return confusion


def _add_naturalness(clips: Sequence[Clip], rows: Rows, judge: QualityJudge) -> None:
    found = judge.rate([clip.file for clip in clips])
    check_answers(judge.name, found, len(clips))
    everyone = range(len(clips))
    fill(rows, everyone, "naturalness", next(iter(found.values())))
    for model, values in found.items():
        fill(rows, everyone, f"naturalness {model}", values)


def _names(judges: Judges) -> dict[str, str]:
    roles = {"asr": judges.asr, "speaker": judges.speaker, "naturalness": judges.quality}
    return {role: judge.name for role, judge in roles.items() if judge is not None} | {"pitch": PITCH_JUDGE}


def _sums(metric: Metric, rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators, each [clips]."""
    tops = [float(row[metric.column]) for row in rows]
    bottoms = [1.0 if metric.per is None else float(row[metric.per]) for row in rows]
    return np.array(tops), np.array(bottoms)


def _estimate(metric: Metric, rows: Rows, seed: int) -> Estimate | None:
    """None if no clip was measured, or if the denominators sum to zero."""
    measured = [row for row in rows if metric.column in row]
    tops, bottoms = _sums(metric, measured)
    if bottoms.sum() == 0:
        return None
    low, high = ratio_interval(tops, bottoms, seed=seed)
    return Estimate(ratio(tops, bottoms), low, high, len(measured))


def _difference(metric: Metric, pairs: Sequence[tuple[Any, Any]], seed: int) -> Difference | None:
    measured = [pair for pair in pairs if all(metric.column in row for row in pair)]
    a, b = (_sums(metric, [pair[side] for pair in measured]) for side in (0, 1))
    if a[1].sum() == 0 or b[1].sum() == 0:
        return None
    value = ratio(*b) - ratio(*a)
    low, high = difference_interval(a, b, seed=seed)
    goal = {"one": 1.0, "zero": 0.0}.get(metric.better)
    if goal is not None:  # test which one is nearer to the goal, not merely whether they differ
        a, b = ((np.abs(tops - goal * bottoms), bottoms) for tops, bottoms in (a, b))
    p = permutation_p(a, b, seed=seed)
    return Difference(value, low, high, p, p, len(measured))


def _why(name: str, clips: Sequence[Clip], judges: Judges, voices: Voices) -> str:
    """Why a metric was not measured."""
    recorded, leading = any(clip.recording for clip in clips), any(clip.reference_text is not None for clip in clips)
    known = any(voice_of(clip, voices) is not None for clip in clips)
    no_voice = "there are no recordings of the clips' speakers (voices/)"
    reasons: dict[str, list[tuple[bool, str]]] = {
        "wer": [(judges.asr is None, _NO_ASR)],
        "recording_wer": [(judges.asr is None, _NO_ASR), (not recorded, "no clip has a recording of its text")],
        "leak_rate": [(judges.asr is None, _NO_ASR), (not leading, "no clip has the text of a reference")],
        "similarity": [(judges.speaker is None, _NO_SPEAKER), (not known, no_voice)],
        "similarity_reference": [(judges.speaker is None, _NO_SPEAKER), (True, "no clip has a reference")],
        "speaker_accuracy": [(judges.speaker is None, _NO_SPEAKER), (not known, no_voice),
                             (len(voices) < 2, "there is only one voice to choose from")],
        "naturalness": [(judges.quality is None, "no judge of naturalness was named (--quality-judge)")],
        "f0_shift": [(not known, no_voice), (True, "clips or recordings have no voiced sound")],
    }  # fmt: skip
    alike = {"cer": "wer", "babble_rate": "wer", "recording_cer": "recording_wer", "leak_wer": "leak_rate",
             "f0_spread": "f0_shift", "energy_spread": "f0_shift"}  # fmt: skip
    found = reasons.get(alike.get(name, name), [])
    return next((reason for holds, reason in found if holds), "the clips have no words or no sound to measure")


def _number(value: float) -> float:
    """A value for a row: flags as 0 and 1, anything else with six digits."""
    return int(value) if isinstance(value, bool | np.bool_) else round(float(value), 6)


def _read(file: Path) -> tuple[np.ndarray, int]:
    waveform, rate = read_audio(file)
    if not np.isfinite(waveform).all():
        raise DataError(f"{file} has samples that are not finite: write it again")
    return waveform, rate
