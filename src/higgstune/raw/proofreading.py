"""The utterances of a data set as a person proof-reads them: ordered worst first, with all decisions so far.

manifest.jsonl, refused.jsonl  +  review.jsonl  ->  rows  ->  a decision  ->  one more line of review.jsonl
"""

import json
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgstune.errors import DataError
from higgstune.raw.edits import Decision, DecisionLog, Item, Replay, is_structural
from higgstune.raw.names import MANIFEST, REFUSED, SUMMARY

STATUSES = ("open", "accepted", "edited", "dropped")
_NO_SNR = 100.0  # dB: sorts behind every measured one
_SHOWN = ("language", "split", "recognised")


class Behind(Exception):
    """Another tab has decided about the same utterance, or the data set was collected anew; nothing was written."""


@dataclass(frozen=True)
class Filter:
    """Which utterances are listed; an empty value lists all."""

    status: str = ""  # one of STATUSES
    kind: str = ""  # "kept" or "refused" by the thresholds
    speaker: str = ""
    flag: str = ""  # what is flagged, or why it is refused
    words: str = ""  # in its text, its recognised text or its id


def check_dataset(folder: Path) -> None:
    """Raise DataError where a folder is not a data set."""
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} holds no {MANIFEST}: name a data set that `higgstune collect` wrote")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All utterances, those that are kept first. Raises DataError where it is not a data set, or a line is broken."""
    check_dataset(folder)
    return [*_read(folder / MANIFEST), *_read(folder / REFUSED)]


