"""Judges that are separate programs, in an environment of their own. They print one JSON line per file:

    speaker   COMMAND --reference REFERENCE ... -- FILE ...    {"file": FILE, "name of a model": similarity, ...}
    ASR       COMMAND FILE ...                                 {"file": FILE, "text": transcript}
    quality   COMMAND FILE ...                                 {"file": FILE, "name of a model": score, ...}

The lines come in the order of the files, on standard output; lines that do not begin with "{" are ignored. No shell
runs the command, so `|` and `$HOME` mean nothing in it. Files under 0.1 s have no speech and are not passed to it.
"""

import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from higgstune.checkpoint_files import sha256_of
from higgstune.config.expression import are_command_words, is_local_model
from higgstune.data.audio import read_audio, write_wav
from higgstune.errors import ConfigError, WorkError
from higgstune.evaluation.judges.base import (
    MIN_SAMPLES,
    NO_REFERENCE,
    NO_VOICE,
    RATE,
    WORST,
    Transcript,
    read_for_judge,
)

MAX_COSINE = 1.001  # of a cosine, with rounding
_TAIL = 2000  # characters of a program's output, in an error
_START, _EACH = 600.0, 120.0  # seconds: to load a model, and for each file
Row = dict[str, Any]
Value = TypeVar("Value")


def command_words(spec: str) -> list[str] | None:
    """The words of a judge that is a command; None for a model, given by its folder or name.

    An existing folder or .pt file is a model. Otherwise two words or more are a command, and so is a single word if it
    is the path of a file. Raises ConfigError for an empty spec, an open quote, and a command whose program does not
    exist.
    """
    if is_local_model(spec):
        return None
    try:
        words = shlex.split(spec)
    except ValueError as error:
        raise ConfigError(f"the judge {spec!r} cannot be read as a command: {error}") from error
    if not words:
        raise ConfigError("a judge is empty: give a folder, a name or a command")
    if not are_command_words(words):
        if spec.startswith((".", "/", "~")):
            raise ConfigError(f"the judge {spec!r} does not exist, neither as a model nor as a program")
        return None
    if shutil.which(words[0]) is None:
        raise ConfigError(
            f"the judge {spec!r} is not a folder, and as a command it cannot run: {words[0]} is not a program here"
        )
    return words


class _Command:
    """A program with its first arguments; runs it and reads its answers."""

    def __init__(self, role: str, words: Sequence[str]) -> None:
        self.role = role
        self.words = list(words)
        self.name = _named(words)

    def rows(self, arguments: Sequence[str], files: Sequence[str]) -> list[Row]:
        """One answer per file, in their order. Raises WorkError if the command fails or answers anything else."""
        if not files:
            return []
        try:
            done = _run([*self.words, *arguments, *files], timeout=_START + _EACH * len(files))
        except subprocess.TimeoutExpired as error:
            raise WorkError(f"the {self.role} {self.name} did not answer within {error.timeout:.0f} s") from error
        except OSError as error:
            raise ConfigError(f"the {self.role} {self.name} cannot run: {error.strerror}") from error
        if done.returncode != 0:
            raise self.failure(f"failed with exit code {done.returncode}", done.stderr)
        rows = [self._row(line, done.stderr) for line in done.stdout.splitlines() if line.startswith("{")]
        if len(rows) != len(files):
            raise self.failure(
                f'answered for {len(rows)} of {len(files)} files: a line {{"file": ..., ...}} is expected for each',
                done.stderr or done.stdout,
            )
        for row, file in zip(rows, files, strict=True):
            if row.get("file") != file:
                raise self.failure(f"answered for {row.get('file')!r} where {file!r} was next", done.stderr)
        return rows

    def failure(self, what: str, output: str = "") -> WorkError:
        """The error that says what the command did, with the end of its output."""
        end = output.strip()[-_TAIL:]
        return WorkError(f"the {self.role} {self.name} {what}" + (f"; its output: {end}" if end else ""))

    def scores(self, rows: Sequence[Row]) -> dict[str, list[float]]:
        """The numbers of the rows, by model; empty without rows.

        Raises WorkError for a number that is missing, not finite or not a number.
        """
        models = [key for key in rows[0] if key != "file"] if rows else []
        if rows and not models:
            raise self.failure(f"gave no number for {rows[0]['file']}")
        for row in rows:
            if row.keys() - {"file"} != set(models):
                raise self.failure(f"named other models for {row['file']} than for the first file: {', '.join(models)}")
        return {model: [self._number(row, model) for row in rows] for model in models}

    def _row(self, line: str, output: str) -> Row:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self.failure(f"answered with a line that is not JSON: {line[:200]}", output) from error
        assert isinstance(row, dict)  # a JSON value that begins with "{"
        return row

    def _number(self, row: Row, model: str) -> float:
        value = row[model]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.failure(f"gave {model} as {value!r} for {row['file']}: a finite number is expected")
        return float(value)


