"""The manifest: JSON lines, each with one utterance or one conversation."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Self, TextIO

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from higgstune.data.messages import is_unicode, normalize_messages
from higgstune.data.rejection import RowError, did_you_mean, shown
from higgstune.data.text import encoding_of
from higgstune.errors import DataError

Seconds = Annotated[FiniteFloat, Field(ge=0)]
MAX_LINE = 1 << 22  # bytes: an hour of speech is 60 kB
_HEAD = 4096  # bytes, in which the encoding shows
_SHOWN_PROBLEMS = 5
_UTTERANCE_ONLY = ("audio", "text", "scene", "reference_audio", "reference_text", "start", "end")


class Utterance(BaseModel):
    """A row: either `audio` and `text`, or `messages`. Paths are relative to the manifest's folder.

    `start` and `end` are seconds within `audio`. `held_out` says whether the row is for validation; without it, that
    follows from the recordings. No message before `start_index` (from 0) is a target. `source`, `licence` and `consent`
    are what is stated of the recordings, in any words.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    audio: str | None = None
    text: str | None = None
    id: str | None = None
    speaker: str | None = None
    language: str | None = None
    scene: str | None = None
    reference_audio: str | None = None
    reference_text: str | None = None
    start: Seconds | None = None
    end: Seconds | None = None
    held_out: bool | None = None
    messages: list[dict[str, Any]] | None = None
    start_index: int | None = None
    source: str | None = None
    licence: str | None = None
    consent: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.messages is None:
            if self.start_index is not None:
                raise ValueError("start_index belongs to messages")
            missing = [key for key in ("audio", "text") if getattr(self, key) is None]
            if missing:
                raise ValueError(f"{' and '.join(missing)} missing: a row needs audio and text, or messages")
            self._check_utterance()
        elif extra := [key for key in _UTTERANCE_ONLY if getattr(self, key) is not None]:
            raise ValueError(f"{', '.join(extra)} beside messages: a conversation has all of this in its messages")
        return self

    def _check_utterance(self) -> None:
        if self.audio == "" or self.reference_audio == "" or self.id == "":
            raise ValueError("audio, reference_audio and id must not be empty")
        if self.reference_text is not None and self.reference_audio is None:
            raise ValueError("reference_text without reference_audio")
        if self.end is not None and self.end <= (self.start or 0.0):
            raise ValueError(f"the segment from {self.start or 0.0:g} to {self.end:g} s is empty")


def parse_utterance(data: Any) -> Utterance:
    """A row from decoded JSON, with the messages of a conversation normalised. Raises RowError with the reason."""
    try:
        return _utterance(data)
    except RecursionError as error:
        raise RowError("bad_row", "it is nested too deeply to be a row") from error


def _utterance(data: Any) -> Utterance:
    if not isinstance(data, dict):
        raise RowError("bad_row", f"a row must be an object with keys, but this is {shown(data)}")
    for key in data:
        if key not in Utterance.model_fields:
            raise RowError(
                "bad_row", f"the key {shown(key)} is unknown; {did_you_mean(str(key), Utterance.model_fields)}"
            )
    try:
        utterance = Utterance.model_validate(data)
    except ValidationError as error:
        raise RowError("bad_row", "; ".join(map(_explain, error.errors()[:_SHOWN_PROBLEMS]))) from error
    if broken := [key for key, value in data.items() if isinstance(value, str) and not is_unicode(value)]:
        raise RowError("bad_row", f"{broken[0]} holds half a surrogate pair, which is not text")
    if utterance.messages is None:
        return utterance
    messages, start_index = normalize_messages(utterance.messages, utterance.start_index)
    return utterance.model_copy(update={"messages": messages, "start_index": start_index})


def parse_line(line: bytes) -> Utterance:
    """A row from one line of a manifest. Raises RowError with the reason."""
    return parse_utterance(_decoded(line))


def _decoded(line: bytes) -> Any:
    try:
        data = json.loads(line.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise RowError("bad_row", f"the line is not UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise RowError("bad_row", "the line is nested too deeply to be a row") from error
    except ValueError as error:
        raise RowError("bad_row", f"the line is not JSON: {error}") from error
    return data


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The decoded lines of a file with their numbers, counted from 1; empty lines are skipped.

    A broken line is yielded as its RowError. Raises DataError where the file cannot be read.
    """
    for number, line in _lines(path):
        try:
            yield number, line if isinstance(line, RowError) else _decoded(line)
        except RowError as error:
            yield number, error


def read_manifest(path: str | Path) -> Iterator[tuple[int, Utterance | RowError]]:
    """The rows of a JSONL manifest with their line numbers, counted from 1; empty lines are skipped.

    A broken row is yielded as its RowError. Raises DataError where the file cannot be read or has no row.
    """
    empty = True
    for number, line in _lines(Path(path)):
        empty = False
        try:
            yield number, line if isinstance(line, RowError) else parse_line(line)
        except RowError as error:
            yield number, error
    if empty:
        raise DataError(
            f'{path} has no row: write one JSON object a line, such as {{"audio": "clips/1.wav", "text": "Hello."}}'
        )


def write_manifest(path: str | Path, utterances: Iterable[Utterance]) -> None:
    """Write rows as JSON lines, without the keys that have no value."""
    with open(path, "w", encoding="utf-8") as file:
        for utterance in utterances:
            file.write(json.dumps(utterance.model_dump(exclude_none=True), ensure_ascii=False) + "\n")


def _lines(path: Path) -> Iterator[tuple[int, bytes | RowError]]:
    """The lines that are not empty; one that is too long is yielded as its RowError, and never held in memory."""
    try:
        with open(path, "rb") as file:
            encoding = encoding_of(file.peek(_HEAD)[:_HEAD])
            wide = None if encoding.startswith("utf-8") else TextIOWrapper(file, encoding)
            number = 0
            while line := _read_line(file, wide):
                number += 1
                if len(line) > MAX_LINE and not line.endswith(b"\n"):
                    while (rest := _read_line(file, wide)) and not rest.endswith(b"\n"):
                        continue
                    yield number, RowError("bad_row", f"it is longer than {MAX_LINE >> 20} MB: write one row a line")
                    continue
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line.strip()
    except (OSError, ValueError) as error:  # a null byte in the path
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_line(file: BinaryIO, wide: TextIO | None) -> bytes:
    """The next line in UTF-8, or its first MAX_LINE + 1 bytes or characters; `wide` decodes UTF-16 and UTF-32."""
    return file.readline(MAX_LINE + 1) if wide is None else wide.readline(MAX_LINE + 1).encode()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A decoded JSON object. Raises ValueError for a key that occurs twice."""
    if len(unique := dict(pairs)) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(key)} occurs twice")
    return unique


def _explain(problem: Any) -> str:
    place = ".".join(str(step) for step in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message}, got {shown(problem['input'])}" if place else message
