"""What the demo's clips are worth: error rates, similarities, and the bars they must clear."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from higgstune.evaluation.asr_errors import word_error_rate
from higgstune.evaluation.judges import SAME_SPEAKER
from higgstune.evaluation.judges.base import SpeakerJudge, Transcriber

WORSE_THAN_ROUND_TRIP = 0.15  # as much may the word error rate lie above the codec round trip of the originals
SWAPPED_AT_LEAST = 0.80  # error rate against another sentence's text
SIMILARITY_MARGIN = 0.05
LANGUAGE = "en"  # of the demo's sentences


@dataclass(frozen=True)
class Clips:
    """Spoken or recorded files with the texts that they should say."""

    name: str
    files: Sequence[Path]
    texts: Sequence[str]


@dataclass(frozen=True)
class Row:
    """The measures of one set of clips; None where no judge was at hand."""

    name: str
    clips: int
    error_rate: float | None
    similarity: dict[str, float]  # to the target voice, by model, the mean over the clips


@dataclass(frozen=True)
class Bar:
    """One bar: what is measured, what is asked for, and whether it holds."""

    name: str
    value: float
    condition: str
    holds: bool


@dataclass(frozen=True)
class Measurement:
    """All rows and bars, and who judged."""

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
    """Judge every set against the target voice's recordings, and hold the bars against what was judged.

    `sets` have the names that the bars ask for: round trip, base, adapted, swapped, zeroed.
    """
    rows = [_row(clips, references, asr, speaker) for clips in sets]
    by_name = {row.name: row for row in rows}
    bars = _error_bars(by_name) if asr is not None else []
    if speaker is not None:
        bars += _similarity_bars(by_name)
    judges = [judge.name for judge in (asr, speaker) if judge is not None]
    return Measurement(rows, bars, ", ".join(judges))


def _row(clips: Clips, references: Sequence[Path], asr: Transcriber | None, speaker: SpeakerJudge | None) -> Row:
    heard = asr.transcribe(clips.files, language=LANGUAGE) if asr is not None else None
    similarities = speaker.similarities(references, clips.files) if speaker is not None else {}
    return Row(
        clips.name,
        len(clips.files),
        None if heard is None else word_error_rate(clips.texts, heard),
        {model: mean(values) for model, values in similarities.items()},
    )


def _error_bars(rows: dict[str, Row]) -> list[Bar]:
    adapted, swapped = (rows[name].error_rate or 0.0 for name in ("adapted", "swapped"))
    allowed = (rows["round trip"].error_rate or 0.0) + WORSE_THAN_ROUND_TRIP
    return [
        Bar("error rate of training sentences", adapted, f"at most {allowed:.3f}", adapted <= allowed),
        Bar("error rate with swapped texts", swapped, f"over {SWAPPED_AT_LEAST}", swapped > SWAPPED_AT_LEAST),
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
