"""What every importer gives: rows with their place in the source, and what becomes of refused ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from higgstune.data.manifest import Utterance
from higgstune.data.rejection import Rejection, RowError


@dataclass(frozen=True)
class SourceRow:
    """One row of a source: what it says, or why it cannot be used."""

    location: str  # file and row, as people count them
    folder: Path  # what its paths are relative to
    content: Utterance | RowError
    id: str | None = None  # as far as it is known of a row that is refused
    audio: str | None = None


def rejections_of(rows: Sequence[SourceRow], refused: Mapping[int, RowError]) -> list[Rejection]:
    """What is written down of refused rows, given by their numbers, in their order."""
    return [
        Rejection(rows[index].location, rows[index].id, rows[index].audio, error.reason, str(error))
        for index, error in sorted(refused.items())
    ]
