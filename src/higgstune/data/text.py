"""Text as the model reads it: one normalisation for preparation and for generation.

It follows what the released model's own example script does to a transcript (boson-ai/higgs-audio,
examples/generation.py: full-width punctuation, sound tags, white space, a final full stop), without the parts
that change the words of other languages (removing brackets, spelling out degrees in English).
"""

import codecs
import re
import unicodedata

import regex

TEXT_NORMALIZATION = "2"  # recorded in every store: raise it when a result of `normalize_text` changes

_BYTE_ORDER_MARKS = {  # UTF-32's first: it begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Where the NUL bytes of Latin letters lie, by byte within 4, in encodings without a mark.
_NUL_PATTERNS = {"utf-32-le": (1, 2, 3), "utf-32-be": (0, 1, 2), "utf-16-le": (1, 3), "utf-16-be": (0, 2)}
_CONTROL_TOKEN = re.compile(r"<\|[^|<>\s]+\|>")
_SPEAKER_TAG = re.compile(r"\[SPEAKER\d+\]")
# The end of a sentence or a clause in any script by Unicode's property, a quote, or a sound tag.
_SENTENCE_END = regex.compile(r"(?:\p{Terminal_Punctuation}|\p{Sentence_Terminal}|[\"']|</SE(?:_[se])?>)\Z")
_SOUND = re.compile(r"<SE\w*>[^<]*</SE\w*>")
_DIGIT_LENGTH = 4  # letters of a digit's name in English; other alphabets are near
_ZEROS = re.compile(r"0{2,}")
_ZEROS_WORD = "x" * 7  # a run of zeros is one word: hundred, million

_SOUND_TAGS = {
    "[laugh]": "<SE>[Laughter]</SE>",
    "[humming start]": "<SE>[Humming]</SE>",
    "[humming end]": "<SE_e>[Humming]</SE_e>",
    "[music start]": "<SE_s>[Music]</SE_s>",
    "[music end]": "<SE_e>[Music]</SE_e>",
    "[music]": "<SE>[Music]</SE>",
    "[sing start]": "<SE_s>[Singing]</SE_s>",
    "[sing end]": "<SE_e>[Singing]</SE_e>",
    "[applause]": "<SE>[Applause]</SE>",
    "[cheering]": "<SE>[Cheering]</SE>",
    "[cough]": "<SE>[Cough]</SE>",
}
_SOUND_TAGS |= dict.fromkeys(("[laughs]", "[laughing]", "[laughter]"), _SOUND_TAGS["[laugh]"])
_SOUND_TAGS |= dict.fromkeys(("[coughs]", "[coughing]"), _SOUND_TAGS["[cough]"])
_SOUND_TAG = re.compile(r"(?<!<SE>)(?<!<SE_[se]>)(?:" + "|".join(map(re.escape, _SOUND_TAGS)) + ")", re.IGNORECASE)
# Marks of transcribers, which a voice would read aloud.
_MARK = re.compile(
    r"(?<!<SE>)(?<!<SE_[se]>)\[(?!SPEAKER\d)[^\]\n]{1,30}\]|\{[^}\n]{1,30}\}|\*[A-Za-z ]{2,30}\*|%\w+"
    r"|\((?:unintelligible|inaudible|noise|laugh\w*|cough\w*|sneez\w*|sigh\w*|yawn\w*|breath\w*|pause|music|applause)\)",
    re.IGNORECASE,
)

_REPLACED = {
    "，": ", ",
    "。": ".",
    "：": ":",
    "；": ";",
    "？": "?",
    "！": "!",
    "（": "(",
    "）": ")",
    "【": "[",
    "】": "]",
    "、": ",",
    "…": "...",
}
_SINGLE_QUOTES = "\u2018\u2019\u201a\u201b"
_DOUBLE_QUOTES = "\u201c\u201d\u201e\u201f「」『』《》"
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
_LINE_ENDS = "\r\x85\u2028\u2029"
# The zero-width joiner and non-joiner are not here: they are spelling in Persian and in the scripts of India.
_INVISIBLE = "\u00ad\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff"
_MAX_MARKS = 30
_GRAPHEME_JOINER = "\u034f"
_CHARACTERS = str.maketrans(
    _REPLACED
    | dict.fromkeys(_SINGLE_QUOTES, "'")
    | dict.fromkeys(_DOUBLE_QUOTES, '"')
    | dict.fromkeys(_DASHES, "-")
    | dict.fromkeys(_LINE_ENDS, "\n")
    | dict.fromkeys(_INVISIBLE, "")
)


def normalize_text(text: str) -> str:
    """A transcript as it is trained on and spoken: `clean_text`, with a full stop where the end has no mark.

    Text without a letter or a digit gets no full stop, so that it still counts as empty. Normalising twice is the same
    as once.
    """
    cleaned = clean_text(text)
    if not is_speakable(cleaned) or _SENTENCE_END.search(cleaned):
        return cleaned
    return cleaned + "."


def clean_text(text: str) -> str:
    """One spelling for texts that look the same, in Unicode NFC.

    Plain quotes, dashes, ellipses and spaces, half-width punctuation, sound tags as the model writes them, no
    invisible characters, no empty lines.
    Single line breaks stay, since "[SPEAKER0] ...\\n[SPEAKER1] ..." is how a dialogue is written.
    """
    text = _composed(text).translate(_CHARACTERS)
    text = _composed("".join(map(_printable, text)))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    text = "\n".join(line for line in lines if line)
    if "[" in text:
        text = _SOUND_TAG.sub(lambda found: _SOUND_TAGS[found[0].lower()], text)
    return text


def is_speakable(text: str) -> bool:
    """Whether a text has a letter or a digit to speak, apart from tags such as [SPEAKER0]."""
    return any(character.isalnum() for character in _SPEAKER_TAG.sub("", without_tags(text)))


def find_marks(text: str) -> list[str]:
    """What looks like a transcriber's mark in a normalised text, such as `[inaudible]` and `*sighs*`, in order."""
    return _MARK.findall(text)


def spoken_length(text: str) -> int:
    """About how many letters a voice says: letters of the text, with digits spelled out; no marks, spaces and tags.

    An ideograph or a syllable of Korean counts as one, and so does a digit beside them.
    """
    spoken = [c for c in _SOUND.sub("", _SPEAKER_TAG.sub("", without_tags(text))) if c.isalnum()]
    if is_wide("".join(spoken)):
        return len(spoken)
    return sum(_DIGIT_LENGTH if c.isdigit() else 1 for c in _ZEROS.sub(_ZEROS_WORD, "".join(spoken)))


def is_wide(text: str) -> bool:
    """Whether a text has ideographs, kana or syllables of Korean, each of which is said as several letters."""
    return not text.isascii() and any(c.isalpha() and unicodedata.east_asian_width(c) == "W" for c in text)


def find_control_tokens(text: str) -> list[str]:
    """Every `<|...|>` in a text, in order. In a user's text, one would be read as structure of the prompt."""
    return _CONTROL_TOKEN.findall(text)


def without_tags(text: str) -> str:
    """A text without any `<|...|>`: what is said of it."""
    return _CONTROL_TOKEN.sub(" ", text)


def _composed(text: str) -> str:
    """Unicode NFC; a run of more than 30 combining marks is first split by an invisible joiner.

    This is the stream-safe text process of Unicode's UAX 15: no language has such a run, and its time grows with the
    square of the run's length.
    """
    if text.isascii():
        return text
    result, run = [], 0
    for character in text:
        run = run + 1 if unicodedata.combining(character) else 0
        if run > _MAX_MARKS:
            result.append(_GRAPHEME_JOINER)
            run = 1
        result.append(character)
    return unicodedata.normalize("NFC", "".join(result))


def _printable(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Zs" or (category == "Cc" and character != "\n"):
        return " "
    return "" if category == "Cs" else character  # half a surrogate pair cannot be written as UTF-8


def encoding_of(data: bytes) -> str:
    """The encoding of a file by its beginning: by its byte order mark, or by the NUL bytes in letters of Latin scripts.

    UTF-8 where neither is there.
    """
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)
    if encoding is None and b"\0" in data:
        nuls = [data[place::4].count(0) / max(1, len(data[place::4])) for place in range(4)]
        encoding = next((name for name, places in _NUL_PATTERNS.items() if min(nuls[p] for p in places) > 0.5), None)
    return encoding or "utf-8"
