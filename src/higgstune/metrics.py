"""The metrics of an evaluation, and the `Evaluation` that holds their values.

Every metric is a ratio of two sums over clips, so that all have the same interval and the same paired comparison: a
word error rate is the sum of `word_errors` over that of `words`; the denominator of a mean is 1 for each clip.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

Better = Literal["lower", "higher", "one", "zero", "none"]  # "one", "zero": the nearer the better
ClipRow = Mapping[str, str | float]  # a clip's id, text, transcript, ... and its columns of `METRICS`
NOT_MEASURED = "not measured"
SIGNIFICANT = 0.05
Verdict = Literal["better", "worse", "no clear difference", NOT_MEASURED]  # type: ignore[valid-type]


@dataclass(frozen=True)
class Metric:
    """The sum of a column of the clips' rows over that of another column, or over the number of clips."""

    name: str  # in results and in rules
    label: str  # for people
    better: Better
    column: str
    per: str | None = None
    unit: str = ""  # of the displayed value: s, semitones
    percent: bool = False


# Rows of clips have these columns, each a number; a row lacks those that were not measured.
METRICS = (
    Metric("wer", "word error rate", "lower", "word_errors", "words", percent=True),
    Metric("cer", "character error rate", "lower", "char_errors", "chars", percent=True),
    Metric("babble_rate", "more errors than words", "lower", "babbles", percent=True),
    Metric("recording_wer", "word error rate of recordings", "lower", "recording_word_errors", "recording_words",
           percent=True),
    Metric("recording_cer", "character error rate of recordings", "lower", "recording_char_errors", "recording_chars",
           percent=True),
    Metric("similarity", "similarity to the speaker", "higher", "similarity"),
    Metric("similarity_reference", "similarity to the reference", "higher", "similarity_reference"),
    Metric("speaker_accuracy", "nearest to the right speaker", "higher", "right_speaker", percent=True),
    Metric("cap_rate", "did not stop", "lower", "hit_cap", percent=True),
    Metric("short_rate", "under a third of its length", "lower", "short", percent=True),
    Metric("silence", "longest silence inside", "lower", "silence", unit="s"),
    Metric("trailing_silence", "silence at the end", "lower", "trailing_silence", unit="s"),
    Metric("duration_ratio", "duration over what is expected", "one", "duration_ratio"),
    Metric("loop_rate", "stuck in a loop", "lower", "loops", percent=True),
    Metric("leak_rate", "begins with the reference's words", "lower", "leaks", percent=True),
    Metric("leak_wer", "error rate of the beginning against the reference's text", "higher", "leak_word_errors",
           "leak_words", percent=True),
    Metric("naturalness", "naturalness", "higher", "naturalness"),
    Metric("f0_shift", "pitch against the speaker's", "zero", "f0_shift", unit="semitones"),
    Metric("f0_spread", "liveliness of pitch against the speaker's", "one", "f0_spread"),
    Metric("energy_spread", "liveliness of loudness against the speaker's", "one", "energy_spread"),
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A metric's value over clips, with its 95 % bootstrap interval; for a single clip, that is the value itself."""

    value: float
    low: float
    high: float
    clips: int


@dataclass(frozen=True)
class Difference:
    """A metric of one system minus that of another on the same clips; `p` is from a paired permutation test.

    If 0 or 1 is best, the test compares the clips' distances from it. `p_holm` corrects for all metrics of a
    comparison, except those that are equal in every clip.
    """

    value: float
    low: float
    high: float
    p: float
    p_holm: float
    clips: int


@dataclass(frozen=True)
class Confusion:
    """Mean similarity of each speaker's clips [rows] to each speaker's recordings [columns].

    Speakers without clips come last, and have columns but no rows.
    """

    speakers: list[str]
    similarity: list[list[float]]
    nearest: list[list[int]]  # how many clips of the row's speaker are nearest to the column's


@dataclass(frozen=True)
class Evaluation:
    """The measurements of a set of clips, the judges behind them, and what was not measured."""

    judges: dict[str, str]  # by role (asr, speaker, naturalness, pitch): name and version
    summary: dict[str, Estimate]  # by metric
    not_measured: dict[str, str]  # by metric: why
    clips: Sequence[ClipRow]
    confusion: Confusion | None = None

    def without_clips(self) -> dict[str, Any]:
        """As JSON, without the rows of the clips."""
        return {key: value for key, value in asdict(replace(self, clips=[])).items() if key != "clips"}

    def to_json(self) -> str:
        """As it is written beside the clips."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From what `to_json` wrote. Raises KeyError, TypeError for anything else."""
        confusion = values["confusion"]
        return cls(
            **{key: values[key] for key in ("judges", "not_measured", "clips")},
            summary={name: Estimate(**estimate) for name, estimate in values["summary"].items()},
            confusion=None if confusion is None else Confusion(**confusion),
        )


def shown(metric: Metric, value: float) -> str:
    """A value as text, with its unit."""
    if metric.percent:
        return f"{round(100 * value, 1) + 0.0:.1f} %"  # + 0: no minus before a zero
    return f"{round(value, 2) + 0.0:.2f} {metric.unit}".strip()


def by_name(names: Sequence[str]) -> list[Metric]:
    """The metrics of these names, in the order of the table."""
    return [metric for metric in METRICS if metric.name in names]


def verdict(metric: Metric, before: Estimate | None, after: Estimate | None, difference: Difference | None) -> Verdict:
    """Better or worse; neither if the corrected p (`p_holm`) is 0.05 or more, or if the metric has no better side."""
    if difference is None or before is None or after is None or not is_finite(difference.value, difference.p_holm):
        return NOT_MEASURED
    if difference.p_holm >= SIGNIFICANT or metric.better == "none":
        return "no clear difference"
    gain = {
        "lower": -difference.value,
        "higher": difference.value,
        "one": abs(before.value - 1) - abs(after.value - 1),
        "zero": abs(before.value) - abs(after.value),
    }[metric.better]
    return "better" if gain > 0 else "worse"


def is_finite(*values: float) -> bool:
    """Whether no value is NaN or infinite."""
    return all(math.isfinite(value) for value in values)
