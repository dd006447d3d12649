"""The demo's measurements: error rates, similarities, and the bars that they must meet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from higgstune.evaluation.asr_errors import word_error_rate
from higgstune.evaluation.judges import SAME_SPEAKER
from higgstune.evaluation.judges.base import SpeakerJudge, Transcriber

MAX_ABOVE_ROUND_TRIP = 0.15  # word error rate above that of the originals' codec round trip
MIN_SWAPPED = 0.80  # word error rate against another sentence's text
SIMILARITY_MARGIN = 0.05
LANGUAGE = "en"  # of the demo's sentences


@dataclass(frozen=True)
class Clips:
    """Spoken or recorded files with their texts."""

    name: str
    files: Sequence[Path]
    texts: Sequence[str]


@dataclass(frozen=True)
class Row:
    """The measures of one set of clips; the error rate is None without an ASR."""

    name: str
    clips: int
    error_rate: float | None
    similarity: dict[str, float]  # to the target voice, by model, the mean over the clips


@dataclass(frozen=True)
class Bar:
    """One bar: the measured value, the condition, and whether it holds."""

    name: str
    value: float
    condition: str
    holds: bool


@dataclass(frozen=True)
class Measurement:
    """All rows and bars, and the judges' names."""

    rows: list[Row]
    bars: list[Bar]
    judges: str

    @property
    def passed(self) -> bool:
        """Whether every bar holds."""
        return all(bar.holds for bar in self.bars)


def measure(
    sets: Sequence[Clips], references: Sequence[Path], asr: Transcriber | None, speaker: SpeakerJudge | None
) -> Measurement:
    """Judge every set against the target voice's recordings, and check the bars.

    `sets` include those that the bars need: round trip, base, adapted, swapped, zeroed.
    """
    rows = [_row(clips, references, asr, speaker) for clips in sets]
    by_name = {row.name: row for row in rows}
    bars = _error_bars(by_name) if asr is not None else []
    if speaker is not None:
        bars += _similarity_bars(by_name)
    judges = [judge.name for judge in (asr, speaker) if judge is not None]
    return Measurement(rows, bars, ", ".join(judges))


def _row(clips: Clips, references: Sequence[Path], asr: Transcriber | None, speaker: SpeakerJudge | None) -> Row:
    transcripts = asr.transcribe(clips.files, language=LANGUAGE) if asr is not None else None
    similarities = speaker.similarities(references, clips.files) if speaker is not None else {}
    return Row(
        clips.name,
        len(clips.files),
        None if transcripts is None else word_error_rate(clips.texts, transcripts),
        {model: mean(values) for model, values in similarities.items()},
    )


def _error_bars(rows: dict[str, Row]) -> list[Bar]:
    adapted, swapped = (rows[name].error_rate or 0.0 for name in ("adapted", "swapped"))
    allowed = (rows["round trip"].error_rate or 0.0) + MAX_ABOVE_ROUND_TRIP
    return [
        Bar("error rate of training sentences", adapted, f"at most {allowed:.3f}", adapted <= allowed),
        Bar("error rate with swapped texts", swapped, f"over {MIN_SWAPPED}", swapped > MIN_SWAPPED),
    ]


def _similarity_bars(rows: dict[str, Row]) -> list[Bar]:
    bars = []
    for judge, round_trip in rows["round trip"].similarity.items():
        needed = min(SAME_SPEAKER.get(judge, 1.0), round_trip - SIMILARITY_MARGIN)
        adapted = rows["adapted"].similarity[judge]
        bars.append(Bar(f"{judge}, adapted", adapted, f"at least {needed:.3f}", adapted >= needed))
        for name in ("base", "zeroed"):
            value = rows[name].similarity[judge]
            bars.append(Bar(f"{judge}, {name}", value, f"below {needed:.3f}", value < needed))
    return bars
