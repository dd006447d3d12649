"""What a preparation was given and what it did, as it is recorded and shown."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from higgstune.data.entry import Entry
from higgstune.data.manifest import Utterance
from higgstune.data.measures import parse_limits
from higgstune.data.merge import Pairing
from higgstune.data.outliers import Outlier
from higgstune.data.rejection import Rejection, count_reasons, reasons_in_words, shown, some_ids
from higgstune.data.shard_reader import SPLITS
from higgstune.data.text import find_marks
from higgstune.errors import ConfigError

References = Literal["none", "same_speaker"]
_FEW = 3  # rows, whose texts may begin alike by chance


@dataclass(frozen=True)
class PrepareSummary:
    """The outcome of a preparation; `dataclasses.asdict` gives JSON."""

    out: str
    read_as: str  # how the source was understood
    example: str  # its first usable row
    passed_over: list[str]  # what of the source is not used, a clause each
    accepted: dict[str, int]  # rows of this source, by split
    rows: dict[str, int]  # rows of the whole store, by split
    hours: dict[str, float]  # of the whole store, by split
    refused: dict[str, int]  # by reason; the rows are in rejected.jsonl
    added: int
    updated: int
    encoded: int  # clips that the codec encoded
    reused: int  # clips that had codes already
    references: Pairing
    outliers: list[Outlier]  # of the whole store, see `outliers.find_outliers`
    not_measured: list[str]  # ids of rows that an earlier version stored, and that this source does not hold
    stale: list[str]  # ids of rows that stay as they were, although this source has them refused now
    not_in_source: list[str]  # ids of all other rows that stay as they were
    dropped: int = 0  # rows that this run took out
    restored: int = 0  # dropped rows that may come back with their source
    whisper: int | None = None  # clips with Whisper features, where they were requested
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PrepareOptions:
    """The options of a preparation, which are recorded in the store."""

    validation_fraction: float
    references: str
    max_seconds: float
    allow_long: bool
    seed: int
    model: str | None = None  # the checkpoint that will be trained
    whisper: str | None = None  # the Whisper checkpoint whose features are stored
    allow_outside: bool = False  # whether paths may leave the folder of the source
    columns: str | None = None  # what the columns of the source mean, where it was said
    limits: tuple[str, ...] = ()  # of outliers, in place of the default ones

    def check(self) -> None:
        """Raise ConfigError for an impossible option."""
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction is {self.validation_fraction}: it must be at least 0 and below 1")
        if self.references not in get_args(References):
            raise ConfigError(f"references is {self.references!r}: one of {', '.join(get_args(References))}")
        if not self.max_seconds > 0:
            raise ConfigError(f"max_seconds is {self.max_seconds}: it must be above 0")
        parse_limits(self.limits)


def example(row: Utterance | None) -> str:
    """A row's fields as they were read, for people."""
    if row is None:
        return "none can be used"
    values = row.model_dump(exclude_none=True)
    return ", ".join(f"{name} {shown(value)}" for name, value in values.items())


def nothing_usable(rejections: list[Rejection], path: Path, passed_over: Iterable[str]) -> str:
    """The error for a source of which nothing is left; `passed_over` is what else it holds."""
    first = rejections[0]
    others = f"; not used: {', '.join(passed_over)}" if passed_over else ""
    reasons = reasons_in_words(count_reasons(rejections))
    return f"no row can be used: {reasons}; all are in {path}, first {first.location}: {first.message}{others}"


def rows_by_split(entries: Iterable[Entry]) -> dict[str, int]:
    """The number of rows in each split."""
    counts = Counter(entry.split for entry in entries)
    return {split: counts[split] for split in SPLITS}


def hours_by_split(entries: list[Entry]) -> dict[str, float]:
    """Hours of speech in each split."""
    return {
        split: round(sum(entry.duration for entry in entries if entry.split == split) / 3600, 4) for split in SPLITS
    }


def find_warnings(entries: list[Entry], pairing: Pairing, options: PrepareOptions) -> list[str]:
    """Messages for a person who is about to train on these rows."""
    warnings = []
    if options.validation_fraction > 0 and not rows_by_split(entries)["validation"]:
        warnings.append("the store has no validation row: all rows share one recording, or were stored before")
    if marked := {entry.id: marks for entry in entries if (marks := find_marks(entry.text))}:
        example = next(iter(marked.values()))[0]
        warnings.append(f"texts with marks that a voice reads aloud, such as {example}: {some_ids(list(marked))}")
    before, colon, _ = entries[0].text.partition(":")
    beginning = before + colon if colon else before[:1]
    is_word = not beginning or beginning[-1].isalnum()
    if len(entries) >= _FEW and not is_word and all(entry.text.startswith(beginning) for entry in entries):
        warnings.append(f"every text begins with {beginning!r}, which is trained on as words")
    if pairing.without_speaker:
        warnings.append(f"rows that name no speaker, and so have no reference: {pairing.without_speaker} (set speaker)")
    if pairing.one_clip_speakers:
        warnings.append(f"speakers without a second clip to use as a reference: {pairing.one_clip_speakers}")
    return warnings
