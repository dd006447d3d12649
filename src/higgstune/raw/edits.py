"""A person's decisions about the utterances of a data set: `review.jsonl`, a line of JSON each, never changed.

    {"id": "talk.wav-00012340", "keep": true}                           accepted, whatever the thresholds say
    {"id": "talk.wav-00012340", "text": "We went home.", "keep": true}
    {"id": "talk.wav-00012340", "keep": false}                          dropped
    {"ids": ["talk.wav-00012340", "talk.wav-00015100"], "speaker": "anna"}  a speaker renamed, or merged with another
    {"id": "talk.wav-00012340", "cut": [14.52], "texts": ["We went.", "She stayed."]}
    {"id": "talk.wav-00012340", "join": "talk.wav-00015100", "text": "We went. She stayed."}
    {"undo": 4}                                                     line 4 no longer counts; an undo can be undone

A line is known by its number, from 1. The lines are replayed in order, and the last one of each key wins.

`cut` parts an utterance at times in seconds of its recording. A piece begins and ends at a cut, or at the usual margins
around its speech, where they lie inside; a piece without speech is left out, so that a cut trims an edge, too. Ids
follow from the recording and the start, so that the first piece usually keeps the id. `texts` are those of all pieces
in order, the silent ones included; without them the pieces have only what is recognised in them. `join` appends the
next utterance of the same recording, with all between them; without `text` it has both texts. A cut or join replaces
earlier decisions about the text and about keeping; the speaker stays.

What `collect` does with cuts and joins: `recut` gives each recording's utterances as they are now. A new one has an
empty print and no recognised words, and its measures are still those of an utterance that it was made of: `collect`
decodes its recording again, measures and recognises it as any other (the journal keeps both by start and end, so that
this is done once), and then chooses with the edits that `recut` returns. A piece of what two speakers say has no
speaker until a person names one. A decision that fits no utterance any more is returned, too.
"""

import json
import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from higgstune.errors import DataError
from higgstune.files import writing
from higgstune.raw.names import EDITS, stem_for, stem_of, utterance_id

if TYPE_CHECKING:
    from higgstune.raw.utterances import Part, Utterance

BEFORE, BEHIND = 0.15, 0.20  # seconds around speech, as `pack` keeps them
_TOUCH = 0.01  # seconds: less speech than this at a cut is none
_KEYS = {"id", "ids", "text", "keep", "speaker", "cut", "texts", "join", "undo"}


@dataclass(frozen=True)
class Decision:
    """One line; what it says nothing about is None or empty."""

    number: int
    ids: tuple[str, ...] = ()
    text: str | None = None
    keep: bool | None = None
    speaker: str | None = None
    cut: tuple[float, ...] = ()
    texts: tuple[str, ...] | None = None
    join: str | None = None
    undo: int | None = None

    @classmethod
    def parse(cls, number: int, line: Any) -> Self:
        """Check a line. Raises ValueError with what is wrong."""
        if not isinstance(line, dict):
            raise ValueError("it is not an object with an id")
        if unknown := sorted(line.keys() - _KEYS):
            raise ValueError(f"unknown key {unknown[0]!r}")
        if "undo" in line:
            undo = line["undo"]
            if len(line) > 1 or not _is_number(undo) or not 1 <= undo < number or undo != int(undo):
                raise ValueError("undo takes the number of an earlier line, and nothing else")
            return cls(number, undo=undo)
        ids = line.get("ids", [line.get("id")])
        if not isinstance(ids, list) or not ids or not all(isinstance(one, str) and one for one in ids):
            raise ValueError("it has no id")
        for key, kind in (("text", str), ("speaker", str), ("keep", bool), ("join", str)):
            if key in line and not isinstance(line[key], kind):
                raise ValueError(f"{key} is not a {'yes or no (true, false)' if kind is bool else 'text'}")
        if line.get("speaker") == "":
            raise ValueError("speaker is empty")
        cut = _cut(line)
        structural = [key for key in ("cut", "join") if key in line]
        if structural and (len(ids) > 1 or len(structural) > 1 or line.keys() & {"keep", "speaker"}):
            raise ValueError(f"{structural[0]} is about one utterance alone")
        if ("texts" in line and not cut) or (cut and "text" in line):
            raise ValueError("texts belong to a cut, text to all else")
        if not line.keys() & {"text", "keep", "speaker", "cut", "join"}:
            raise ValueError("it decides nothing")
        texts = tuple(line["texts"]) if "texts" in line else None
        rest = {key: line.get(key) for key in ("text", "keep", "speaker", "join")}
        return cls(number, tuple(ids), cut=cut, texts=texts, **rest)


