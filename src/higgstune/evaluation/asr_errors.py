"""What the clips say: errors against their texts, the same for recordings, and words leaked from the reference."""

import importlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from higgstune.data.text import clean_text
from higgstune.errors import ConfigError, WorkError
from higgstune.evaluation.clips import Clip
from higgstune.evaluation.judges.base import Transcriber

_SOUND = re.compile(r"<SE(?:_[se])?>.*?</SE(?:_[se])?>")  # laughter and the like are not said in words
_SPEAKER_TAG = re.compile(r"\[SPEAKER\d+\]")
_BRACKETS = re.compile(r"[()\[\]{}<>]")
_THOUSANDS = re.compile(r"(?<!\d)\d{1,3}([.,'’ ])\d{3}(?:\1\d{3})*(?!\d)")
# Han, kana and their marks, Thai, Lao, Burmese, Khmer: written without spaces between words.
_UNSPACED = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"


_UNSPACED += "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"


_MARKS = "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd\u102b-\u103e\u17b4-\u17d3\u17dd"
_CHARACTER = re.compile(rf"([{_UNSPACED}][{_MARKS}]*)")
_ARABIC_VOWELS = re.compile("[\u0591-\u05bd\u05bf-\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06ed]")
_ARABIC_LETTERS = str.maketrans(
    "أإآٱىة", "ااااي" + "ه"
)  # spellings that writers, and so recognisers, do not keep apart


@dataclass(frozen=True)
class Errors:
    """Substitutions, deletions and insertions, and the length of what should be said."""

    word_errors: int
    words: int
    char_errors: int
    chars: int


def count_errors(reference: str, heard: str, language: str | None = None) -> Errors:
    """Errors of what was heard, both sides normalised alike. Raises ConfigError where jiwer is not installed.

    Where the reference has no words, all that was heard is inserted.
    """
    wanted, found = normalize_spoken(reference, language), normalize_spoken(heard, language)
    word_errors, words = _edits(words_of(wanted), words_of(found))
    char_errors, chars = _edits(wanted, found)
    return Errors(word_errors, words, char_errors, chars)


def word_error_rate(references: Sequence[str], heard: Sequence[str], language: str | None = "en") -> float:
    """Word errors over words of the references, summed over the corpus; infinite where those have none but errors."""
    counts = [count_errors(*pair, language) for pair in zip(references, heard, strict=True)]
    errors, words = sum(count.word_errors for count in counts), sum(count.words for count in counts)
    if words == 0:
        return float("inf") if errors else 0.0
    return errors / words


def normalize_spoken(text: str, language: str | None = None) -> str:
    """A text as errors are counted in it: words with one space between, without punctuation, case and sound tags.

    English goes through Whisper's normaliser (spelled-out numbers become digits, contractions are written out; its
    list of British spellings is not part of transformers and not used). Any other language, and an unknown one, as
    Whisper's basic normaliser does it, but vowel signs inside words stay, except those that Arabic and Hebrew leave
    out at will. Words in brackets stay too: they are spoken. Source: Radford et al. 2022, appendix C.
    """
    text = _BRACKETS.sub(" ", _SPEAKER_TAG.sub(" ", _SOUND.sub(" ", clean_text(text))))
    if primary_language(language) == "en":
        text = _english()(text)
    else:
        text = _ARABIC_VOWELS.sub("", unicodedata.normalize("NFKC", text)).translate(_ARABIC_LETTERS).lower()
        text = "".join(map(_ascii_digit, text)).replace("i\u0307", "i")  # of the Turkish capital
        text = _THOUSANDS.sub(lambda number: number[0].replace(number[1], ""), text)
        text = "".join(" " if unicodedata.category(c)[0] in "SPZC" else c for c in text)
    spaced = " ".join(word for word in text.split() if any(c.isalnum() for c in word))
    return re.sub(rf"(?<=[{_UNSPACED}{_MARKS}]) | (?=[{_UNSPACED}])", "", spaced)


def words_of(normalized: str) -> list[str]:
    """Words of a normalised text; in scripts without spaces every character, with its marks, is one."""
    return _CHARACTER.sub(r" \1 ", normalized).split()


def is_unspaced(word: str) -> bool:
    """Whether a word is one character of a script without spaces."""
    return _CHARACTER.fullmatch(word) is not None


def primary_language(language: str | None) -> str | None:
    """The ISO 639 code of a language tag: "en" of "en-US"."""
    return None if language is None else re.split("[-_]", language.strip().lower())[0]


def jiwer_library() -> Any:
    """Jiwer. Raises ConfigError where the extra `asr` is not installed."""
    try:
        return importlib.import_module("jiwer")
    except ImportError as error:
        raise ConfigError("error rates need jiwer: pip install 'higgstune[asr]'") from error


def _edits(wanted: Sequence[str], found: Sequence[str]) -> tuple[int, int]:
    """Errors, and the length of what was wanted: words of lists, characters of strings."""
    if not wanted or not found:
        return max(len(wanted), len(found)), len(wanted)
    jiwer = jiwer_library()
    if isinstance(wanted, str):
        done = jiwer.process_characters(wanted, found)
    else:
        done = jiwer.process_words(" ".join(wanted), " ".join(found))
    return done.substitutions + done.deletions + done.insertions, len(wanted)


