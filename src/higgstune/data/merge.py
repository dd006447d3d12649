"""New rows into the rows that a store has: what is added, what is updated, what is refused."""

from collections.abc import Iterable

from higgstune.data.entry import Entry
from higgstune.data.rejection import RowError
from higgstune.data.splits import RecordingGroups


class Merger:
    """Takes rows one after the other. Rows of the store that nothing new stands for stay."""

    def __init__(self, stored: Iterable[Entry], groups: RecordingGroups) -> None:
        self.entries = list(stored)
        self.added = 0
        self.updated = 0
        self._groups = groups
        self._is_new: set[int] = set()  # positions that this run has written
        self._by_key = {entry.source_key: n for n, entry in enumerate(self.entries)}
        self._by_id = {entry.id: n for n, entry in enumerate(self.entries)}
        self._by_content = {entry.content: n for n, entry in enumerate(self.entries)}

    @property
    def accepted(self) -> list[Entry]:
        """The rows that came in this run."""
        return [self.entries[place] for place in sorted(self._is_new)]

    def has_content(self, entry: Entry) -> bool:
        """Whether a row says the same with the same audio."""
        return entry.content in self._by_content

    def add(self, entry: Entry, fallback_ids: list[str]) -> None:
        """Add a row, or update the one it stands for; one without an id gets the first fallback that is free.

        Raises RowError for a row that is there already, an id that another recording has, or recordings that
        would bring the two splits together.
        """
        place = self._find(entry, entry.id or fallback_ids[0])
        self._check_content(entry, place)
        if not entry.id:
            entry.id = self._free_id(fallback_ids) if place is None else self.entries[place].id
        if self._by_id.get(entry.id, place) != place:
            raise RowError("duplicate_id", f"the id {entry.id!r} is taken by another row: give each its own")
        if not self._groups.join(entry):
            raise RowError(
                "split_conflict",
                "it joins recordings of which one is trained on and one held out for validation: prepare "
                "these recordings together into a new folder",
            )
        self._put(entry, place)

    def _find(self, entry: Entry, row_id: str) -> int | None:
        """The stored row that this one stands for.

        It has (if this one has no id) the same content, the same place in the source, or the same id and
        audio.
        """
        same_content = None if entry.id else self._by_content.get(entry.content)
        places = [same_content, self._by_key.get(entry.source_key)]
        same_id = self._by_id.get(row_id)
        if same_id is not None and self.entries[same_id].audio_sha256 == entry.audio_sha256:
            places.append(same_id)
        return next((place for place in places if place is not None and place not in self._is_new), None)

    def _check_content(self, entry: Entry, place: int | None) -> None:
        same = self._by_content.get(entry.content, place)
        if same is not None and same != place:
            raise RowError("duplicate", f"its recording and text are those of the row {self.entries[same].id!r}")

    def _put(self, entry: Entry, place: int | None) -> None:
        if place is None:
            place = len(self.entries)
            self.entries.append(entry)
            self.added += 1
        else:
            old = self.entries[place]
            self.updated += _said(old) != _said(entry)
            for index, key in ((self._by_key, old.source_key), (self._by_id, old.id)):
                index.pop(key, None)
            self._by_content.pop(old.content, None)
            self.entries[place] = entry
        self._is_new.add(place)
        self._by_key[entry.source_key] = place
        self._by_id[entry.id] = place
        self._by_content[entry.content] = place

    def _free_id(self, names: list[str]) -> str:
        for name in names:
            if name not in self._by_id:
                return name
        return next(name for n in range(2, len(self._by_id) + 3) if (name := f"{names[-1]}#{n}") not in self._by_id)


def _said(entry: Entry) -> tuple[object, ...]:
    return (entry.content, entry.id, entry.speaker, entry.language, entry.scene, entry.reference_text)
