"""What the columns of a table, or the keys of a manifest, mean: by their names, else by what the whole table holds."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from higgstune.data.audio import AUDIO_SUFFIXES
from higgstune.data.rejection import shown
from higgstune.errors import ConfigError, DataError

# Names of each meaning, in the order of preference, without case, spaces, `-` and `_`.
_NAMES = {
    "audio": (
        *("audio", "audiofile", "audiofilepath", "audiopath", "wavpath", "wavfilename", "wavfile", "wav", "filename"),
        *("file", "filepath", "path", "clip", "recording", "soundfile", "uttid", "utteranceid", "id"),
    ),
    "text": (
        *("text", "transcript", "transcription", "sentence", "rawtext", "rawtranscription", "targettext", "words"),
        *("normalisedtext", "normalizedtext", "normalised", "normalized"),
    ),
    "normalised": (
        *(
            "normalisedtext",
            "normalizedtext",
            "textnormalized",
            "textnormalised",
            "normtext",
            "normalizedtranscription",
        ),
        *("normalised", "normalized"),
    ),
    "speaker": ("speaker", "speakerid", "speakername", "spk", "spkid", "clientid", "voice"),
    "language": ("language", "lang", "locale", "languageid"),
    "scene": ("scene",),
    "id": ("id", "uttid", "utteranceid", "sampleid", "segmentid"),
    "start": ("start", "starttime", "offset", "begin"),
    "end": ("end", "endtime"),
    "duration": ("duration", "dur"),
    "reference_audio": ("referenceaudio", "refaudio", "promptaudio", "promptwav", "refaudiopath", "refwav"),
    "reference_text": ("referencetext", "reftext", "prompttext", "reftranscript"),
    "messages": ("messages",),
    "audios": ("audios",),
    "start_index": ("startindex",),
}
_CONVERSATION = ("messages", "audios", "start_index")
ROLES = tuple(name for name in _NAMES if name not in _CONVERSATION)
UNUSED = "-"
_PHONEMES = re.compile(r"[ɐ-ʯˈˌːθðŋæœøəχβ]|\b[A-Z]{2}[012]\b")  # IPA letters, or ARPAbet vowels with their stress
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z]{2,4})?")
_LANGUAGES = (
    "ar bg bn ca cs cy da de el en es et eu fa fi fr gl he hi hr hu id it ja jp ka ko lt lv mn ms my nb nl no pl pt ro "
    "ru sk sl sr sv sw ta te th tl tr uk ur uz vi yue zh"
)
_SIMILAR = 0.5  # share of words in common, above which a column is another spelling of a text
_FEW = 3  # rows below which values that do not repeat say nothing


@dataclass(frozen=True)
class Reading:
    """How the columns of a table are read: for each, its meaning, or "-" for one that is not used."""

    roles: tuple[str, ...]
    names: tuple[str, ...] = ()  # of a header, or of keys

    @property
    def text_is_last(self) -> bool:
        """Whether a row with more cells than columns has them in its text, and nowhere else."""
        return self.roles[-1] == "text" and "normalised" not in self.roles

    def values(self, cells: Sequence[str]) -> dict[str, str]:
        """The cells that are used, by meaning."""
        return {role: cell for role, cell in zip(self.roles, cells, strict=False) if role != UNUSED}

    def __str__(self) -> str:
        if not self.names:
            return " | ".join(self.roles)
        used = [
            role if _plain(name) == _plain(role) else f"{name} as {role}"
            for name, role in zip(self.names, self.roles, strict=True)
            if role != UNUSED
        ]
        unused = [name for name, role in zip(self.names, self.roles, strict=True) if role == UNUSED]
        return ", ".join(used) + (f"; not used: {', '.join(unused)}" if unused else "")


def parse_columns(columns: str) -> tuple[tuple[str, str], ...]:
    """`audio,speaker,text`, by place, or `audio=wav_path,text=words`, by name -> pairs of a meaning and a name or "".

    Raises ConfigError for an unknown meaning, and for columns without audio and text.
    """
    pairs = tuple(
        (role.strip(), name.strip()) for role, _, name in (part.partition("=") for part in columns.split(","))
    )
    for role, _ in pairs:
        if role not in (*ROLES, UNUSED):
            raise ConfigError(f"--columns {columns}: {shown(role)} is not one of {', '.join((*ROLES, UNUSED))}")
    roles = [role for role, _ in pairs if role != UNUSED]
    if twice := [role for role, count in Counter(roles).items() if count > 1]:
        raise ConfigError(f"--columns {columns}: {twice[0]} stands there twice")
    if missing := [role for role in ("audio", "text") if role not in roles]:
        raise ConfigError(f"--columns {columns}: it has no {missing[0]}")
    if len({bool(name) for role, name in pairs if role != UNUSED}) > 1:
        raise ConfigError(
            f"--columns {columns}: give either meanings in the order of the columns, or ROLE=NAME for all"
        )
    return pairs


def by_name(names: Sequence[str], columns: str | None = None, *, messages: bool = False) -> Reading | None:
    """The meaning of named columns or keys; None unless they have a recording and a text, or (where wanted) messages.

    `columns` decides for the user: see `parse_columns`. Raises ConfigError where it names a column that is missing.
    """
    if columns is not None:
        pairs = parse_columns(columns)
        if all(name for role, name in pairs if role != UNUSED):
            if missing := [name for role, name in pairs if role != UNUSED and name not in names]:
                raise ConfigError(f"--columns: there is no column {shown(missing[0])}; there are {', '.join(names)}")
            role_of = {name: role for role, name in pairs}
            return Reading(tuple(role_of.get(name, UNUSED) for name in names), tuple(names))
    plain = [_plain(name) for name in names]
    roles = [UNUSED] * len(names)
    for role, known in _NAMES.items():
        if role in _CONVERSATION and not messages:
            continue
        for name in known:
            if name in plain and roles[plain.index(name)] == UNUSED:
                roles[plain.index(name)] = role
                break
    if "normalised" in roles and "text" not in roles:
        roles[roles.index("normalised")] = "text"
    if not {"audio", "text"} <= set(roles) and "messages" not in roles:
        return None
    return Reading(tuple(roles), tuple(names))


def is_header(names: Sequence[str]) -> bool:
    """Whether any of some cells is the name of a recording's, a text's or a speaker's column."""
    known = {*_NAMES["audio"], *_NAMES["text"], *_NAMES["speaker"]}
    return any(_plain(name) in known for name in names)


