"""What the clips say: errors against their texts, the same for recordings, and words leaked from the reference."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgstune.errors import WorkError
from higgstune.evaluation.clips import Clip
from higgstune.evaluation.judges import Transcriber
from higgstune.evaluation.text import count_errors, is_unspaced, normalize_spoken, words_of

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
