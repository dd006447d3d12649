"""Test sets: sentences to be spoken for an evaluation.

en,de          built in: 100 sentences per language, a third each with numbers, with names, and long
tags           built in: an English sentence with each tag of a family that has tags, to guard them in fine-tuning
FILE.txt       one sentence per line
.../meta.lst   the format of Seed-TTS-eval, with references to imitate: id|prompt text|prompt wav|text, and optionally
               |wav, a recording of the text; paths are relative to the file's folder
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from higgstune.data.audio import is_file, read_audio
from higgstune.data.rejection import did_you_mean, shown
from higgstune.data.rules import TAGS
from higgstune.data.source import is_within, read_whole
from higgstune.data.text import find_control_tokens, is_speakable
from higgstune.errors import ConfigError, DataError

VALIDATION = "validation"  # not a test set of this module: rows of a store
LANGUAGES = ("ar", "de", "en", "es", "vi", "zh")  # built in, ISO 639-1
TAGGED = "tags"  # built in
PROBE_SECONDS = 0.1  # of audio that are read at once, so that a broken file fails before anything is spoken
_FIELDS = "id|prompt text|prompt wav|text, and optionally |wav"
_MAX_ID_BYTES = 200  # so that it fits into a file name


@dataclass(frozen=True)
class Sentence:
    """A text to be spoken and, if the test set names one, its voice."""

    id: str  # fit for a file name
    text: str
    language: str | None  # ISO 639-1
    speaker: str | None = None
    reference: Path | None = None  # a recording to imitate
    reference_text: str | None = None  # the words of the reference
    recording: Path | None = None  # a person's recording of the text


def read_sentences(spec: str) -> list[Sentence]:
    """The sentences of a test set, in its order; the module's docstring lists the possible specs.

    The language of a meta.lst is the name of its folder, as in Seed-TTS-eval ("zh"), if it is one of `LANGUAGES`.
    Raises ConfigError for an unknown set, and DataError, with file and line, for a file that cannot be read, has no
    sentence, an empty one or an id twice, or names audio that is missing or outside its folder.
    """
    path = Path(spec).expanduser()
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _of_lines(path)
    if suffix == ".lst":
        return _of_meta(path)
    if path.exists():
        raise ConfigError(f"the test set {spec} is neither a .txt nor a .lst file")
    languages = [language.strip() for language in spec.split(",")]
    for language in languages:
        if language not in (*LANGUAGES, TAGGED):
            raise ConfigError(
                f"there is no test set {shown(language)}: give validation (rows of the store), a .txt or a .lst file, "
                f"or a built-in one; {did_you_mean(language, (VALIDATION, *LANGUAGES, TAGGED))}"
            )
    if len(set(languages)) < len(languages):
        raise ConfigError(f"the test sets {spec} name one of them twice")
    return [sentence for language in languages for sentence in _built_in(language)]


def _built_in(name: str) -> list[Sentence]:
    text = (resources.files("higgstune.evaluation") / "sentences" / f"{name}.txt").read_text(encoding="utf-8")
    language = "en" if name == TAGGED else name
    return [Sentence(f"{name}-{number:03}", line, language) for number, line in enumerate(text.splitlines(), 1)]


def _of_lines(path: Path) -> list[Sentence]:
    lines = [_checked(text, where) for where, text in _lines(path)]
    return [Sentence(f"{number:04}", text, None) for number, text in enumerate(lines, 1)]


def _of_meta(path: Path) -> list[Sentence]:
    folder = path.parent
    name = folder.resolve().name
    language = name if name in LANGUAGES else None
    found: dict[str, str] = {}
    sentences = []
    for where, line in _lines(path):
        sentence = _parsed(line.split("|"), folder, language, where)
        if first := found.get(sentence.id):
            raise DataError(f"{where}: the id {sentence.id} is used at {first} too: give each row its own")
        found[sentence.id] = where
        sentences.append(sentence)
    return sentences


def _parsed(fields: Sequence[str], folder: Path, language: str | None, where: str) -> Sentence:
    if len(fields) not in (4, 5):
        raise DataError(f"{where}: {len(fields)} fields, where {_FIELDS} are expected")
    name, prompt_text, prompt, text, *recordings = (field.strip() for field in fields)
    return Sentence(
        _checked_id(name, where),
        _checked(text, where),
        language,
        reference=_audio(folder, prompt, where),
        reference_text=_checked(prompt_text, where, "prompt text"),
        recording=_audio(folder, recordings[0], where) if recordings else None,
    )


def _checked_id(name: str, where: str) -> str:
    """The id, which becomes a file name. Raises DataError for one that cannot, or would be a path."""
    is_name = name and not name.startswith(".") and name.isprintable() and not set(name) & set('/\\:*?"<>')
    if not is_name or len(name.encode()) > _MAX_ID_BYTES:
        raise DataError(f"{where}: the id {shown(name)} cannot name a file: use letters, digits, - and _")
    return name


def _checked(text: str, where: str, what: str = "text") -> str:
    if not is_speakable(text):
        raise DataError(f"{where}: the {what} {shown(text)} has nothing to say")
    if tokens := [token for token in find_control_tokens(text) if token not in TAGS]:  # the speaker knows which it has
        raise DataError(f"{where}: the {what} has {tokens[0]}, which is a control token of the model: remove it")
    return text


def _audio(folder: Path, name: str, where: str) -> Path:
    path = folder / name
    try:
        leaves = not is_within(path, folder)
    except ValueError as error:  # a null byte
        raise DataError(f"{where}: {shown(name)} cannot be a path") from error
    if leaves:
        raise DataError(f"{where}: {shown(name)} leads out of the folder {folder}: move the file there")
    if not is_file(path):
        raise DataError(f"{where}: {path} is missing")
    try:
        read_audio(path, end=PROBE_SECONDS)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return path


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The place and text of each line that is not blank. Raises DataError if there is none, or if it is not UTF-8."""
    content = read_whole(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {number} is not UTF-8: save the file as UTF-8") from error
    if not text.strip():
        raise DataError(f"{path} has no sentence")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()
