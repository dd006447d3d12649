"""Texts with times beside a long recording: subtitles, labels, TextGrids and Whisper's JSON, as cues."""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from higgstune.data.audio import AUDIO_SUFFIXES, is_file
from higgstune.data.importers.cue_text import RawCue, is_mark, joined, speaker_labels, speech_of, unrolled
from higgstune.data.importers.folder import TRANSCRIPTS
from higgstune.data.importers.records import whisper_segments
from higgstune.data.importers.textgrid import BEGINNING, parse_textgrid, spoken_intervals
from higgstune.data.importers.transcripts import foreign_format, without_entities
from higgstune.data.rejection import RowError, shown
from higgstune.data.source import FOREIGN_SUFFIXES, decode, nfc, read_whole
from higgstune.data.text import is_speakable

_READ = "SubRip or WebVTT subtitles, Audacity labels, a Praat TextGrid or Whisper's JSON"
_LINE_END = re.compile(r"\r*\n|\r")

# Subtitles: https://www.w3.org/TR/webvtt1/ and what players accept as SubRip.
_TIMED = re.compile(r"(?m)^[ \t]*-?\d+:\d[\d:.,]*[ \t]*\S{0,2}>[ \t]*-?\d+:\d")  # also where the arrow is misspelt
_CLOCK = re.compile(r"(?:(\d{1,4}):)?([0-5]?\d):([0-5]?\d(?:[.,]\d{1,9})?)")
_COMMENT = re.compile(r"NOTE(?:\s|$)|(?:STYLE|REGION)$|X-TIMESTAMP-MAP=")
_VOICE = re.compile(r"<v(?:\.[^\s<>]*)?\s+([^<>]+)>")
# Tags and the readings of ruby text, times within a cue, positions of SubStation.
_TAG = re.compile(r"<rt>[^<>]*</rt>|</?[A-Za-z][\w.:-]*(?:\s[^<>]*)?/?>|<\d[\d:.]*>|\{\\[^{}]*\}")

# Audacity: start, end, text; below it the frequencies of a spectral selection.
_LABEL = re.compile(r"(-?\d+(?:[.,]\d+)?)\t(-?\d+(?:[.,]\d+)?)(?:\t(.*))?")


_LANGUAGE = r"(?:\.(?!(?:sdh|cc)\.)([a-z]{2,3}(?:[-_][a-z0-9]{2,8})*))?(?:\.(?:sdh|cc|hi))?"
_TEXTS = tuple(ending for ending in TRANSCRIPTS if ending != ".wav.txt")
_EXACT = (".textgrid", ".labels.txt", ".json")
_SUBTITLES = (".vtt", ".srt")  # WebVTT first: it may name the speakers
_NOT_READ = (".ass", ".ssa", ".sbv", ".eaf", ".ttml", ".lrc", ".docx", ".pdf")
_SHOWN = 50  # characters of a text in a note
_UNKNOWN = 2  # how well a language fits that may be another one
_ORDER = (*_EXACT, *_SUBTITLES, *_TEXTS)
_BESIDE = re.compile(_LANGUAGE + "(" + "|".join(map(re.escape, sorted((*_ORDER, *_NOT_READ), key=len)[::-1])) + ")")


@dataclass(frozen=True)
class Cue:
    """What is said in a stretch of a recording."""

    start: float  # seconds of the recording
    end: float
    text: str
    speaker: str | None


@dataclass(frozen=True)
class Cues:
    """The cues of a file in the order of their starts, and what of it is not used."""

    cues: list[Cue]
    read_as: str
    not_speech: list[Cue] = field(default_factory=list)  # `[music]`, `(applause)`, songs
    without_text: list[Cue] = field(default_factory=list)
    without_length: list[Cue] = field(default_factory=list)  # point labels
    unused_tiers: tuple[str, ...] = ()
    mixed_speakers: int = 0  # cues in which several speak: none is named

    def __iter__(self) -> Iterator[Cue]:
        return iter(self.cues)

    def __len__(self) -> int:
        return len(self.cues)

    def notes(self) -> Iterator[str]:
        """What is not used, a clause each."""
        for words, cues in (
            ("cues that are not speech", self.not_speech),
            ("cues without a text", self.without_text),
            ("cues without a length", self.without_length),
        ):
            if cues:
                texts = list(dict.fromkeys(cue.text[:_SHOWN] for cue in cues if cue.text))
                some = ", ".join(texts[:3]) + (", ..." if len(texts) > 3 else "")
                yield f"{words}: {len(cues)}" + (f" ({some})" if some else "")
        if self.mixed_speakers:
            yield f"cues in which several speak, whose speakers are not used: {self.mixed_speakers}"
        if self.unused_tiers:
            yield f"tiers that are not used: {', '.join(self.unused_tiers)}"


