"""Transcripts: the words of a clip, and nothing else that a text file may hold."""

import html
import re
from pathlib import Path
from typing import Any

from higgstune.checkpoint_files import LFS_POINTER
from higgstune.data.audio import is_file
from higgstune.data.manifest import Utterance
from higgstune.data.messages import is_unicode
from higgstune.data.rejection import RowError, shown
from higgstune.data.source import decode

COLLECT = "higgstune collect {} --out DATASET"  # the verb for long recordings
_MAX_TRANSCRIPT = 1 << 20  # bytes: an hour of speech is 60 kB
_TIME = r"\d+(?:\.\d+)?"
_CLOCK = r"[\d:]*\d\.\d+s?"
# What a text file holds that is not a transcript: its name, and how it begins.
_BEGINNINGS = (
    ("WebVTT subtitles", re.compile(r"WEBVTT\b")),
    ("SubStation subtitles", re.compile(r"\[Script Info\]")),
    ("a speaker and times", re.compile(r"(?:Speaker \d+)?\s*\d{1,2}:\d\d(?::\d\d)?\n")),
    ("the words of LRS with times", re.compile(r"Text:[^\n]*\nConf:")),
    ("a Praat TextGrid", re.compile(r'File type\s*=\s*"ooTextFile')),
    ("rich text (RTF)", re.compile(r"\{\\rtf")),
    ("LaTeX", re.compile(r"\\documentclass")),
    ("a PDF", re.compile(r"%PDF-")),
    ("JSON", re.compile(r'(?s)(?:\{\s*"|\[\s*[{"\[]).*[}\]]\Z')),
    ("markup (XML, HTML or SSML)", re.compile(r"(?i)<(?:\?xml|!doctype|html|speak|tt|p|div|body|span)\b")),
    ("a pointer of Git LFS in place of the file", re.compile(LFS_POINTER.decode())),
)
# The same, and what each of its lines is, of which there are so many at least.
_LINES = (
    ("song lyrics with times (LRC)", 1, re.compile(r"\[\d+:\d\d(?:[.:]\d+)?\].*|\[[a-z]+:.*\]")),
    ("Audacity labels", 1, re.compile(rf"{_TIME}\t{_TIME}(?:\t.*)?|\\\t.*")),
    ("labels with times", 1, re.compile(rf"\[{_CLOCK} (?:-+> )?{_CLOCK}\] .+|{_CLOCK} -+> {_CLOCK} .+")),
    ("labels with times", 2, re.compile(rf"{_CLOCK} +{_CLOCK} +.+")),
    ("HTK labels", 1, re.compile(r"\d+ +\d{4,} +.+")),
    ("a table of phones (CTM, MFA)", 1, re.compile(r"\S+ +\d +\d+\.\d+ +\d+\.\d+ +.+")),
    ("phones, one a line", 4, re.compile(r"sil|sp|pau|[A-Za-z]{1,2}[012@]|[A-Z]{1,2}|[a-z]{1,2}")),
)
_WITH_CUES = ("WebVTT subtitles", "a Praat TextGrid", "Audacity labels", "subtitles with times")
_SUBTITLE = re.compile(r"\d\d:\d\d[.,:]\d.*-->")
_SILENCE = ("sil", "sp", "pau")
_ARPABET = re.compile(r"[A-Z]{1,2}[012]?")
_PATH = re.compile(r"\S*[/\\]\S+\.\w{2,5}")
_MAX_PATH = 500  # characters
_SOUND_TAG = r"/?SE(?:_[se])?"  # of the model
_TAG = re.compile(rf"<(?!{_SOUND_TAG}>|\|)/?[A-Za-z][A-Za-z0-9:_-]*(?:\s[^<>]*)?/?>")
_ENTITY = re.compile(r"&(?:#\d+|#x[0-9a-fA-F]+|[A-Za-z][A-Za-z0-9]*);")
_STRESS = re.compile("[ˈˌː]")  # marks of the IPA alone
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_ESCAPED_SPACE = re.compile(r"\\[nrt]")


