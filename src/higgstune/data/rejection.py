"""Rows that cannot be used: the reasons, and how a rejection is recorded and shown."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args

from higgstune.errors import DataError

Reason = Literal[
    "bad_row",  # not JSON, a wrong type, an unknown key, keys that exclude each other
    "outside_folder",  # a path that leaves the folder of its source
    "missing_audio",
    "unsupported_format",
    "unreadable_audio",  # not audio, damaged, cut off
    "no_transcript",
    "empty_text",
    "control_token",
    "segment_outside",
    "too_short",
    "too_long",
    "silent",
    "channels_cancel",  # the mean of the channels is silent, each of them is not
    "text_too_long",  # for its recording
    "not_finite",
    "out_of_range",
    "no_target",
    "reference_without_text",
    "reference_is_target",
    "dropped",  # taken out of the store by a person
    "duplicate",
    "duplicate_id",
    "split_conflict",
]
REASONS: tuple[str, ...] = get_args(Reason)
_SHOWN = 100  # characters of a value in a message


class RowError(DataError):
    """One row of a source cannot be used; preparation records it and continues."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Rejection:
    """A line of `rejected.jsonl`."""

    location: str  # file and row
    id: str | None
    audio: str | None
    reason: str  # one of REASONS
    message: str

    def to_json(self) -> str:
        """One line of JSON; odd characters of file names stay readable as escapes."""
        return json.dumps(asdict(self), ensure_ascii=True)


def shown(value: Any) -> str:
    """A value for a message, shortened. Raises RecursionError for one that is nested too deeply."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def some_ids(ids: Sequence[str], limit: int = 5) -> str:
    """How many ids, and the first of them: `7 (a, b, c, d, e, ...)`; `none` for none."""
    return f"{len(ids)} ({', '.join(ids[:limit])}{', ...' if len(ids) > limit else ''})" if ids else "none"


def count_reasons(rejections: Iterable[Rejection]) -> dict[str, int]:
    """The number of refused rows by reason, the most frequent first."""
    return dict(Counter(rejection.reason for rejection in rejections).most_common())


def reasons_in_words(counts: Mapping[str, int]) -> str:
    """Counts of refused rows by reason: `2 no transcript, 1 too short`."""
    return ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in counts.items())


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest valid one, or all of them."""
    valid = list(valid)
    name = name[:_SHOWN]  # the search must not take long, however long the name is
    near = get_close_matches(name, valid, n=1)
    return f"did you mean {near[0]!r}?" if near else f"the valid ones are {', '.join(valid)}"
