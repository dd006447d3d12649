"""What a preparation is asked for, and what it says at its end."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from higgstune.data.entry import Entry
from higgstune.data.references import Pairing
from higgstune.data.schema import SPLITS
from higgstune.errors import ConfigError

References = Literal["none", "same_speaker"]


@dataclass(frozen=True)
class PrepareSummary:
    """What a preparation did; `dataclasses.asdict` gives JSON."""

    out: str
    accepted: dict[str, int]  # rows of this source, by split
    rows: dict[str, int]  # rows of the whole store, by split
    hours: dict[str, float]  # of the whole store, by split
    refused: dict[str, int]  # by reason; the rows are in rejected.jsonl
    added: int
    updated: int
    encoded: int  # clips that the codec was asked for
    reused: int  # clips that had codes already
    references: Pairing
    whisper: int | None = None  # clips with Whisper features, where they were asked for
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PrepareOptions:
    """What a store is put together by; recorded in it."""

    validation_fraction: float
    references: str
    max_seconds: float
    allow_long: bool
    seed: int
    model: str | None = None  # the checkpoint that it is prepared for
    whisper: str | None = None  # the Whisper checkpoint whose features are stored
    allow_outside: bool = False  # whether paths may leave the folder of the source

    def check(self) -> None:
        """Raise ConfigError for an option that cannot be."""
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction is {self.validation_fraction}: it must be from 0 to below 1")
        if self.references not in get_args(References):
            raise ConfigError(f"references is {self.references!r}: one of {', '.join(get_args(References))}")
        if not self.max_seconds > 0:
            raise ConfigError(f"max_seconds is {self.max_seconds}: it must be above 0")


def rows_by_split(entries: Iterable[Entry]) -> dict[str, int]:
    """How many rows each split has."""
    counts = Counter(entry.split for entry in entries)
    return {split: counts[split] for split in SPLITS}


def hours_by_split(entries: list[Entry]) -> dict[str, float]:
    """Hours of speech in each split."""
    return {
        split: round(sum(entry.duration for entry in entries if entry.split == split) / 3600, 4) for split in SPLITS
    }


def find_warnings(entries: list[Entry], pairing: Pairing, options: PrepareOptions) -> list[str]:
    """What a person should know before training on these rows."""
    warnings = []
    if options.validation_fraction > 0 and not rows_by_split(entries)["validation"]:
        warnings.append("there is no validation row: the rows share a recording, or were stored before")
    if pairing.without_speaker:
        warnings.append(
            f"rows that name no speaker and stay without a reference: {pairing.without_speaker} (set speaker)"
        )
    if pairing.one_clip_speakers:
        warnings.append(f"speakers without a second clip to hear as a reference: {pairing.one_clip_speakers}")
    return warnings