@dataclass(frozen=True)
class TextBeside:
    """The file with the text of a recording, if there is one, and those that were passed over, each with the reason."""

    path: Path | None
    has_times: bool = False  # whether `read_cues` reads it; else it is plain text
    passed_over: tuple[str, ...] = ()


def read_cues(path: Path) -> Cues:
    """The cues of a file of subtitles (SubRip, WebVTT), Audacity labels, a Praat TextGrid, or JSON of Whisper.

    Its content decides what it is. Tags, entities, dashes and plain speaker labels are not part of the texts; captions
    that roll have each line once. One sentence may run over several cues, cues may overlap, times may lie beyond the
    recording. Raises RowError for anything else, with the line, DataError where the file cannot be read.
    """
    if not is_file(path):  # reading a pipe would block
        raise RowError("no_transcript", f"there is no file {path}")
    name, text = path.name, _decoded(path)
    read_as = "Audacity labels" if name.lower().endswith(".labels.txt") else _kind(text)
    unused: tuple[str, ...] = ()
    if read_as == "a Praat TextGrid":
        raws, used, unused = _textgrid(text, name)
        read_as += f", tier {' and '.join(map(shown, used))}"
    elif read_as == "Whisper's JSON":
        raws = _whisper(text, name)
    elif read_as == "Audacity labels":
        raws = _labels(text, name)
    elif read_as is not None:
        raws = unrolled(_subtitles(text, name))
    else:
        what = foreign_format(text) or ("text without times" if text.strip() else "no text")
        raise RowError("no_transcript", f"{name} holds {what}: save it as {_READ}")
    if not raws:
        raise RowError("no_transcript", f"{name} has no cue with a text: write it again, or remove it")
    return _cues(raws, read_as, unused, are_subtitles=read_as.endswith("subtitles"))


def text_beside(recording: Path, *, language: str | None = None) -> TextBeside:
    """The file beside a recording with its text: of its name (`book.srt` or `book.mp3.srt` for `book.mp3`), with the
    Unicode form and the case of the suffix ignored, also with a language (`book.en.srt`).

    Exact times (TextGrid, labels, JSON of Whisper) come before subtitles, subtitles before plain text. The file may be
    a link, and the caller checks where it leads. Raises RowError where several languages lie there and `language` does
    not say which is spoken, OSError where the folder cannot be read.
    """
    names = sorted(os.listdir(recording.parent))
    suffixes = AUDIO_SUFFIXES + FOREIGN_SUFFIXES
    others = {nfc(os.path.splitext(name)[0]) for name in names if name.lower().endswith(suffixes)}
    others.discard(nfc(recording.stem))
    found: list[tuple[int, int, int, str]] = []  # the best is the least
    languages: dict[str, str | None] = {}
    passed: dict[str, str] = {}
    for name in names:
        rest = _rest(nfc(name), recording)
        beside = _BESIDE.fullmatch(rest.lower()) if rest is not None else None
        if rest is None or beside is None or not is_file(recording.parent / name):
            continue
        if nfc(recording.stem) + rest[: -len(beside[2])] in others or f".{beside[1]}" in suffixes:
            continue  # of another recording: `book.two.srt` of `book.two.wav`, `book.wav.srt` of `book.wav`
        languages[name] = beside[1]
        if (fit := _fit(beside[1], language)) is None:
            passed[name] = f"its language is {beside[1]}"
        elif isinstance(order := _order(recording.parent / name, beside[2]), str):
            passed[name] = order
        else:
            found.append((_rank(order), fit, order, name))
    if not found:
        return TextBeside(None, passed_over=tuple(f"{name} ({why})" for name, why in passed.items()))
    rank, fit, _, best = min(found)
    rivals = sorted(name for *places, _, name in found if places == [rank, fit])
    if fit == _UNKNOWN and len({languages[name] for name in rivals}) > 1:
        raise RowError(
            "no_transcript", f"{' and '.join(rivals)} lie beside {recording.name}: give the language that is spoken"
        )
    passed |= {name: f"{best} is used" for *_, name in found if name != best}
    return TextBeside(
        recording.parent / best,
        has_times=rank < 2,
        passed_over=tuple(f"{name} ({why})" for name, why in sorted(passed.items())),
    )