class Review:
    """A data set's utterances and decisions. Its methods may be called by several threads.

    Only one process at a time may decide (`files.alone_in`).
    """

    def __init__(self, folder: Path) -> None:
        """Read the data set. Raises DataError where it is missing, or where a line of it is broken."""
        self.folder = folder
        self._lock = threading.RLock()
        self.generation = 0
        self._load()

    def _load(self) -> None:
        self._state = self._state_of_files()
        rows = read_rows(self.folder)
        self._rows = {row["id"]: row for row in rows}
        self.summary = _summary(self.folder / SUMMARY)
        self._known_flags = {row["id"]: list(dict.fromkeys(check["what"] for check in _odd(row))) for row in rows}
        self._log = DecisionLog(self.folder)
        self._ranks = {id: rank for rank, id in enumerate(_worst_first(rows))}
        self._replay = self._replayed()
        self.generation += 1

    def _replayed(self) -> Replay:
        return Replay(map(_item, self._rows.values()), self._log.active)

    def _state_of_files(self) -> list[tuple[int, int]]:
        stats = [path.stat() for name in (MANIFEST, REFUSED) if (path := self.folder / name).is_file()]
        return [(one.st_mtime_ns, one.st_size) for one in stats]

    def refresh(self) -> None:
        """Read the data set again where it was collected anew."""
        with self._lock:
            if self._state_of_files() != self._state:
                self._load()

    @property
    def sequence(self) -> int:
        """The number of the last decision."""
        return len(self._log.decisions)

    def state(self) -> dict[str, Any]:
        """What is decided and what is left: counts, hours, speakers, flags."""
        with self._lock:
            items = self._replay.items.values()
            status: Counter[str] = Counter()
            flags: Counter[str] = Counter()
            speakers: Counter[str | None] = Counter()
            refused, kept = 0, 0.0
            for item in items:  # one loop: it is done behind every decision
                status[self._status(item.id)] += 1
                speakers[self._speaker(item)] += 1
                refused += self._refused(item) is not None
                kept += (item.end - item.start) * self._is_kept(item)
                for flag in self._flags(item):
                    flags[flag] += 1
            return {
                "name": self.folder.resolve().name,
                "generation": self.generation,
                "sequence": self.sequence,
                "utterances": len(items),
                "refused": refused,
                "status": {name: status[name] for name in STATUSES},
                "kept_seconds": round(kept, 1),
                "seconds": round(sum(item.end - item.start for item in items), 1),
                "speakers": {name: count for name, count in speakers.most_common() if name},
                "flags": dict(flags.most_common()),
                "undoable": [one.number for one in self._log.active[-50:]],
            }

    def ids(self, only: Filter = Filter()) -> list[str]:
        """The utterances that a filter lets through, worst first."""
        with self._lock:
            found = [item for item in self._replay.items.values() if self._passes(item, only)]
            return [item.id for item in sorted(found, key=self._place)]

    def _place(self, item: Item) -> tuple[int, float]:
        ranks = [self._ranks[one] for one in item.made_of or (item.id,)]
        return min(ranks), item.start

    def _passes(self, item: Item, only: Filter) -> bool:
        if only.status and self._status(item.id) != only.status:
            return False
        if only.kind and (self._refused(item) is not None) != (only.kind == "refused"):
            return False
        if only.speaker and self._speaker(item) != only.speaker:
            return False
        if only.flag and only.flag not in self._flags(item):
            return False
        if only.words:
            row = self._source(item)
            texts = (self._text(item), row.get("recognised") or "", item.id)
            return any(only.words.casefold() in text.casefold() for text in texts)
        return True

    def views(self, ids: Iterable[str]) -> list[dict[str, Any]]:
        """Rows as the page shows them; ids that are gone are left out."""
        with self._lock:
            return [self._view(self._replay.items[one]) for one in ids if one in self._replay.items]

    def _view(self, item: Item) -> dict[str, Any]:
        row, following = self._source(item), self._replay.following(item)
        is_new = bool(item.made_of)
        history = [] if is_new else [check for check in row.get("history", []) if check["verdict"] != "kept"]
        view = {key: row.get(key) for key in _SHOWN} | {
            "id": item.id,
            "recording": item.recording,
            "start": item.start,
            "end": item.end,
            "speech": item.speech,
            "text": self._text(item),
            "speaker": self._speaker(item),
            "status": self._status(item.id),
            "refused": self._refused(item),
            "flags": self._flags(item),
            "checks": [{"what": one["what"], "message": one["message"] or one["what"]} for one in history],
            "snr": None if is_new else (row.get("measures") or {}).get("snr"),
            "new": is_new,
            "next": None,
        }
        if is_new:
            view["recognised"] = None
        if following is not None:
            gap = round(following.start - item.end, 3)
            view["next"] = {"id": following.id, "text": self._text(following), "gap": gap, "end": following.end}
        return view

    def sound_of(self, id: str) -> tuple[Item, dict[str, Any]] | None:
        """Where an utterance lies, and the row of the data set that it is, or is made of."""
        with self._lock:
            item = self._replay.items.get(id)
            return None if item is None else (item, self._source(item))

    def decide(self, seen: int, generation: int, line: Mapping[str, Any]) -> list[int]:
        """Append a decision, of a tab that has seen the first `seen` lines; the numbers of what was appended.

        Raises Behind when a later line, or another collection, is about the same utterances, and DataError for what
        is not a decision: then nothing was written.
        """
        with self._lock:
            if generation != self.generation:
                raise Behind("the data set was collected anew")
            try:
                decision = Decision.parse(self.sequence + 1, dict(line))
            except ValueError as error:
                raise DataError(f"this is not a decision: {error}") from error
            about = self.about(decision)
            if later := [one for one in self._log.decisions[seen:] if about & self.about(one)]:
                raise Behind(f"{_some(later[-1].ids or tuple(self.about(later[-1])))} changed in another tab")
            if decision.undo is None:
                if not self._replay.fits(decision):
                    raise Behind(f"{_some(decision.ids)} is no longer what it was")
            elif decision.undo in self._log.undone:
                raise Behind("this is undone already")
            made = self._log.append(line)
            if decision.undo is None:
                self._replay.apply(decision)
            else:
                self._replay = self._replayed()
            return [one.number for one in made]

    def rename(self, seen: int, generation: int, speaker: str, name: str) -> list[int]:
        """Give all utterances of a speaker another name, perhaps that of another speaker: one decision."""
        with self._lock:
            ids = [item.id for item in self._replay.items.values() if self._speaker(item) == speaker]
            if not ids:
                raise Behind(f"{speaker} was renamed in another tab")
            return self.decide(seen, generation, {"ids": ids, "speaker": name})

    def about(self, decision: Decision) -> set[str]:
        """The utterances that a decision changes, those included that it makes or takes away."""
        if decision.undo is not None:
            return self.about(self._log.decisions[decision.undo - 1])
        found = set(decision.ids) | ({decision.join} if decision.join else set())
        if decision.cut:
            sources = {one for id in found for one in (id, *self._made_of(id))}
            found |= {item.id for item in self._replay.items.values() if sources & set(item.made_of)}
        return found

    def _made_of(self, id: str) -> tuple[str, ...]:
        item = self._replay.items.get(id)
        return () if item is None else item.made_of

    def changes(self, seen: int) -> dict[str, Any]:
        """What was decided after the first `seen` lines: the utterances, and whether some were cut or joined."""
        with self._lock:
            later = self._log.decisions[seen:]
            ids: set[str] = set()
            for one in later:
                ids |= self.about(one)
            targets = [one if one.undo is None else self._log.decisions[one.undo - 1] for one in later]
            return {
                "sequence": self.sequence,
                "generation": self.generation,
                "rows": self.views(sorted(ids)),
                "structural": any(map(is_structural, targets)),
            }

    def _source(self, item: Item) -> dict[str, Any]:
        return self._rows[(item.made_of or (item.id,))[0]]

    def _text(self, item: Item) -> str:
        return str(self._replay.edits.get(item.id, {}).get("text", item.text) or "")

    def _speaker(self, item: Item) -> str | None:
        found: str | None = self._replay.edits.get(item.id, {}).get("speaker", self._source(item).get("speaker"))
        return found

    def _status(self, id: str) -> str:
        edit = self._replay.edits.get(id, {})
        if "keep" in edit:
            return "accepted" if edit["keep"] else "dropped"
        return "edited" if "text" in edit else "open"

    def _refused(self, item: Item) -> dict[str, str] | None:
        row = self._source(item)
        if item.made_of or "reason" not in row:
            return None
        return {"reason": row["reason"], "message": row["message"]}

    def _is_kept(self, item: Item) -> bool:
        keep = self._replay.edits.get(item.id, {}).get("keep")
        return self._refused(item) is None if keep is None else bool(keep)

    def _flags(self, item: Item) -> list[str]:
        if item.made_of:
            return ["new"]
        return self._known_flags[item.id]


