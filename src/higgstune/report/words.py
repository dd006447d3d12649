"""Which words of what was heard are not those of the text."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

# Scripts without spaces are compared by character.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_ALIKE = 0.3  # of the words, at least
_TOKEN = re.compile(rf"([{_UNSPACED}]|[^\s{_UNSPACED}]+)(\s*)")


@dataclass(frozen=True)
class Piece:
    """A stretch of words: as they should be, wrong (heard, but not in the text), or missed (in the text alone)."""

    kind: Literal["right", "wrong", "missed"]
    words: str
    space: str = " "  # after it


def marked(text: str, heard: str, *, at_most: int) -> list[Piece]:
    """What was heard as stretches, with the words that were missed where they are missing.

    Case, punctuation and accents' encoding do not count. Where little is right, all that was heard is wrong: words that
    match by chance would only confuse. After `at_most` words it ends with how many are left.
    """
    want, got = _tokens(text), _tokens(heard)
    matcher = SequenceMatcher(None, [key for key, _, _ in want], [key for key, _, _ in got], autojunk=False)
    if got and matcher.ratio() < _ALIKE:
        return _shortened("wrong", got, 0, len(got), at_most)
    pieces: list[Piece] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind != "equal" and b > a:
            pieces.append(_piece("missed", want[a:b]))
        if d > c:
            pieces += _shortened("right" if kind == "equal" else "wrong", got, c, d, at_most)
        if d > at_most:
            break
    return pieces


def _shortened(
    kind: Literal["right", "wrong"], words: Sequence[tuple[str, str, str]], start: int, end: int, at_most: int
) -> list[Piece]:
    """The words from `start` to `end` as one piece; where they reach beyond `at_most`, how many are left is another."""
    pieces = [_piece(kind, words[start : min(end, at_most)])] if start < at_most else []
    if end > at_most:
        pieces.append(Piece("wrong", f"… and {len(words) - at_most} more"))
    return pieces


def _tokens(text: str) -> list[tuple[str, str, str]]:
    """Each word as it is compared, as it is written, and the space after it. Punctuation alone is no word."""
    found = [(_key(word), word, " " if space else "") for word, space in _TOKEN.findall(text)]
    return [token for token in found if token[0]]


def _key(word: str) -> str:
    folded = unicodedata.normalize("NFKC", word).casefold()
    return "".join(c for c in folded if unicodedata.category(c)[0] in "LMN")


def _piece(kind: Literal["right", "wrong", "missed"], tokens: Sequence[tuple[str, str, str]]) -> Piece:
    written = "".join(word + space for _, word, space in tokens)
    spaced = any(space for _, _, space in tokens) or not re.fullmatch(rf"[{_UNSPACED}\W]*", written)
    return Piece(kind, written.strip(), " " if spaced else "")