def by_content(rows: Sequence[Sequence[str]], is_recording: Callable[[str], bool], columns: str | None) -> Reading:
    """The meaning of the columns of a table without a header; each row has as many cells.

    Raises DataError, with the choices, where the table does not decide it.
    """
    width = len(rows[0])
    if columns is not None:
        pairs = parse_columns(columns)
        if any(name for _, name in pairs):
            raise ConfigError(f"--columns {columns}: the table has no header, so name the columns in their order")
        if len(pairs) != width:
            raise ConfigError(f"--columns {columns}: these are {len(pairs)} columns, and the table has {width}")
        return Reading(tuple(role for role, _ in pairs))
    cells = [[row[index] for row in rows] for index in range(width)]
    found = [sum(map(is_recording, column)) for column in cells]
    if not any(found):
        found = [sum(cell.lower().endswith(AUDIO_SUFFIXES) for cell in column) for column in cells]
    audio = found.index(max(found))
    roles = {audio: "audio"}
    rest = {index: column for index, column in enumerate(cells) if index != audio}
    if width == 2:
        [column] = rest.values()
        if len(rows) >= _FEW and len(set(column)) == 1:
            raise _undecided(rows, "one value stands in all rows, which is not a transcript")
        _check_words(column, rows)
        return Reading(tuple(roles.get(at, "text") for at in range(width)))
    kinds = {index: _kind(column) for index, column in rest.items()}
    texts = [index for index, kind in kinds.items() if kind == "text"]
    numbers = [index for index, kind in kinds.items() if kind == "numbers"]
    if not texts and len(numbers) == 1:  # spoken numbers
        texts, numbers = numbers, []
    if numbers and len(rows) >= _FEW:
        raise _undecided(rows, f"column {numbers[0] + 1} has another number in each row")
    labels = [index for index, kind in kinds.items() if kind == "label"] + numbers
    if len(labels) > 1:
        raise _undecided(rows, "several columns could be the speaker")
    roles |= dict.fromkeys(labels, "speaker")
    roles |= {index: UNUSED for index, kind in kinds.items() if kind == "unused"}
    languages = [index for index, kind in kinds.items() if kind == "language"]
    roles |= dict.fromkeys(languages[:1], "language") | dict.fromkeys(languages[1:], UNUSED)
    phonemes = [index for index in texts if _share(cells[index], _is_phonemes) > 0.5]
    if phonemes and len(texts) > len(phonemes):
        roles |= dict.fromkeys(phonemes, UNUSED)
        texts = [index for index in texts if index not in phonemes]
    if len(texts) == 2 and _similarity(cells[texts[0]], cells[texts[1]]) >= _SIMILAR:
        roles |= {texts[0]: "text", texts[1]: "normalised"}
    elif len(texts) == 1:
        _check_words(cells[texts[0]], rows)
        roles[texts[0]] = "text"
    else:
        raise _undecided(rows, "several columns could be the text" if texts else "no column looks like a text")
    return Reading(tuple(roles[index] for index in range(width)))


