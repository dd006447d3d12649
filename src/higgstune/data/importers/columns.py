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
        *("text", "transcript", "transcription", "sentence", "rawtext", "rawtranscription", "words"),
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
    "speaker": (
        *(
            "speaker",
            "speakerid",
            "speakername",
            "speakerlabel",
            "spk",
            "spkid",
            "spkname",
            "clientid",
            "reader",
            "voice",
        ),
    ),
    "language": ("language", "lang", "locale", "languageid", "languagecode"),
    "scene": ("scene",),
    "id": ("id", "uttid", "utteranceid", "sampleid", "segmentid"),
    "start": ("start", "starttime", "onset", "begin", "offset"),
    "end": ("end", "endtime", "offset"),
    "duration": ("duration", "dur"),
    "reference_audio": ("referenceaudio", "refaudio", "promptaudio", "promptwav", "refaudiopath", "refwav"),
    "reference_text": ("referencetext", "reftext", "prompttext", "reftranscript"),
    "messages": ("messages",),
    "audios": ("audios",),
    "start_index": ("startindex",),
    "held_out": ("heldout",),
    "source": ("source",),
    "licence": ("licence", "license"),
    "consent": ("consent",),
}
_CONVERSATION = ("messages", "audios", "start_index")
ROLES = tuple(name for name in _NAMES if name not in _CONVERSATION)
UNUSED = "-"
# Letters of the IPA that no spelling has, and what stands for sounds in ASCII: ARPAbet, pinyin with tones.
_IPA = re.compile(r"[ˈˌːɹɾʃʒɡɪʊʌɑɒɐɜɝɚɫʁɕʑɲɯɨʉɤ]")
_SOUND = re.compile(r"[A-Z]{1,2}[012]|[a-zü]{1,6}[1-5]|[A-Za-z]{1,2}")
_FEW_SOUNDS = 4  # short words in a row that are still words: "I do so"
_PATH = re.compile(r"\S*[/\\]\S+\.\w{1,5}|\S+\.(?:wav|flac|mp3|ogg|opus|npy|pt|txt|lab|json)")
_SENTENCE = re.compile(
    r"[.!?,。！？、，।။]|[^\x00-\u024f]{4}|\S+\s+\S+\s+\S"
)  # a mark, a script without spaces, or three words
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z]{2,4}){0,2}")
_LANGUAGE_NAMES = (
    "ar bg bn ca cs cy da de el en es et eu fa fi fr gl he hi hr hu id it ja jp ka ko lt lv mn ms my nb nl no pl pt ro "
    "ru sk sl sr sv sw ta te th tl tr uk ur uz vi yue zh ara ces cmn dan deu ell eng est fin fra heb hin hun ind ita "
    "jpn kor nld nor pol por ron rus spa swe tha tur ukr vie zho arabic chinese czech danish dutch english finnish "
    "french german greek hebrew hindi hungarian indonesian italian japanese korean norwegian polish portuguese "
    "romanian russian spanish swedish thai turkish ukrainian vietnamese all_zh all_ja all_yue all_ko auto"
)
_LANGUAGES = frozenset(_LANGUAGE_NAMES.split())
_GENDERS_AND_SPLITS = "male female m f man woman boy girl train training val valid validation dev test eval"
_OTHER_LABELS = frozenset(_GENDERS_AND_SPLITS.split())
_MAX_SPEAKER_NUMBER = 9_999  # above it, whole numbers are rates, lengths or times
_RATES = ("8000", "11025", "16000", "22050", "24000", "32000", "44100", "48000")  # Hz
_MAX_LABEL = 30  # characters
_SIMILAR = 0.5  # share of words in common, above which a column is another spelling of a text
_WHOLE = 0.8  # of the letters of a text, which its other spelling has at least
_MOST = 0.5  # share of the rows
_TIMES = re.compile("(?:start|begin|end|onset)(?:time.*|ms.*|msec.*|s|secs?|seconds?)?")
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
        if messages:
            raise ConfigError(f"--columns {columns}: keys have no order, so name them, such as audio=path,text=words")
        if not is_header(names):
            return None
        if len(pairs) != len(names):
            raise ConfigError(f"--columns {columns}: these are {len(pairs)} columns, and the table has {len(names)}")
        return Reading(tuple(role for role, _ in pairs), tuple(names))
    plain = [_plain(name) for name in names]
    roles = [UNUSED] * len(names)
    for role, known in _NAMES.items():
        if role in _CONVERSATION and not messages:
            continue
        for name in known:
            if name in plain and roles[plain.index(name)] == UNUSED:
                roles[plain.index(name)] = role
                break
    if not {"start", "end"} & set(roles) and any(map(_TIMES.fullmatch, plain)):
        raise DataError(
            f"columns {', '.join(map(str, names))}: some look like times of a part of a recording, but not in seconds "
            "as start and end; say with --columns what is used"
        )
    if "normalised" in roles and "text" not in roles:
        roles[roles.index("normalised")] = "text"
    if not {"audio", "text"} <= set(roles) and "messages" not in roles:
        return None
    return Reading(tuple(roles), tuple(names))


def is_known(name: str) -> bool:
    """Whether a name is one of a column that can be used."""
    return any(_plain(name) in known for known in _NAMES.values())


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
    rest = {index: column for index, column in enumerate(cells) if index != audio}
    if width == 2:
        [(text, column)] = rest.items()
        if len(rows) >= _FEW and len(set(column)) == 1:
            raise _undecided(rows, "one value stands in all rows, which is not a transcript")
        roles = {audio: "audio", text: "text"}
    else:
        roles = {audio: "audio"} | _roles(rows, rest)
    reading = Reading(tuple(roles[index] for index in range(width)))
    if (problem := not_words([row[reading.roles.index("text")] for row in rows])) is not None:
        raise _undecided(rows, problem)
    return reading


