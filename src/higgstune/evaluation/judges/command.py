"""Judges that are programs of their own, in an environment of their own: a command in, one JSON line a file out.

    speaker   COMMAND --reference REFERENCE ... -- FILE ...    {"file": FILE, "name of a model": similarity, ...}
    ASR       COMMAND FILE ...                                 {"file": FILE, "text": what was heard}
    quality   COMMAND FILE ...                                 {"file": FILE, "name of a model": score, ...}

A line a file, in their order, on standard output; lines that do not begin with "{" are not read. No shell sees the
command, so `|` and `$HOME` mean nothing in it. Files under 0.1 s, in which there is no speech, are not given to it.
"""

import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from higgstune.checkpoint_files import sha256_of
from higgstune.config.expression import _is_command
from higgstune.data.audio import read_audio, write_wav
from higgstune.errors import ConfigError, WorkError
from higgstune.evaluation.judges.base import NO_REFERENCE, NO_VOICE, SHORTEST, WORST, hear

MAX_COSINE = 1.001  # of a cosine, with rounding
_TAIL = 2000  # characters of what a program said, in an error
Row = dict[str, Any]
Value = TypeVar("Value")

_START, _EACH = 600.0, 120.0  # seconds: to load a model, and for each file


def command_words(spec: str) -> list[str] | None:
    """The words of a judge that is a command; None for one that is a model, by its folder or name.

    A folder that exists is a model. Of anything else, two words or more are a command, and one word is where it is the
    path of a file. Raises ConfigError for an empty spec, an open quote, and a command whose program is not there.
    """
    if Path(spec).expanduser().is_dir():
        return None
    try:
        words = shlex.split(spec)
    except ValueError as error:
        raise ConfigError(f"the judge {spec!r} cannot be read as a command: {error}") from error
    if not words:
        raise ConfigError("a judge is empty: give a folder, a name or a command")
    if not _is_command(words):
        if spec.startswith((".", "/", "~")):
            raise ConfigError(f"the judge {spec!r} is not there: no folder of a model, and no program")
        return None
    if shutil.which(words[0]) is None:
        raise ConfigError(
            f"the judge {spec!r} is no folder, and as a command it cannot be run: {words[0]} is no program here"
        )
    return words