def _cut(line: Mapping[str, Any]) -> tuple[float, ...]:
    cut, texts = line.get("cut", []), line.get("texts")
    if not isinstance(cut, list) or not all(map(_is_number, cut)) or sorted(set(cut)) != cut:
        raise ValueError("cut is not a list of seconds in order")
    if "cut" in line and not cut:
        raise ValueError("cut has no time")
    if texts is not None and not (
        isinstance(texts, list) and len(texts) == len(cut) + 1 and all(isinstance(one, str) for one in texts)
    ):
        raise ValueError("texts are not as many as the cut has pieces")
    return tuple(map(float, cut))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def is_structural(decision: Decision) -> bool:
    """Whether it cuts or joins."""
    return bool(decision.cut) or decision.join is not None


class DecisionLog:
    """The lines of a data set's `review.jsonl`, to read and to append to.

    A last line that a killed process left unfinished does not count.
    """

    def __init__(self, folder: Path) -> None:
        """Read what is there. Raises DataError for a line that is not a decision."""
        self._path = folder / EDITS
        self.decisions: list[Decision] = []
        self._whole, self._ended = 0, True  # bytes; whether the last line has its end
        self._read()

    def _read(self) -> None:
        if not self._path.is_file():
            return
        with open(self._path, "rb") as file:
            for line in file:
                number = len(self.decisions) + 1
                try:
                    decision = Decision.parse(number, json.loads(line))
                except ValueError as error:
                    if not line.endswith(b"\n"):
                        break
                    raise DataError(f"{self._path}:{number}: {error}: correct the line, or write an undo") from error
                self.decisions.append(decision)
                self._whole += len(line)
                self._ended = line.endswith(b"\n")

    def append(self, *lines: Mapping[str, Any]) -> list[Decision]:
        """Write decisions, which are then on the disk; those made.

        Only one process may do so at a time (`files.alone_in`). Raises ValueError for a line that is not a decision,
        WorkError where the disk refuses: then none is written.
        """
        first = len(self.decisions) + 1
        made = [Decision.parse(first + index, line) for index, line in enumerate(lines)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        content = (text if self._ended else f"\n{text}").encode()
        with writing(self._path, "this decision is lost, those before are kept"):
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            try:
                os.ftruncate(handle, self._whole)  # what is behind is unfinished
                os.lseek(handle, self._whole, os.SEEK_SET)
                view = memoryview(content)
                while view:
                    view = view[os.write(handle, view) :]
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, self._whole)
                raise
            finally:
                os.close(handle)
        self._whole, self._ended = self._whole + len(content), True
        self.decisions += made
        return made

    @property
    def undone(self) -> set[int]:
        """The numbers of lines that do not count."""
        found: set[int] = set()
        for decision in reversed(self.decisions):
            if decision.undo is not None and decision.number not in found:
                found.add(decision.undo)
        return found

    @property
    def active(self) -> list[Decision]:
        """The decisions that count: neither undone, nor an undo."""
        undone = self.undone
        return [one for one in self.decisions if one.undo is None and one.number not in undone]


@dataclass(frozen=True)
class Item:
    """Where an utterance lies in its recording, in seconds, and what it was made of."""

    id: str
    recording: str
    start: float
    end: float
    speech: tuple[tuple[float, float], ...]
    text: str | None
    made_of: tuple[str, ...] = ()  # ids of utterances as they were found; empty for one that is as it was