def text_in(path: Path) -> TextBeside:
    """A file that is named as the text of a recording. Raises RowError where it is not one."""
    name = path.name.lower()
    ending = next((one for one in (*_EXACT, *_SUBTITLES, *_NOT_READ) if name.endswith(one)), _TEXTS[0])
    order = _order(path, ending)
    if isinstance(order, str):
        raise RowError("no_transcript", f"{path.name}: {order}")
    return TextBeside(path, has_times=_rank(order) < 2)


def _fit(of_file: str | None, language: str | None) -> int | None:
    """How well a file's language fits the one that is spoken, 0 is best; None for another one.

    Whether `de` and `ger` are the same is not known.
    """
    if of_file is None:
        return 0
    if language is None:
        return _UNKNOWN
    codes = [re.split("[-_]", name)[0] for name in (of_file, language.lower())]
    return 1 if codes[0] == codes[1] else _UNKNOWN if len(codes[0]) != len(codes[1]) else None


def _rest(name: str, recording: Path) -> str | None:
    """What follows a recording's name, or its stem, in the name of a file."""
    for stem in (nfc(recording.name), nfc(recording.stem)):
        if name.startswith(stem + "."):
            return name.removeprefix(stem)
    return None


def _rank(order: int) -> int:
    """0 for exact times, 1 for subtitles, 2 for plain text."""
    return (order >= len(_EXACT)) + (order >= len(_EXACT) + len(_SUBTITLES))


def _order(path: Path, ending: str) -> int | str:
    """The place of a file in the order of preference, or why it is passed over."""
    if ending in _NOT_READ:
        return f"{ending} is not read: save it as .srt"
    if ending not in (*_TEXTS, ".json"):
        return _ORDER.index(ending)
    try:
        text = _decoded(path)
        if ending == ".json":
            _whisper(text, path.name)
            return _ORDER.index(ending)
    except RowError as error:
        return str(error).removeprefix(f"{path.name} ")
    kinds = {"a Praat TextGrid": ".textgrid", "Audacity labels": ".labels.txt", "SubRip subtitles": ".srt"}
    kind = {**kinds, "WebVTT subtitles": ".vtt"}.get(_kind(text) or "", ending)
    if kind == ending and (what := foreign_format(text)) is not None:
        return f"it holds {what}"
    return _ORDER.index(kind) if is_speakable(text) else "it has no words"


def _decoded(path: Path) -> str:
    data = read_whole(path)
    try:
        text = decode(data)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RowError(
            "no_transcript", f"{path.name} is not UTF-8 or UTF-16 ({error.reason} in line {line}): convert it"
        ) from error
    return _LINE_END.sub("\n", text.replace("\ufeff", ""))


def _kind(text: str) -> str | None:
    """What a text is; None where it has no times."""
    text = text.lstrip()
    if text.startswith("WEBVTT"):
        return "WebVTT subtitles"
    if BEGINNING.match(text):
        return "a Praat TextGrid"
    if text.startswith(("{", "[{")) and not text.startswith("{\\"):
        return "Whisper's JSON"
    if _LABEL.fullmatch(text.partition("\n")[0].rstrip()):
        return "Audacity labels"
    return "SubRip subtitles" if _TIMED.search(text) else None


def _whisper(text: str, name: str) -> list[RawCue]:
    try:
        segments = whisper_segments(json.loads(text), name)
    except (ValueError, RecursionError) as error:
        if isinstance(error, RowError):
            raise
        raise RowError("no_transcript", f"{name} is not JSON: {error}") from error
    return [
        RawCue(
            segment["start"],
            segment["end"],
            f"{name}, segment {shown(segment['text'])}",
            [segment["text"]],
            [segment["speaker"]] if isinstance(segment["speaker"], str) and segment["speaker"] else [],
        )
        for segment in segments
    ]


def _textgrid(text: str, name: str) -> tuple[list[RawCue], list[str], tuple[str, ...]]:
    """The cues of a TextGrid, the names of their tiers, and those of tiers that are not used."""
    tiers = parse_textgrid(text, name)
    intervals, used = spoken_intervals(tiers, name)
    left = (tier for tier in tiers if tier.name not in used and (tier.is_points or tier.intervals))
    raws = [
        RawCue(i.start, i.end, f"{name}:{i.line}", i.text.split("\n"), [i.speaker] if i.speaker else [])
        for i in intervals
    ]
    return raws, used, tuple(tier.name for tier in left if tier.is_points or tier.kind[1] != "speakers")


def _labels(text: str, name: str) -> list[RawCue]:
    raws = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.startswith("\\\t"):
            continue
        found = _LABEL.fullmatch(line.rstrip())
        if found is None:
            raise RowError(
                "no_transcript", f"{name}:{number}: {shown(line)} is not start, end and text with tabs: correct it"
            )
        start, end = (float(time.replace(",", ".")) for time in found.groups()[:2])
        raws.append(RawCue(start, end, f"{name}:{number}", [found[3] or ""]))
    return raws


