"""Rows from a folder of recordings, each with its transcript in a file of the same name, or in a list per chapter."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from higgstune.data.importers.records import sidecar_rows
from higgstune.data.importers.transcripts import COLLECT, read_transcript
from higgstune.data.manifest import Utterance
from higgstune.data.messages import is_unicode
from higgstune.data.rejection import RowError
from higgstune.data.signatures import conversion
from higgstune.data.source import (
    AUDIO_SUFFIXES,
    FOREIGN_SUFFIXES,
    Source,
    SourceRow,
    audio_files,
    decode_lines,
    is_converted,
    nfc,
    path_within,
    read_whole,
)

# Endings of the transcript beside `1.wav`, in the order of preference; LibriTTS has two for a clip.
TRANSCRIPTS = (".normalized.txt", ".txt", ".lab", ".original.txt", ".wav.txt")
_WITH_CUES = (".srt", ".vtt", ".textgrid", ".labels.txt")  # read by the verb that cuts long recordings
_TIMED = (*_WITH_CUES, ".ass", ".eaf")
_LISTS = ".trans.txt"  # of LibriSpeech: one for the clips of a folder, with the id before each text
_LOOKED_AT = 100  # recordings
_MICROPHONE = re.compile(r"_mic[12]$")  # VCTK has two recordings of each text


def read_folder(folder: Path, *, allow_outside: bool = False) -> Source:
    """One row for each recording below a folder, in the order of their paths; hidden files are skipped.

    Its transcript lies beside it, or, where only one file below the folder has its name, elsewhere: `txt/` beside
    `wav/`. LibriSpeech's lists and a `.json` with a text or with segments are read, too. A recording without a
    transcript, or in an unsupported format, is yielded as its RowError; so is a link that leads out of the folder,
    unless `allow_outside`.
    """
    reader = _Folder(folder, allow_outside)
    return Source(list(reader.rows()), reader.read_as(), reader.notes)


def has_transcripts(folder: Path) -> bool:
    """Whether one of the first recordings below a folder has its transcript beside it."""
    first = islice(audio_files(folder, allow_outside=False), _LOOKED_AT)
    return any(next(transcript_names(path, siblings), None) is not None for path, siblings in first)


def transcript_names(path: Path, siblings: dict[str, str]) -> Iterator[str]:
    """The transcripts beside a recording, the preferred one first."""
    for ending in TRANSCRIPTS:
        key = nfc(path.name) + ".txt" if ending == ".wav.txt" else nfc(path.stem) + ending
        if (name := siblings.get(key)) is not None:
            yield name


def has_audio(folder: Path, *, allow_outside: bool = False) -> bool:
    """Whether there is a recording, or a link to refuse, below a folder."""
    return next(audio_files(folder, allow_outside), None) is not None


class _Folder:
    def __init__(self, folder: Path, allow_outside: bool) -> None:
        self._folder = folder
        self._allow_outside = allow_outside
        self._kinds: Counter[str] = Counter()
        self._used: set[Path] = set()
        self._lists: dict[Path, dict[str, str]] = {}
        self._second_microphone = 0
        self._converted = 0
        self._folders: set[str] = set()  # of the first level, with recordings
        self._named_speakers = False
        self._second_texts = 0
        self._by_name: defaultdict[str, list[Path]] = defaultdict(list)
        self._by_place: defaultdict[tuple[str, str], list[Path]] = defaultdict(list)  # name, and that of its folder
        self._list_names: dict[Path, list[str]] = {}
        for root, name in _files(folder):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in (".txt", ".lab"):
                path = Path(root, name)
                self._by_name[nfc(stem)].append(path)
                self._by_place[nfc(stem), os.path.basename(root)].append(path)
        self._recordings: defaultdict[str, set[Path]] = defaultdict(set)  # folders with a recording of a name
        self._audio = list(audio_files(folder, allow_outside))
        for path, _ in self._audio:
            self._recordings[_name(path)].add(path.parent)

    def rows(self) -> Iterator[SourceRow]:
        """The rows, in the order of their paths."""
        for path, siblings in self._audio:
            location = path.relative_to(self._folder).as_posix()
            is_second = path.stem.endswith("_mic2") and f"{nfc(path.stem[:-1])}1{path.suffix.lower()}" in siblings
            if is_second and next(transcript_names(path, siblings), None) is None:
                self._second_microphone += 1
                continue
            if is_converted(path, siblings):
                self._converted += 1
                continue
            try:
                for number, content in enumerate(self._contents(path, location, siblings)):
                    place = location if not number else f"{location}:{number + 1}"
                    yield SourceRow(place, self._folder, content, content.id, location, self._allow_outside)
            except RowError as error:
                yield SourceRow(location, self._folder, error, audio=location, allow_outside=self._allow_outside)

    def read_as(self) -> str:
        """What the transcripts were, with their numbers."""
        kinds = ", ".join(f"{count} with {kind}" for kind, count in self._kinds.most_common())
        return f"a folder of recordings: {kinds or 'none with a transcript'}"

    def notes(self) -> Iterator[str]:
        """What is not used of the folder."""
        if self._second_microphone:
            yield f"recordings of a second microphone: {self._second_microphone}"
        if self._converted:
            yield f"files whose sound lies beside them in a plain format, which is used: {self._converted}"
        if self._second_texts:
            yield f"second texts of a recording, whose first one is used: {self._second_texts}"
        if texts := sum(path not in self._used for paths in self._by_name.values() for path in paths):
            yield f"texts without a recording: {texts}"
        known = (*AUDIO_SUFFIXES, *FOREIGN_SUFFIXES, ".txt", ".lab", ".json", "")
        suffixes = (os.path.splitext(name)[1].lower() for _, name in _files(self._folder))
        other = Counter(suffix for suffix in suffixes if suffix not in known)
        if other:
            yield f"files of other kinds: {other.total()} ({', '.join(f'{k} {n}' for k, n in other.most_common(5))})"
        if len(self._folders) > 1 and not self._named_speakers:
            folders = ", ".join(sorted(self._folders)[:3])
            yield f"names of sub-folders ({folders}), which are not taken for speakers: prepare each with --speaker"

    def _contents(self, path: Path, location: str, siblings: dict[str, str]) -> list[Utterance]:
        if not is_unicode(location):
            raise RowError("bad_row", "the name of the file or of its folder is not UTF-8: rename it")
        real = path_within(self._folder, location, self._allow_outside)
        names = list(transcript_names(path, siblings))
        json_name = siblings.get(nfc(path.stem) + ".json")
        self._used.update(path.parent / name for name in names)
        self._second_texts += max(0, len(names) + (json_name is not None) - 1)
        if real.suffix.lower() in FOREIGN_SUFFIXES:
            raise RowError("unsupported_format", f"{real.suffix} is not supported: {conversion(location)}")
        speaker = self._speaker(location)
        self._named_speakers |= speaker is not None
        self._folders.update(Path(location).parts[:-1][:1])
        if names:
            transcript_name = names[0]
            beside = str(Path(location).with_name(transcript_name))
            transcript = path_within(self._folder, beside, self._allow_outside)
            self._kinds["a " + next(kind for kind in TRANSCRIPTS if transcript_name.lower().endswith(kind))] += 1
            return [Utterance(audio=location, text=read_transcript(transcript), speaker=speaker)]
        if json_name is not None:
            beside = str(Path(location).with_name(json_name))
            content = read_whole(path_within(self._folder, beside, self._allow_outside))
            rows = sidecar_rows(content, location, json_name)
            self._kinds["a .json"] += 1
            return rows
        if (text := self._listed(path, siblings)) is not None:
            self._kinds[f"a *{_LISTS}"] += 1
            return [Utterance(audio=location, text=text, speaker=speaker)]
        elsewhere = self._elsewhere(path)
        if len(elsewhere) == 1:
            transcript = path_within(
                self._folder, elsewhere[0].relative_to(self._folder).as_posix(), self._allow_outside
            )
            self._used.add(elsewhere[0])
            self._kinds["a .txt in another folder"] += 1
            by_speaker = elsewhere[0].name.startswith(f"{elsewhere[0].parent.name}_")  # txt/p225/p225_001.txt
            speaker = elsewhere[0].parent.name if by_speaker else None
            self._named_speakers |= by_speaker
            return [Utterance(audio=location, text=read_transcript(transcript), speaker=speaker)]
        hint = ""
        if timed := next((ending for ending in _TIMED if nfc(path.stem) + ending in siblings), None):
            cut = f", or cut it by its times: {COLLECT.format(self._folder)}" if timed in _WITH_CUES else ""
            hint = f" (its {timed} is not read: write the words of the clip into a .txt{cut})"
        raise RowError("no_transcript", f"there is no {path.stem}.txt or .lab file beside it{hint}")

    def _elsewhere(self, path: Path) -> list[Path]:
        """The texts in other folders that can only be this recording's: the only one of its name, or, among several,
        the one in a folder of the same name (`wav/anna/1.wav`, `txt/anna/1.txt`).
        """
        name = _name(path)
        owners = self._recordings[name]
        texts = self._by_name[name] if len(owners) == 1 else self._by_place[name, path.parent.name]
        free = [text for text in texts if text.parent not in owners]
        if len(owners) == 1 and len(free) > 1:
            free = [text for text in free if text.parent.name == path.parent.name]
        return free

    def _listed(self, path: Path, siblings: dict[str, str]) -> str | None:
        """The text of a clip in LibriSpeech's list of its folder."""
        if path.parent not in self._list_names:
            self._list_names[path.parent] = [name for name in siblings.values() if name.lower().endswith(_LISTS)]
        for name in self._list_names[path.parent]:
            listed = (path.parent / name).relative_to(self._folder).as_posix()
            place = path_within(self._folder, listed, self._allow_outside)
            if place not in self._lists:
                lines = (line.partition(" ") for line in decode_lines(read_whole(place)))
                self._lists[place] = {nfc(key): text for key, _, text in lines}
            self._used.add(path.parent / name)
            if nfc(path.stem) in self._lists[place]:
                return self._lists[place][nfc(path.stem)]
        return None

    def _speaker(self, location: str) -> str | None:
        """The speaker in the names of LibriSpeech, LibriTTS and VCTK; other sub-folders have no meaning."""
        *folders, name = Path(location).parts
        found = re.match(r"(\d+)[-_](\d+)[-_]\d", name)
        if found is not None and folders and folders[-1] == found[2]:
            return found[1]  # 84/121123/84-121123-0000.flac
        return None


def _name(recording: Path) -> str:
    """What its transcript is called: VCTK has one for both microphones."""
    return _MICROPHONE.sub("", nfc(recording.stem))


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    """All files below a folder but hidden ones: their folder and name, since a path for each takes long."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        yield from ((root, name) for name in sorted(names) if not name.startswith("."))