def _kind(column: Sequence[str]) -> str:
    """What a column may be: text, label, language, numbers (whole ones that do not repeat), or unused."""
    filled = [cell for cell in column if cell]
    repeats = len(set(filled)) < len(filled)
    if all(map(_is_number, filled)):
        whole = filled and all(cell.isdecimal() for cell in filled)
        return "unused" if not whole else "label" if repeats else "numbers"
    if any(re.search(r"\s", cell) for cell in filled):
        return "text"
    if all(_LANGUAGE.fullmatch(cell) and re.split("[-_]", cell.lower())[0] in _LANGUAGES.split() for cell in filled):
        return "language"
    is_plain = all(cell.isascii() and cell[-1] not in ".!?," for cell in filled)
    return "label" if repeats and is_plain else "text"


def _check_words(column: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if _share(column, _is_phonemes) > 0.5:
        raise _undecided(rows, "the only text looks like phonemes, which the model does not read")


def _undecided(rows: Sequence[Sequence[str]], why: str) -> DataError:
    example = " | ".join(cell[:60] for cell in max(rows[:20], key=lambda row: sum(map(len, row))))
    return DataError(
        f"{why}: {len(rows[0])} columns such as `{example}`. Say what each one is, in their order, with --columns: "
        f"{', '.join(ROLES)}, or - for one that is not used (such as --columns audio,speaker,text)"
    )


def _is_phonemes(text: str) -> bool:
    return len(_PHONEMES.findall(text)) >= max(1, len(text) // 20)


def _share(column: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, column)) / len(column)


def _similarity(first: Sequence[str], second: Sequence[str]) -> float:
    """Mean share of words in common of two columns, row by row; rows that lack one of both texts do not count."""
    shares = []
    for one, other in zip(map(_words, first), map(_words, second), strict=True):
        if one and other:
            shares.append((one & other).total() / min(one.total(), other.total()))
    return sum(shares) / len(shares) if shares else 0.0


def _words(text: str) -> Counter[str]:
    """Its words of letters; of a text without spaces, pairs of letters."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return Counter(words if len(words) > 1 else map("".join, pairwise("".join(words))))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", text) is not None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())