def _subtitles(text: str, name: str) -> list[RawCue]:
    """The cues of SubRip or WebVTT. Empty lines within a cue, and missing ones between cues, do no harm."""
    in_header = is_vtt = text.lstrip().startswith("WEBVTT")
    in_comment = has_ids = False
    raws: list[RawCue] = []
    before = lines = [""]  # of the cue
    for number, line in enumerate((line.strip() for line in text.split("\n")), 1):
        if ("-->" in line or _TIMED.match(line)) and not in_comment:
            has_ids |= _remove_id(lines, is_vtt, has_ids or not raws)
            in_header = False
            start, end = _times(line, f"{name}:{number}")
            raws.append(RawCue(start, end, f"{name}:{number}", lines := []))
        elif not line:
            in_header = in_comment = False
            lines.append(line)
        elif is_vtt and lines and not lines[-1] and _COMMENT.match(line):
            in_comment = True
        elif not in_header and not in_comment:
            lines.append(line)
    if lost := next((line for line in before if line), None):
        raise RowError("no_transcript", f"{name}: the text {shown(lost)} stands before the first time: remove it")
    for raw in raws:
        content = "\n".join(raw.lines).replace("\\N", "\n").replace("\\h", " ")
        voices = (" ".join(without_entities(voice).split()) for voice in _VOICE.findall(content))
        raw.speakers = [voice for voice in voices if voice]
        raw.lines = without_entities(_TAG.sub("", content)).split("\n")
    return raws


def _remove_id(lines: list[str], is_vtt: bool, has_ids: bool) -> bool:
    """Remove the id of the next cue from the lines before it. Whether there was one."""
    place = max((place for place, line in enumerate(lines) if line), default=-1)
    touches, begins = place == len(lines) - 1, place > 0 and not lines[place - 1]
    is_number = place >= 0 and lines[place].isdecimal()
    found = (touches and begins and is_vtt) or (is_number and (begins or (touches and has_ids)))
    if found:
        del lines[place:]
    return found


def _times(line: str, place: str) -> tuple[float, float]:
    before, _, after = line.partition("-->")
    found = [_CLOCK.fullmatch(side) for side in (before.strip(), (after.split() or [""])[0])]
    if None in found:
        raise RowError(
            "no_transcript", f"{place}: {shown(line)} is not a time such as 00:01:02,500 --> 00:01:04,000: correct it"
        )
    start, end = (int(f[1] or 0) * 3600 + int(f[2]) * 60 + float(f[3].replace(",", ".")) for f in found if f)
    return round(start, 3), round(end, 3)


def _cues(raws: list[RawCue], read_as: str, tiers: tuple[str, ...] = (), *, are_subtitles: bool = False) -> Cues:
    """The cues of any format: checked, sorted, with what is not said apart."""
    for raw in raws:
        if not (math.isfinite(raw.start) and math.isfinite(raw.end) and 0 <= raw.start <= raw.end):
            raise RowError(
                "no_transcript",
                f"{raw.place}: {raw.start:g} to {raw.end:g} s is not a stretch of a recording: correct the times",
            )
        raw.lines = [plain for line in raw.lines if (plain := " ".join(line.split()))]
    raws = sorted(raws, key=lambda raw: raw.start)
    is_name = speaker_labels(raws)
    found = Cues([], read_as)
    mixed = 0
    for raw in raws:
        speakers, turns, said, marks = list(raw.speakers), 0, [], []
        whole = is_mark(" ".join(raw.lines), are_subtitles)
        for line in raw.lines:
            rest, dash, name = speech_of(line, is_name)
            if whole or is_mark(rest, are_subtitles):
                marks.append(line)
                continue
            turns += dash
            speakers += [name] if name else []
            said.append(rest)
        names = list(dict.fromkeys(speakers))
        several = len(names) > 1 or turns > 1
        speaker = names[0] if names and not several else None
        if marks:
            found.not_speech.append(Cue(raw.start, raw.end, joined(marks), None))
        if said:
            cue = Cue(raw.start, raw.end, joined(said), speaker)
            (found.cues if raw.end > raw.start else found.without_length).append(cue)
            mixed += several
        elif not marks:
            found.without_text.append(Cue(raw.start, raw.end, "", speaker))
    unique = list(dict.fromkeys(found.cues))
    return Cues(unique, read_as, found.not_speech, found.without_text, found.without_length, tiers, mixed)