class _Command:
    """A program with its first arguments, and what it answers."""

    def __init__(self, role: str, words: Sequence[str]) -> None:
        self.role = role
        self.words = list(words)
        self.name = _named(words)

    def rows(self, arguments: Sequence[str], files: Sequence[str]) -> list[Row]:
        """An answer a file, in their order. Raises WorkError for a failure, and for any other answers than these."""
        if not files:
            return []
        try:
            done = subprocess.run(
                [*self.words, *arguments, *files], capture_output=True, encoding="utf-8", errors="replace",
                stdin=subprocess.DEVNULL, check=False, timeout=_START + _EACH * len(files),
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise WorkError(f"the {self.role} {self.name} has not answered in {error.timeout:.0f} s") from error
        except OSError as error:
            raise ConfigError(f"the {self.role} {self.name} cannot be run: {error.strerror}") from error
        if done.returncode != 0:
            raise self.failure(f"failed with exit code {done.returncode}", done.stderr)
        rows = [self._row(line, done.stderr) for line in done.stdout.splitlines() if line.startswith("{")]
        if len(rows) != len(files):
            raise self.failure(
                f'answered for {len(rows)} of {len(files)} files: a line {{"file": ..., ...}} for each is expected',
                done.stderr or done.stdout,
            )
        for row, file in zip(rows, files, strict=True):
            if row.get("file") != file:
                raise self.failure(f"answered for {row.get('file')!r} where {file!r} was next", done.stderr)
        return rows

    def failure(self, what: str, said: str = "") -> WorkError:
        """The error that says what the command did, with the end of what it said."""
        end = said.strip()[-_TAIL:]
        return WorkError(f"the {self.role} {self.name} {what}" + (f"; it said: {end}" if end else ""))

    def scores(self, rows: Sequence[Row]) -> dict[str, list[float]]:
        """The numbers of the rows, by model; no model where there is no row.

        Raises WorkError for a number that is missing, no number or not finite.
        """
        models = [key for key in rows[0] if key != "file"] if rows else []
        if rows and not models:
            raise self.failure(f"gave no number for {rows[0]['file']}")
        for row in rows:
            if row.keys() - {"file"} != set(models):
                raise self.failure(f"named other models for {row['file']} than for the first file: {', '.join(models)}")
        return {model: [self._number(row, model) for row in rows] for model in models}

    def _row(self, line: str, said: str) -> Row:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self.failure(f"answered with a line that is no JSON: {line[:200]}", said) from error
        assert isinstance(row, dict)  # a JSON value that begins with "{"
        return row

    def _number(self, row: Row, model: str) -> float:
        value = row[model]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.failure(f"gave {model} as {value!r} for {row['file']}: a finite number is expected")
        return float(value)


class ExternalTranscriber:
    """An ASR that is a command. It is not told the language: that is the command's own matter."""

    def __init__(self, words: Sequence[str]) -> None:
        """`words` of `command_words`."""
        self._command = _Command("ASR", words)
        self.name = self._command.name

    def transcribe(
        self,
        files: Sequence[Path],
        *,
        language: str | None = None,  # noqa: ARG002  (of the protocol)
        seconds: float | None = None,
    ) -> list[str]:
        """One text a file. Raises WorkError for a command that fails or answers otherwise than it should."""
        audible = _audible(files)
        with tempfile.TemporaryDirectory(prefix="higgstune-") as folder:
            given = _absolute(audible) if seconds is None else _beginnings(audible, seconds, Path(folder))
            rows = self._command.rows([], given)
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise self._command.failure(f"gave {row.get('text')!r} as the text of {row['file']}")
        return _for_all(files, audible, [row["text"].strip() for row in rows], "")


class ExternalSpeakerJudge:
    """A speaker judge that is a command."""

    def __init__(self, words: Sequence[str]) -> None:
        """`words` of `command_words`."""
        self._command = _Command("speaker judge", words)
        self.name = self._command.name

    def similarities(self, references: Sequence[Path], files: Sequence[Path]) -> dict[str, list[float]]:
        """By model, a number a file. Raises WorkError for a command that fails or answers otherwise than it should."""
        heard, audible = _audible(references), _audible(files)
        if not heard:
            raise ConfigError(NO_REFERENCE)
        rows = self._command.rows(["--reference", *_absolute(heard), "--"], _absolute(audible))
        found = self._command.scores(rows) or {self.name: []}
        for model, numbers in found.items():
            for number, row in zip(numbers, rows, strict=True):
                if abs(number) > MAX_COSINE:
                    raise self._command.failure(f"gave {model} as {number:g} for {row['file']}: no cosine is that")
        return {model: _for_all(files, audible, numbers, NO_VOICE) for model, numbers in found.items()}


class ExternalQualityJudge:
    """A judge of quality that is a command."""

    def __init__(self, words: Sequence[str]) -> None:
        """`words` of `command_words`."""
        self._command = _Command("quality judge", words)
        self.name = self._command.name

    def rate(self, files: Sequence[Path]) -> dict[str, list[float]]:
        """By model, a number a file. Raises WorkError for a command that fails or answers otherwise than it should."""
        audible = _audible(files)
        found = self._command.scores(self._command.rows([], _absolute(audible))) or {self.name: []}
        return {model: _for_all(files, audible, numbers, WORST) for model, numbers in found.items()}


def _named(words: Sequence[str]) -> str:
    """The command without the folders of its paths, and 8 digits over its program and the files that it names."""
    files = [Path(shutil.which(words[0]) or words[0]), *(Path(word) for word in words[1:] if Path(word).is_file())]
    digest = hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()
    return f"{' '.join(Path(word).name for word in words)} {digest[:8]}"


def _audible(files: Sequence[Path]) -> list[Path]:
    """Those with something to hear. Raises DataError for one that cannot be read."""
    return [file for file in files if len(hear(file, seconds=1)) >= SHORTEST]


def _for_all(files: Sequence[Path], audible: Sequence[Path], values: Sequence[Value], otherwise: Value) -> list[Value]:
    """The values of the audible files at their places among all, and another for the rest."""
    known = dict(zip(audible, values, strict=True))
    return [known.get(file, otherwise) for file in files]


def _absolute(files: Sequence[Path]) -> list[str]:
    """Paths that no program takes for an option."""
    return [os.path.abspath(file) for file in files]


def _beginnings(files: Sequence[Path], seconds: float, folder: Path) -> list[str]:
    """The first seconds of each file, in files of their own."""
    cut = []
    for number, file in enumerate(files):
        waveform, rate = read_audio(file, end=seconds)
        cut.append(folder / f"{number:06d}.wav")
        write_wav(cut[-1], waveform, rate)
    return [str(path) for path in cut]
