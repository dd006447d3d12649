"""Finding the recording that a table or a manifest names, however its author's machine spelt the path."""

import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from higgstune.data.audio import AUDIO_SUFFIXES, is_file
from higgstune.data.rejection import RowError, shown
from higgstune.data.signatures import conversion
from higgstune.data.source import FOREIGN_SUFFIXES, audio_files, is_converted, path_within

_FOLDERS = ("wavs", "", "wav", "audio", "clips")
_DIRECTION_MARKS = "\u200e\u200f\ufeff"  # which a copied right-to-left text brings along


class Recordings:
    """The recordings of a folder, by the names that a table gives them."""

    def __init__(self, folder: Path, allow_outside: bool) -> None:
        self._folder = folder
        self._allow_outside = allow_outside
        self.used: set[str] = set()
        self._exactly: set[str] = set()  # recordings that are named exactly
        self._claims: defaultdict[str, set[str]] = defaultdict(set)  # names of each that are spelt in another way
        self.other_spelling = 0  # how many were found under another case, normal form, slash or root

    def expect(self, names: Iterable[str]) -> None:
        """All names of a source: a recording that two of them could mean is neither's."""
        wanted = set(names)
        self._exactly = {path for name in wanted for path in self._hits(name, _FOLDERS)}
        for name in wanted:
            if not self._hits(name, _FOLDERS) and len(near := self._near(name, AUDIO_SUFFIXES)) == 1:
                self._claims[near[0]].add(_folded(name))

    def has(self, name: str) -> bool:
        """Whether a name stands for a recording here; it is not counted as used."""
        return bool(self._hits(name, _FOLDERS) or self._near(name, AUDIO_SUFFIXES))

    def find(self, name: str, folders: Sequence[str] = _FOLDERS) -> str:
        """The path of a recording, relative to the folder: `name` as it is or with a known suffix, in one of `folders`;
        else the only one below the folder with this name without regard to case, normal form, slashes and root.

        Raises RowError where there is none, or several. Nothing outside of the folder is even looked up unless outside
        is allowed.
        """
        found = self._found(name, folders)
        path_within(self._folder, found, self._allow_outside)  # it may be a link
        self.used.add(found)
        return found

    def _found(self, name: str, folders: Sequence[str]) -> str:
        hits = self._hits(name, folders)
        if len(hits) > 1:
            raise RowError("missing_audio", f"several recordings are named {name}: {', '.join(hits[:3])}")
        if hits:
            return hits[0]
        near = self._near(name, AUDIO_SUFFIXES)
        if len(near) == 1:
            if len(names := self._claims[near[0]] | {_folded(name)}) > 1:
                raise RowError("missing_audio", f"{near[0]} could be each of {', '.join(sorted(names))}: rename it")
            self.other_spelling += 1
            return near[0]
        if near:
            raise RowError("missing_audio", f"several recordings are named {name}: {', '.join(near[:3])}")
        if is_file(path_within(self._folder, name, self._allow_outside)):
            return name
        if foreign := self._near(name, FOREIGN_SUFFIXES):
            raise RowError(
                "unsupported_format", f"the format of {foreign[0]} is not supported: {conversion(foreign[0])}"
            )
        raise RowError(
            "missing_audio",
            f"there is no recording {shown(name)} in {self._folder}, nor below it: put the list above its recordings",
        )

    def _hits(self, name: str, folders: Sequence[str]) -> list[str]:
        """The recordings of exactly this name: as it is written, else with a known suffix or in one of the folders."""
        if os.path.isabs(name):
            name = os.path.relpath(name, self._folder) if Path(name).is_relative_to(self._folder) else ""
        plain = posixpath.normpath(name)
        if not name or plain in self._all:
            return [plain] if name else []
        places = [posixpath.normpath(posixpath.join(folder, name)) for folder in folders]
        return [path for place in places for suffix in ("", *AUDIO_SUFFIXES) if (path := place + suffix) in self._all]

    def notes(self) -> Iterator[str]:
        """What rows have named in another way, and what none has named."""
        if self.other_spelling:
            yield f"recordings found under another case, spelling or folder than written: {self.other_spelling}"
        used = {os.path.normpath(path) for path in self.used}
        if left := sum(path not in used for path in self._all):
            yield f"recordings that no row names: {left}"

    def _near(self, name: str, suffixes: tuple[str, ...]) -> list[str]:
        """The recordings that have this name but for case, normal form, slashes, suffix and root: the best fits.

        Either path must be the end of the other. `a/1.wav` is never `b/1.wav`, which may be another voice.
        """
        parts = _folded(name.replace("\\", "/").strip(_DIRECTION_MARKS)).split("/")
        *parents, last = [part for part in parts if part] or [""]
        fits: dict[str, int] = {}
        # Of a name with folders, those in a folder of that name, or at the top.
        places = ("", parents[-1]) if parents else sorted(self._by_place[_stem(last)])
        for path, folders, file in (found for place in places for found in self._by_place[_stem(last)][place]):
            if path in self._exactly or not path.lower().endswith(suffixes):
                continue
            if _stem(last) != last and _stem(file) == file:
                continue
            common = _common_end(folders, parents)
            if common in (len(folders), len(parents)):
                fits[path] = common
        best = max(fits.values(), default=0)
        return sorted(path for path, common in fits.items() if common == best)

    @cached_property
    def _all(self) -> frozenset[str]:
        found = audio_files(self._folder, self._allow_outside)
        return frozenset(
            path.relative_to(self._folder).as_posix()
            for path, siblings in found
            if siblings and not is_converted(path, siblings)
        )

    @cached_property
    def _by_place(self) -> defaultdict[str, defaultdict[str, list[tuple[str, list[str], str]]]]:
        """By folded stem and folder: each recording, its folded folders and its folded name."""
        found: defaultdict[str, defaultdict[str, list[tuple[str, list[str], str]]]]
        found = defaultdict(lambda: defaultdict(list))
        for path in self._all:
            *folders, file = _folded(path).split("/")
            if folders and folders[0] in _FOLDERS:  # on another machine, it may have had any name
                del folders[0]
            found[_stem(file)][folders[-1] if folders else ""].append((path, folders, file))
        return found


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _stem(name: str) -> str:
    """The folded name without a suffix of audio: `1.wav` is `1`, `mr.smith` stays."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix in AUDIO_SUFFIXES + FOREIGN_SUFFIXES else name


def _common_end(one: list[str], other: list[str]) -> int:
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count