def _worst_first(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ids: what is kept, by what differs between texts, then flags, then noise; behind it what is refused.

    Of what is refused, that comes first which has the least against it, and is most likely to be taken back.
    """

    def badness(row: Mapping[str, Any]) -> tuple[float, int, float]:
        shares = [check["value"] for check in row.get("history", []) if check["what"] == "text"]
        snr = (row.get("measures") or {}).get("snr")
        return max(shares, default=0.0), len(_odd(row)), -(_NO_SNR if snr is None else snr)

    kept = sorted((row for row in rows if "reason" not in row), key=badness, reverse=True)
    refused = sorted((row for row in rows if "reason" in row), key=badness)
    return [row["id"] for row in (*kept, *refused)]


def _odd(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [check for check in row.get("history", []) if check["verdict"] != "kept"]


def _item(row: Mapping[str, Any]) -> Item:
    segment = row["segment"]
    speech = tuple((float(start), float(end)) for start, end in segment["speech"])
    return Item(row["id"], segment["recording"], segment["start"], segment["end"], speech, row.get("text"))


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a list, which may be missing. Raises DataError for a line that is none."""
    if not path.is_file():
        return []
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                _item(row)
            except (ValueError, KeyError, TypeError) as error:
                why = f"does not come from `collect` ({error})"
                raise DataError(f"{path}:{number} {why}: collect again") from error
            rows.append(row)
    return rows


def _summary(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path} is broken ({error}): collect again") from error
    return content if isinstance(content, dict) else {}


def _some(ids: Sequence[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{ids[0]} and {len(ids) - 1} more"