def _roles(rows: Sequence[Sequence[str]], rest: dict[int, list[str]]) -> dict[int, str]:
    """The meanings of the columns beside the recording, of which there are several."""
    kinds = {index: _kind(column) for index, column in rest.items()}

    def those(kind: str) -> list[int]:
        return [index for index, found in kinds.items() if found == kind]

    texts, numbers, languages = those("text"), those("numbers"), those("language")
    if numbers and (len(rows) >= _FEW or not texts):
        raise _undecided(rows, f"column {numbers[0] + 1} has another number in each row")
    labels = those("label") + numbers
    if len(labels) > 1:
        raise _undecided(rows, "several columns could be the speaker")
    phonemes = [index for index in texts if _share(rest[index], is_phonemes) >= _MOST]
    if len(texts) > len(phonemes):
        texts = [index for index in texts if index not in phonemes]
    roles = dict.fromkeys(rest, UNUSED) | dict.fromkeys(labels, "speaker") | dict.fromkeys(languages[:1], "language")
    if len(texts) == 2 and is_normalised(rest[texts[1]], rest[texts[0]]):
        return roles | {texts[0]: "text", texts[1]: "normalised"}
    if len(texts) != 1:
        raise _undecided(rows, "several columns could be the text" if texts else "no column looks like a text")
    others = [cell for index in (*labels, *languages) for cell in rest[index]]
    may_be_name = _share(rest[texts[0]], lambda cell: _SENTENCE.search(cell) is not None) < _MOST
    if may_be_name and not_words(rest[texts[0]]) is None and not all(map(_is_number, others)):
        raise _undecided(rows, f"column {texts[0] + 1} could be the text or a name")
    return roles | {texts[0]: "text"}


def _kind(column: Sequence[str]) -> str:
    """What a column may be: text, label, language, numbers (whole ones that do not repeat), or unused."""
    filled = [cell for cell in column if cell]
    repeats = len(set(filled)) < len(filled)
    if any(cell in _RATES for cell in filled) and all(map(_is_number, filled)):
        return "unused"
    if all(map(_is_number, filled)):
        whole = filled and all(cell.isdecimal() and int(cell) <= _MAX_SPEAKER_NUMBER for cell in filled)
        return "unused" if not whole else "label" if repeats else "numbers"
    lower = {cell.lower() for cell in filled}
    if lower <= _LANGUAGES or all(_is_language(cell) for cell in filled):
        return "language"
    if lower <= _OTHER_LABELS or all(map(_PATH.fullmatch, filled)):
        return "unused"
    few = len(set(filled)) <= len(filled) / 2
    short = all(len(cell) <= _MAX_LABEL and cell[-1] not in ".!?,。！？" for cell in filled)
    is_name = few or (repeats and not any(re.search(r"\s", cell) or not cell.isascii() for cell in filled))
    return "label" if short and repeats and is_name else "text"


def _is_language(cell: str) -> bool:
    return _LANGUAGE.fullmatch(cell) is not None and re.split("[-_]", cell.lower())[0] in _LANGUAGES


def not_words(column: Sequence[str]) -> str | None:
    """Why a column is not of transcripts: it holds phonemes, numbers or paths; None where it may be."""
    filled = [cell for cell in column if cell]
    if filled and _share(filled, is_phonemes) >= _MOST:
        return "the only text looks like phonemes, which the model does not read"
    if filled and all(_is_number(cell) or cell in ("True", "False") for cell in filled):
        return "the text would be a number in each row"
    if filled and _share(filled, lambda cell: _PATH.fullmatch(cell) is not None) > _MOST:
        return "the text would be a path"
    return None


def _undecided(rows: Sequence[Sequence[str]], why: str) -> DataError:
    example = " | ".join(cell[:60] for cell in max(rows[:20], key=lambda row: sum(map(len, row))))
    return DataError(
        f"{why}: {len(rows[0])} columns such as `{example}`. Say what each one is, in their order, with --columns: "
        f"{', '.join(ROLES)}, or - for one that is not used (such as --columns audio,speaker,text)"
    )


def is_phonemes(text: str) -> bool:
    """Whether a text is written in the IPA, or in names of sounds with spaces between."""
    if len(_IPA.findall(text)) >= max(1, len(text) // 20):
        return True
    words = [word for word in text.strip("{} ").split() if word.isascii()]
    sounds = sum(_SOUND.fullmatch(word) is not None for word in words)
    has_tones = any(word[-1].isdigit() and word[0].isalpha() for word in words)
    return sounds > len(words) * 0.8 and (has_tones or len(words) > _FEW_SOUNDS) and len(words) >= len(text.split()) / 3


def _share(column: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, column)) / len(column)


def is_normalised(second: Sequence[str], first: Sequence[str]) -> bool:
    """Whether the second column is the first one spelt out: it shares its words, and is not a part of it."""
    shares, lengths = [], [0, 0]
    for one, other in zip(map(_words, first), map(_words, second), strict=True):
        if one and other:  # rows that lack one of both do not count
            shares.append((one & other).total() / min(one.total(), other.total()))
            lengths[0] += sum(len(word) * count for word, count in one.items())
            lengths[1] += sum(len(word) * count for word, count in other.items())
    return bool(shares) and sum(shares) / len(shares) >= _SIMILAR and lengths[1] >= _WHOLE * lengths[0]


def _words(text: str) -> Counter[str]:
    """Its words of letters; of a text without spaces, pairs of letters."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return Counter(words if len(words) > 1 else map("".join, pairwise("".join(words))))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", text) is not None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())
