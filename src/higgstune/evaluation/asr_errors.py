"""Measures of the words in a clip: errors of its transcript against its text, and words leaked from its reference.

A recording of the same text is transcribed as well, so that its errors show how many are the ASR's own.
"""

import importlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from higgstune.data.audio import resample
from higgstune.data.text import clean_text, without_tags
from higgstune.errors import ConfigError, WorkError
from higgstune.evaluation.clips import Clip
from higgstune.evaluation.judges.base import RATE, ClipTranscriber, Transcriber

LEAK_SECONDS = 3.0  # of a clip's beginning
LEAK_WORDS = 3  # fewer words of the reference are chance; two characters of a script without spaces count as a word
LEAK_ERRORS = 0.2  # maximum error rate of leaked words against the reference's text
LONG_LEAK = 6  # words; so many do not fit by chance,
LONG_LEAK_ERRORS = 0.34  # so more errors of the ASR are allowed
LEAK_MARGIN = 0.6  # the error rate against the clip's own text is higher by at least this much
_SOUND = re.compile(r"<SE(?:_[se])?>.*?</SE(?:_[se])?>")  # laughter and the like are not said in words
_SPEAKER_TAG = re.compile(r"\[SPEAKER\d+\]")
_BRACKETS = re.compile(r"[()\[\]{}<>]")
_THOUSANDS = re.compile(r"(?<!\d)\d{1,3}([.,'’ ])\d{3}(?:\1\d{3})*(?!\d)")
# Han, kana and their marks; Thai and Lao, Burmese, Khmer: written without spaces between words.
_UNSPACED = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
)
_MARKS = "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd\u102b-\u103e\u17b4-\u17d3\u17dd"
_CHARACTER = re.compile(rf"([{_UNSPACED}][{_MARKS}]*)")
# Within a text without spaces: such a character with its marks, or a run of others.
UNSPACED_OR_RUN = re.compile(rf"[{_UNSPACED}][{_MARKS}]*|[^{_UNSPACED}]+")
_ARABIC_VOWELS = re.compile("[\u0591-\u05bd\u05bf-\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06ed]")
# Spellings that writers, and therefore recognisers, do not keep apart.
_ARABIC_LETTERS = str.maketrans("أإآٱىة", "ااااي" + "ه")

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Errors:
    """Substitutions, deletions and insertions, and the lengths of the reference text."""

    word_errors: int
    words: int
    char_errors: int
    chars: int


@dataclass(frozen=True)
class Leak:
    """The beginning of a clip against the text of its reference."""

    errors: int  # against the stretch of the reference's text that fits best
    words: int  # of the transcript
    leaks: bool


def add_errors(clips: Sequence[Clip], rows: Rows, asr: Transcriber) -> None:
    """Fill in `transcript`, `babbles`, `word_errors`, `words`, `char_errors` and `chars`; for clips with a recording of
    their text also `recording_*`.
    """
    transcripts = _transcripts(asr, [(clip.file, clip.language) for clip in clips])
    recorded = _transcripts(asr, [(clip.recording, clip.language) for clip in clips if clip.recording is not None])
    for clip, row in zip(clips, rows, strict=True):
        row["transcript"] = transcripts[clip.file, clip.language]
        row |= vars(count_errors(clip.text, row["transcript"], clip.language))
        row["babbles"] = int(row["word_errors"] > row["words"])
        if clip.recording is not None:
            row["recording_transcript"] = recorded[clip.recording, clip.language]
            errors = vars(count_errors(clip.text, row["recording_transcript"], clip.language))
            row |= {f"recording_{name}": value for name, value in errors.items()}


def add_leaks(clips: Sequence[Clip], rows: Rows, asr: Transcriber) -> None:
    """Fill in `opening_transcript`, `leak_word_errors`, `leak_words` and `leaks` for clips whose reference has a known
    text.
    """
    wanted = [(clip.file, clip.language) for clip in clips if clip.reference_text is not None]
    transcripts = _transcripts(asr, wanted, seconds=LEAK_SECONDS)
    for clip, row in zip(clips, rows, strict=True):
        if clip.reference_text is None:
            continue
        row["opening_transcript"] = transcripts[clip.file, clip.language]
        leak = find_leak(row["opening_transcript"], clip.reference_text, clip.text, clip.language)
        row |= {"leak_word_errors": leak.errors, "leak_words": leak.words, "leaks": int(leak.leaks)}


def count_errors(reference: str, transcript: str, language: str | None = None) -> Errors:
    """Errors of a transcript, both sides normalised alike. Raises ConfigError if jiwer is not installed.

    If the reference has no words, every word of the transcript is an insertion.
    """
    wanted, found = normalize_spoken(reference, language), normalize_spoken(transcript, language)
    word_errors, words = _edits(words_of(wanted), words_of(found))
    char_errors, chars = _edits(wanted, found)
    return Errors(word_errors, words, char_errors, chars)


def word_error_rate(references: Sequence[str], transcripts: Sequence[str], language: str | None = "en") -> float:
    """Word errors over words of the references, summed over the corpus; infinite if there are errors but no words."""
    counts = [count_errors(*pair, language) for pair in zip(references, transcripts, strict=True)]
    errors, words = sum(count.word_errors for count in counts), sum(count.words for count in counts)
    if words == 0:
        return float("inf") if errors else 0.0
    return errors / words