class ExternalTranscriber:
    """An ASR that is a command. The command does not get the language: choosing one is up to it."""

    def __init__(self, words: Sequence[str]) -> None:
        """`words` come from `command_words`."""
        self._command = _Command("ASR", words)
        self.name = self._command.name

    def transcribe(
        self,
        files: Sequence[Path],
        *,
        language: str | None = None,  # noqa: ARG002  (of the protocol)
        seconds: float | None = None,
    ) -> list[str]:
        """One transcript per file. Raises WorkError if the command fails or its answers are wrong."""
        audible = _audible(files)
        with tempfile.TemporaryDirectory(prefix="higgstune-") as folder:
            given = _absolute(audible) if seconds is None else _beginnings(audible, seconds, Path(folder))
            rows = self._command.rows([], given)
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise self._command.failure(f"gave {row.get('text')!r} as the text of {row['file']}")
        return _for_all(files, audible, [row["text"].strip() for row in rows], "")

    def transcribe_clips(self, waveforms: Sequence[np.ndarray], language: str | None) -> list[Transcript]:
        """One transcript per clip, [samples] float32 mono at 16 kHz; each is written into a file for the command."""
        with tempfile.TemporaryDirectory(prefix="higgstune-") as folder:
            files = [Path(folder) / f"{number:06d}.wav" for number in range(len(waveforms))]
            for file, waveform in zip(files, waveforms, strict=True):
                write_wav(file, waveform, RATE)
            return [Transcript(text, None) for text in self.transcribe(files, language=language)]

    def detect_language(self, waveforms: Sequence[np.ndarray]) -> str:  # noqa: ARG002  (of the protocol)
        """Raises ConfigError: a command prints no language."""
        raise ConfigError(f"the ASR {self.name} is a command, which does not say the language: name it")


class ExternalSpeakerJudge:
    """A speaker judge that is a command."""

    def __init__(self, words: Sequence[str]) -> None:
        """`words` come from `command_words`."""
        self._command = _Command("speaker judge", words)
        self.name = self._command.name

    def similarities(self, references: Sequence[Path], files: Sequence[Path]) -> dict[str, list[float]]:
        """By model, one number per file. Raises WorkError if the command fails or its answers are wrong."""
        voices, audible = _audible(references), _audible(files)
        if not voices:
            raise ConfigError(NO_REFERENCE)
        rows = self._command.rows(["--reference", *_absolute(voices), "--"], _absolute(audible))
        found = self._command.scores(rows) or {self.name: []}
        for model, numbers in found.items():
            for number, row in zip(numbers, rows, strict=True):
                if abs(number) > MAX_COSINE:
                    raise self._command.failure(
                        f"gave {model} as {number:g} for {row['file']}: a cosine lies between -1 and 1"
                    )
        return {model: _for_all(files, audible, numbers, NO_VOICE) for model, numbers in found.items()}


class ExternalQualityJudge:
    """A quality judge that is a command."""

    def __init__(self, words: Sequence[str]) -> None:
        """`words` come from `command_words`."""
        self._command = _Command("quality judge", words)
        self.name = self._command.name

    def rate(self, files: Sequence[Path]) -> dict[str, list[float]]:
        """By model, one number per file. Raises WorkError if the command fails or its answers are wrong."""
        audible = _audible(files)
        found = self._command.scores(self._command.rows([], _absolute(audible))) or {self.name: []}
        return {model: _for_all(files, audible, numbers, WORST) for model, numbers in found.items()}


def _run(words: Sequence[str], timeout: float) -> "subprocess.CompletedProcess[str]":
    """As `subprocess.run`, in a process group of its own: all of it is ended when the time is over, or at a signal.

    Otherwise a program behind a shell script would keep its memory, perhaps on a GPU. Raises TimeoutExpired, OSError.
    """
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            _end_group(process)
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def _end_group(process: "subprocess.Popen[str]") -> None:
    if not hasattr(os, "killpg"):  # Windows
        process.kill()
        return
    with suppress(ProcessLookupError):  # all have ended meanwhile
        os.killpg(process.pid, signal.SIGKILL)


def _named(words: Sequence[str]) -> str:
    """The command without the folders of its paths, and 8 digits over its program and the files that it names."""
    files = [Path(shutil.which(words[0]) or words[0]), *(Path(word) for word in words[1:] if Path(word).is_file())]
    digest = hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()
    return f"{' '.join(Path(word).name for word in words)} {digest[:8]}"


def _audible(files: Sequence[Path]) -> list[Path]:
    """The files of 0.1 s or more. Raises DataError for one that cannot be read."""
    return [file for file in files if len(read_for_judge(file, seconds=1)) >= MIN_SAMPLES]


def _for_all(files: Sequence[Path], audible: Sequence[Path], values: Sequence[Value], otherwise: Value) -> list[Value]:
    """A value for each of `files`: those of the audible ones, and `otherwise` for the rest."""
    known = dict(zip(audible, values, strict=True))
    return [known.get(file, otherwise) for file in files]


def _absolute(files: Sequence[Path]) -> list[str]:
    """Absolute paths, which no program takes for options."""
    return [os.path.abspath(file) for file in files]


def _beginnings(files: Sequence[Path], seconds: float, folder: Path) -> list[str]:
    """Write the first seconds of each file into a file of its own in `folder`."""
    cut = []
    for number, file in enumerate(files):
        waveform, rate = read_audio(file, end=seconds)
        cut.append(folder / f"{number:06d}.wav")
        write_wav(cut[-1], waveform, rate)
    return [str(path) for path in cut]