def read_transcript(path: Path) -> str:
    """The text of a transcript file. Raises RowError where it is missing, too long, not text, or of another format."""
    if not is_file(path):  # reading a pipe would block
        raise RowError("no_transcript", f"there is no transcript file {path.name}")
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_TRANSCRIPT + 1)
    except (OSError, ValueError) as error:
        raise RowError("no_transcript", f"the transcript {path.name} cannot be read: {error}") from error
    if len(data) > _MAX_TRANSCRIPT:
        raise RowError("no_transcript", f"{path.name} is longer than 1 MB: it is not the transcript of one clip")
    try:
        text = decode(data)
    except UnicodeDecodeError as error:
        raise RowError(
            "no_transcript", f"{path.name} is not UTF-8 ({error.reason} at byte {error.start}): convert it"
        ) from error
    if (name := foreign_format(text)) is not None:
        cut = f", or cut it by its times: {COLLECT.format('FOLDER')}" if name in _WITH_CUES else ""
        raise RowError("no_transcript", f"{path.name} holds {name}: write the words of the clip alone{cut}")
    return text


def foreign_format(text: str) -> str | None:
    """What a text is in place of a transcript; None where it may be one. Takes time in proportion to its length."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    whole = "\n".join(lines)
    found = next((name for name, pattern in _BEGINNINGS if pattern.match(whole)), None)
    found = found or next((n for n, least, p in _LINES if len(lines) >= least and all(map(p.fullmatch, lines))), None)
    if found == "phones, one a line" and not any(line in _SILENCE or line[-1] in "012@" for line in lines):
        found = None  # short words
    if found is None and "-->" in whole and any(map(_SUBTITLE.search, lines)):
        found = "subtitles with times"
    words = whole[:_MAX_PATH].split()
    if found is None and len(words) > 2 and all(map(_ARPABET.fullmatch, words)) and any(w[-1] in "012" for w in words):
        found = "phonemes (ARPAbet)"
    if found is None and len(whole) < _MAX_PATH and _PATH.fullmatch(whole):
        found = "a path"
    marks = len(_STRESS.findall(whole))
    return "phonemes (IPA)" if found is None and marks and marks >= len(whole) // 30 else found


def plain_row(row: Utterance) -> Utterance:
    """The row with entities (`&amp;`) and written-out line ends (`\\\\n`) of its texts decoded.

    Raises RowError for tags (`<b>`), which are not words, and for NUL characters.
    """
    changed: dict[str, Any] = {}
    for name in ("text", "reference_text"):
        text = getattr(row, name)
        if text is not None and (plain := plain_text(text)) != text:
            changed[name] = plain
    return row.model_copy(update=changed) if changed else row


def plain_text(text: str) -> str:
    """A text with entities and written-out line ends decoded. Raises RowError for one that is not only words."""
    if not is_unicode(text):
        raise RowError("bad_row", "the text is not UTF-8: convert its file")
    if found := _CONTROL.search(text):
        raise RowError("bad_row", f"the text {shown(text)} holds the control character {found[0]!r}, which is not text")
    if (name := foreign_format(text)) is not None:
        raise RowError("bad_row", f"the text {shown(text)} holds {name}: write the words of the clip alone")
    plain = without_entities(text)
    if "\\" in plain:
        plain = _ESCAPED_SPACE.sub(" ", plain)
    if "<" in plain and (tag := _TAG.search(plain)):
        raise RowError("bad_row", f"the text has the tag {shown(tag[0])}, which is not a word: remove it")
    return plain


def without_entities(text: str) -> str:
    """A text with its entities (`&amp;`, `&#39;`) as the characters that they stand for."""
    return _ENTITY.sub(lambda found: html.unescape(found[0]), text) if "&" in text else text