def word_check(asr: ClipTranscriber, sample_rate: int) -> Callable[[str, np.ndarray], float]:
    """A function that gives the share of wrong words in speech, of its text and its waveform [samples] at
    `sample_rate`, in the language that the ASR finds.
    """

    def check(text: str, waveform: np.ndarray) -> float:
        [transcript] = asr.transcribe_clips([resample(waveform, sample_rate, RATE)], None)
        return word_error_rate([text], [transcript.text], None)

    return check


def find_leak(transcript: str, reference_text: str, text: str, language: str | None = None) -> Leak:
    """Whether a clip begins with any stretch of words of its reference, and not with its own text.

    It does if, for some number of first words, there are nearly no errors against a stretch of the reference's text,
    and clearly more against the beginning of the clip's text. So words that both texts share are not a leak.
    """
    said, reference, own = (words_of(normalize_spoken(one, language)) for one in (transcript, reference_text, text))
    leaked = _prefix_errors(said, reference, anywhere=True)
    spoken = _prefix_errors(said, own, anywhere=False)
    leaks, worth = False, 0.0
    for count in range(1, len(said) + 1):
        worth += 0.5 if is_unspaced(said[count - 1]) else 1
        few = leaked[count] <= (LONG_LEAK_ERRORS if worth >= LONG_LEAK else LEAK_ERRORS) * count
        leaks |= worth >= LEAK_WORDS and few and spoken[count] - leaked[count] >= LEAK_MARGIN * count
    return Leak(leaked[len(said)], len(said), leaks)


def normalize_spoken(text: str, language: str | None = None) -> str:
    """The form in which errors are counted: words with one space between, without punctuation, case and sound tags.

    English goes through Whisper's normaliser (spelled-out numbers become digits, contractions are written out; its list
    of British spellings is not part of transformers and not used). Any other or unknown language is treated as
    Whisper's basic normaliser does it, except that vowel signs inside words stay, other than the optional ones of
    Arabic and Hebrew. Words in brackets stay too: they are spoken. Source: Radford et al. 2022, appendix C.
    """
    text = _BRACKETS.sub(" ", _SPEAKER_TAG.sub(" ", _SOUND.sub(" ", clean_text(without_tags(text)))))
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
    """Words of a normalised text; in scripts without spaces, every character with its marks is a word."""
    return _CHARACTER.sub(r" \1 ", normalized).split()


def is_unspaced(word: str) -> bool:
    """Whether a word is one character of a script without spaces."""
    return _CHARACTER.fullmatch(word) is not None


def primary_language(language: str | None) -> str | None:
    """The ISO 639 code of a language tag: "en" of "en-US"."""
    return None if language is None else re.split("[-_]", language.strip().lower())[0]


def jiwer_library() -> Any:
    """The module jiwer. Raises ConfigError if the extra `asr` is not installed."""
    try:
        return importlib.import_module("jiwer")
    except ImportError as error:
        raise ConfigError("error rates need jiwer: pip install 'higgstune[asr]'") from error


def _transcripts(
    asr: Transcriber, wanted: Sequence[tuple[Path, str | None]], *, seconds: float | None = None
) -> dict[tuple[Path, str | None], str]:
    """Transcripts by file and language, each made once; one call per language."""
    by_language = defaultdict(list)
    for file, language in dict.fromkeys(wanted):
        by_language[language].append(file)
    transcripts: dict[tuple[Path, str | None], str] = {}
    for language, files in by_language.items():
        texts = asr.transcribe(files, language=language, seconds=seconds)
        if len(texts) != len(files):
            raise WorkError(f"the ASR {asr.name} gave {len(texts)} texts for {len(files)} files")
        transcripts |= {(file, language): text for file, text in zip(files, texts, strict=True)}
    return transcripts


def _edits(wanted: Sequence[str], found: Sequence[str]) -> tuple[int, int]:
    """Errors, and the length of `wanted`: words of lists, characters of strings."""
    if not wanted or not found:
        return max(len(wanted), len(found)), len(wanted)
    jiwer = jiwer_library()
    if isinstance(wanted, str):
        done = jiwer.process_characters(wanted, found)
    else:
        done = jiwer.process_words(" ".join(wanted), " ".join(found))
    return done.substitutions + done.deletions + done.insertions, len(wanted)


def _prefix_errors(said: Sequence[str], text: Sequence[str], *, anywhere: bool) -> list[int]:
    """Fewest errors of the first 0, 1, 2 ... words said against a stretch of a text, from its start or `anywhere`."""
    row = [0] * (len(text) + 1) if anywhere else list(range(len(text) + 1))
    best = [min(row)]
    for count, word in enumerate(said, 1):
        new = [count]
        for at, wanted in enumerate(text):
            new.append(min(row[at] + (word != wanted), row[at + 1] + 1, new[at] + 1))
        row = new
        best.append(min(row))
    return best


def _ascii_digit(character: str) -> str:
    value = unicodedata.decimal(character, None)
    return character if value is None else str(value)


@cache
def _english() -> Any:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})