def _ascii_digit(character: str) -> str:
    value = unicodedata.decimal(character, None)
    return character if value is None else str(value)


@cache
def _english() -> Any:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


LEAK_SECONDS = 3.0  # of a clip's beginning
LEAK_WORDS = 3  # fewer words of the reference are chance; two characters of a script without spaces count as a word
LEAK_ERRORS = 0.2  # error rate, at most, of leaked words against the reference's text
LONG_LEAK = 6  # words; so many do not fit by chance,
LONG_LEAK_ERRORS = 0.34  # so an ASR may mishear more of them
LEAK_MARGIN = 0.6  # as much more, at least, is it against the clip's own text

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Leak:
    """The beginning of a clip against the text of its reference."""

    errors: int  # against the stretch of the reference's text that fits best
    words: int  # heard
    leaks: bool


def add_errors(clips: Sequence[Clip], rows: Rows, asr: Transcriber) -> None:
    """Fill `heard`, `babbles`, `word_errors`, `words`, `char_errors`, `chars`, and `recording_*` where there is one."""
    heard = _heard(asr, [(clip.file, clip.language) for clip in clips])
    recorded = _heard(asr, [(clip.recording, clip.language) for clip in clips if clip.recording is not None])
    for clip, row in zip(clips, rows, strict=True):
        row["heard"] = heard[clip.file, clip.language]
        row |= vars(count_errors(clip.text, row["heard"], clip.language))
        row["babbles"] = int(row["word_errors"] > row["words"])
        if clip.recording is not None:
            row["recording_heard"] = recorded[clip.recording, clip.language]
            errors = vars(count_errors(clip.text, row["recording_heard"], clip.language))
            row |= {f"recording_{name}": value for name, value in errors.items()}


def add_leaks(clips: Sequence[Clip], rows: Rows, asr: Transcriber) -> None:
    """Fill `heard_first`, `leak_word_errors`, `leak_words` and `leaks` of clips whose reference's text is known."""
    chosen = [clip.reference_text is not None for clip in clips]
    wanted = [(clip.file, clip.language) for clip, asked in zip(clips, chosen, strict=True) if asked]
    heard = _heard(asr, wanted, seconds=LEAK_SECONDS)
    for clip, row in zip(clips, rows, strict=True):
        if clip.reference_text is None:
            continue
        row["heard_first"] = heard[clip.file, clip.language]
        leak = find_leak(row["heard_first"], clip.reference_text, clip.text, clip.language)
        row |= {"leak_word_errors": leak.errors, "leak_words": leak.words, "leaks": int(leak.leaks)}


def find_leak(heard: str, reference_text: str, text: str, language: str | None = None) -> Leak:
    """Whether a clip begins with words of its reference, any stretch of them, and not with its own.

    For some number of first words: nearly no errors against a stretch of the reference's text, and clearly more
    against the beginning of the clip's text. Words that both texts share are so no leak.
    """
    said, reference, own = (words_of(normalize_spoken(one, language)) for one in (heard, reference_text, text))
    leaked = _prefix_errors(said, reference, anywhere=True)
    spoken = _prefix_errors(said, own, anywhere=False)
    leaks, worth = False, 0.0
    for count in range(1, len(said) + 1):
        worth += 0.5 if is_unspaced(said[count - 1]) else 1
        few = leaked[count] <= (LONG_LEAK_ERRORS if worth >= LONG_LEAK else LEAK_ERRORS) * count
        leaks |= worth >= LEAK_WORDS and few and spoken[count] - leaked[count] >= LEAK_MARGIN * count
    return Leak(leaked[len(said)], len(said), leaks)


def _prefix_errors(said: Sequence[str], text: Sequence[str], *, anywhere: bool) -> list[int]:
    """Fewest errors of the first 0, 1, 2 ... words said against a stretch of a text: from its start, or `anywhere`."""
    row = [0] * (len(text) + 1) if anywhere else list(range(len(text) + 1))
    best = [min(row)]
    for count, word in enumerate(said, 1):
        new = [count]
        for at, wanted in enumerate(text):
            new.append(min(row[at] + (word != wanted), row[at + 1] + 1, new[at] + 1))
        row = new
        best.append(min(row))
    return best


def _heard(
    asr: Transcriber, wanted: Sequence[tuple[Path, str | None]], *, seconds: float | None = None
) -> dict[tuple[Path, str | None], str]:
    """Texts of files, each transcribed once; one call a language."""
    by_language = defaultdict(list)
    for file, language in dict.fromkeys(wanted):
        by_language[language].append(file)
    heard: dict[tuple[Path, str | None], str] = {}
    for language, files in by_language.items():
        texts = asr.transcribe(files, language=language, seconds=seconds)
        if len(texts) != len(files):
            raise WorkError(f"the ASR {asr.name} gave {len(texts)} texts for {len(files)} files")
        heard |= {(file, language): text for file, text in zip(files, texts, strict=True)}
    return heard