class Replay:
    """Utterances with all decisions applied so far."""

    def __init__(self, items: Iterable[Item], decisions: Iterable[Decision] = ()) -> None:
        """Begin with utterances as they were found; ids are unique."""
        self.items: dict[str, Item] = {}
        self.edits: dict[str, dict[str, Any]] = {}
        self.unused: list[Decision] = []
        self._order: dict[str, list[str]] = defaultdict(list)  # ids by recording, in time
        for item in sorted(items, key=lambda item: item.start):
            self.items[item.id] = item
            self._order[item.recording].append(item.id)
        for decision in decisions:
            self.apply(decision)

    def following(self, item: Item) -> Item | None:
        """The next utterance of the same recording."""
        order = self._order[item.recording]
        place = bisect_right(order, item.start, key=lambda one: self.items[one].start)
        return self.items[order[place]] if place < len(order) else None

    def of(self, recording: str) -> list[Item]:
        """The utterances of a recording in time."""
        return [self.items[one] for one in self._order.get(recording, [])]

    def fits(self, decision: Decision) -> bool:
        """Whether there is what a decision is about."""
        found = [self.items[one] for one in decision.ids if one in self.items]
        if not found:
            return False
        if decision.cut:
            return found[0].start < decision.cut[0] and decision.cut[-1] < found[0].end
        if decision.join is not None:
            following = self.following(found[0])
            return following is not None and following.id == decision.join
        return True

    def apply(self, decision: Decision) -> None:
        """Apply one more decision, which is not an undo."""
        if not self.fits(decision):
            self.unused.append(decision)
            if is_structural(decision):  # perhaps done already; what was decided before it is about the old utterance
                for one in filter(None, (*decision.ids, decision.join)):
                    self.edits[one] = {k: v for k, v in self.edits.get(one, {}).items() if k == "speaker"}
        elif decision.cut:
            self._cut(self.items[decision.ids[0]], decision)
        elif decision.join is not None:
            self._join(self.items[decision.ids[0]], self.items[decision.join], decision.text)
        else:
            said = {key: getattr(decision, key) for key in ("text", "keep", "speaker")}
            change = {key: value for key, value in said.items() if value is not None}
            for one in decision.ids:
                if one in self.items:
                    self.edits.setdefault(one, {}).update(change)

    def _cut(self, item: Item, decision: Decision) -> None:
        texts: Sequence[str | None] = decision.texts or [None] * (len(decision.cut) + 1)
        made_of = item.made_of or (item.id,)
        pieces = [
            replace(piece, id=utterance_id(stem_of(item.id), piece.start), made_of=made_of, text=text)
            for piece, text in _pieces(item, decision.cut, texts)
        ]
        self._replace([item], pieces)

    def _join(self, first: Item, second: Item, text: str | None) -> None:
        both = [self.edits.get(one.id, {}).get("text", one.text) for one in (first, second)]
        joined = Item(
            first.id,
            first.recording,
            first.start,
            second.end,
            first.speech + second.speech,
            text if text is not None else " ".join(filter(None, both)) or None,
            (first.made_of or (first.id,)) + (second.made_of or (second.id,)),
        )
        self._replace([first, second], [joined])

    def _replace(self, old: Sequence[Item], new: Sequence[Item]) -> None:
        edits = [self.edits.pop(one.id, {}) for one in old]
        speakers = [edit["speaker"] for edit in edits if "speaker" in edit]
        for one in old:
            del self.items[one.id]
        for one in new:
            self.items[one.id] = one
            if speakers:
                self.edits[one.id] = {"speaker": speakers[0]}
        order = self._order[old[0].recording]
        place = order.index(old[0].id)
        order[place : place + len(old)] = [one.id for one in new]


def _pieces(item: Item, cut: Sequence[float], texts: Sequence[str | None]) -> list[tuple[Item, str | None]]:
    """The parts with speech between the cuts, each with its text."""
    borders = [item.start, *cut, item.end]
    pieces: list[tuple[Item, str | None]] = []
    for begin, end, text in zip(borders[:-1], borders[1:], texts, strict=True):
        inside = [(max(a, begin), min(b, end)) for a, b in item.speech]
        speech = tuple((round(a, 3), round(b, 3)) for a, b in inside if b - a > _TOUCH)
        if speech:
            start = begin if begin == item.start else max(begin, speech[0][0] - BEFORE)
            stop = end if end == item.end else min(end, speech[-1][1] + BEHIND)
            pieces.append((replace(item, start=round(start, 3), end=round(stop, 3), speech=speech), text))
    return pieces or [(item, item.text)]


def read_edits(out: Path) -> dict[str, Mapping[str, Any]]:
    """Text, keep and speaker by id; cuts and joins are passed over. Raises DataError for a broken line."""
    found: dict[str, dict[str, Any]] = {}
    for decision in DecisionLog(out).active:
        said = {key: getattr(decision, key) for key in ("text", "keep", "speaker")}
        for one in decision.ids:
            found.setdefault(one, {}).update({key: value for key, value in said.items() if value is not None})
    return dict(found)


def recut(
    parts: Sequence["Part"], decisions: Sequence[Decision]
) -> tuple[list["Part"], dict[str, dict[str, Any]], list[Decision]]:
    """The parts with their utterances cut and joined, the edits by id, and the decisions that fit no utterance.

    `decisions` are those that count, in order.
    """
    found: dict[str, Utterance] = {}
    items: list[Item] = []
    for part in parts:
        stem = stem_for(part.path)
        for one in part.utterances:
            name = utterance_id(stem, one.start)
            found[name] = one
            speech = tuple((start, end) for start, end in one.speech)
            items.append(Item(name, part.path, one.start, one.end, speech, one.given))
    replay = Replay(items, decisions)
    new = [replace(part, utterances=[_utterance(item, found) for item in replay.of(part.path)]) for part in parts]
    return new, replay.edits, replay.unused


def _utterance(item: Item, found: Mapping[str, "Utterance"]) -> "Utterance":
    if not item.made_of:
        return found[item.id]
    sources = [found[one] for one in item.made_of]
    known = next((one for one in sources if one.speaker is not None), sources[0])
    return replace(
        known,
        start=item.start,
        end=item.end,
        speech=[[start, end] for start, end in item.speech],
        given=item.text,
        recognised=None,
        logprob=None,
        print="",
    )
