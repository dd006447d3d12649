"""Transcripts: the words of a clip, and nothing else that a text file may hold."""

import html
import re
from pathlib import Path
from typing import Any

from higgstune.data.audio import is_file
from higgstune.data.manifest import Utterance
from higgstune.data.messages import is_unicode
from higgstune.data.rejection import RowError, shown
from higgstune.data.source import decode

_MAX_TRANSCRIPT = 1 << 20  # bytes: an hour of speech is 60 kB
_TIME = r"\d+(?:\.\d+)?"
_CLOCK = r"[\d:]*\d\.\d+s?"
# What a text file holds that is not a transcript: its name, and a pattern of all of it.
_FORMATS = (
    ("WebVTT subtitles", re.compile(r"\s*WEBVTT\b")),
    ("subtitles with times", re.compile(r"(?s).*\d\d:\d\d[.,:]\d.*-->")),
    ("SubStation subtitles", re.compile(r"\s*\[Script Info\]")),
    ("song lyrics with times (LRC)", re.compile(r"\s*(?:\[\w+:[^\]\n]*\]\s*)*\[\d+:\d\d(?:[.:]\d+)?\]")),
    ("Audacity labels", re.compile(rf"\s*(?:{_TIME}\t{_TIME}(?:\t[^\n]*)?(?:\n\\\t[^\n]*)?(?:\n|$)\s*)+\Z")),
    (
        "labels with times",
        re.compile(r"\s*(?:\[?[\d:]*\d\.\d+s?(?: +| +-+> +)[\d:]*\d\.\d+s?\]? +\S[^\n]*(?:\n|$)\s*)+\Z"),
    ),
    ("a speaker and times", re.compile(r"\s*(?:Speaker \d+|[^\n:]{1,30})?\s*\d{1,2}:\d\d(?::\d\d)?\s*\n")),
    ("the words of LRS with times", re.compile(r"\s*Text:[^\n]*\n\s*Conf:")),
    ("phonemes (ARPAbet)", re.compile(r"(?=.*[A-Z][012])\s*(?:[A-Z]{1,2}[012]?\s+){2,}[A-Z]{1,2}[012]?\s*\Z")),
    ("a path", re.compile(r"\s*\S*[/\\]\S+\.\w{2,5}\s*\Z")),
    ("phones, one a line", re.compile(r"\s*(?:[A-Za-z@]{1,3}[012]?\s*\n\s*){3,}[A-Za-z@]{0,3}[012]?\s*\Z")),
    ("HTK labels", re.compile(r"\s*(?:\d+ +\d{4,} +\S[^\n]*(?:\n|$)\s*)+\Z")),
    ("a Praat TextGrid", re.compile(r'\s*File type\s*=\s*"ooTextFile')),
    ("a table of phones (CTM, MFA)", re.compile(r"\s*(?:\S+ +\d +\d+\.\d+ +\d+\.\d+ +\S+[^\n]*(?:\n|$)\s*)+\Z")),
    ("rich text (RTF)", re.compile(r"\s*\{\\rtf")),
    ("LaTeX", re.compile(r"\s*\\documentclass")),
    ("a PDF", re.compile(r"\s*%PDF-")),
    ("JSON", re.compile(r'(?s)\s*(?:\{\s*"|\[\s*[{"\[]).*[}\]]\s*\Z')),
    ("markup (XML, HTML or SSML)", re.compile(r"(?i)\s*<(?:\?xml|!doctype|html|speak|tt|p|div|body|span)\b")),
    ("a pointer of Git LFS in place of the file", re.compile(r"version https://git-lfs")),
)
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
    if (name := _format(text)) is not None:
        raise RowError("no_transcript", f"{path.name} holds {name}: write the words of the clip alone")
    return text


def _format(text: str) -> str | None:
    """What a text is in place of a transcript; None where it may be one."""
    found = next((name for name, pattern in _FORMATS if pattern.match(text)), None)
    marks = len(_STRESS.findall(text))
    return "phonemes (IPA)" if found is None and marks and marks >= len(text) // 30 else found


def plain_row(row: Utterance) -> Utterance:
    """The row with entities (`&amp;`) and written-out line ends (`\\\\n`) of its texts decoded.

    Raises RowError for tags (`<b>`), which are not words, and for NUL characters.
    """
    changed: dict[str, Any] = {}
    for name in ("text", "reference_text"):
        text = getattr(row, name)
        if text is not None and (plain := _plain(text)) != text:
            changed[name] = plain
    return row.model_copy(update=changed) if changed else row


def _plain(text: str) -> str:
    if not is_unicode(text):
        raise RowError("bad_row", "the text is not UTF-8: convert its file")
    if found := _CONTROL.search(text):
        raise RowError("bad_row", f"the text {shown(text)} holds the control character {found[0]!r}, which is not text")
    if (name := _format(text)) is not None:
        raise RowError("bad_row", f"the text {shown(text)} holds {name}: write the words of the clip alone")
    plain = text
    if "&" in plain:
        plain = _ENTITY.sub(lambda found: html.unescape(found[0]), plain)
    if "\\" in plain:
        plain = _ESCAPED_SPACE.sub(" ", plain)
    if "<" in plain and (tag := _TAG.search(plain)):
        raise RowError("bad_row", f"the text has the tag {shown(tag[0])}, which is not a word: remove it")
    return plain
