"""Judges of speech, behind two small protocols: what was said, and whose voice it is."""

import importlib
import json
import re
import shlex
import subprocess
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from higgstune.data.audio import read_audio, resample
from higgstune.errors import ConfigError, WorkError

# Equal-error thresholds on real speech: a judge's own word for "the same speaker".
SAME_SPEAKER = {"resemblyzer": 0.757, "campplus": 0.581}
_ASR_RATE = 16_000  # Hz


class Transcriber(Protocol):
    """Writes down what is said."""

    name: str

    def transcribe(self, files: Sequence[Path]) -> list[str]:
        """One text a file."""
        ...


class FasterWhisper:
    """A faster-whisper model by name or folder; needs the extra `asr`."""

    def __init__(self, name_or_path: str, *, language: str | None = "en") -> None:
        """Raises ConfigError when the extra is not installed or the model cannot be loaded."""
        self.name = f"faster-whisper {Path(name_or_path).name}"
        self.language = language
        try:
            library = importlib.import_module("faster_whisper")
        except ImportError as error:
            raise ConfigError("--asr needs faster-whisper: pip install 'higgstune[asr]'") from error
        try:
            self._model = library.WhisperModel(name_or_path, device="auto", compute_type="int8")
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"--asr {name_or_path} cannot be loaded: {error}") from error

    def transcribe(self, files: Sequence[Path]) -> list[str]:
        """Greedy, each file for itself."""
        texts = []
        for file in files:
            waveform, rate = read_audio(file)
            segments, _ = self._model.transcribe(
                resample(waveform, rate, _ASR_RATE), language=self.language, beam_size=1, temperature=0.0,
                condition_on_previous_text=False, without_timestamps=True,
            )  # fmt: skip
            texts.append(" ".join(segment.text.strip() for segment in segments))
        return texts


class SpeakerJudge:
    """An external command: `COMMAND --reference REF ... -- FILE ...` prints one JSON line a file, a number a judge."""

    def __init__(self, command: str) -> None:
        """Raises ConfigError for an empty command."""
        self.command = shlex.split(command)
        if not self.command:
            raise ConfigError("--speaker-judge is empty")

    def similarities(self, references: Sequence[Path], files: Sequence[Path]) -> dict[str, float]:
        """The mean similarity of the files to the references, by judge. Raises WorkError when the command fails."""
        command = [*self.command, "--reference", *map(str, references), "--", *map(str, files)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ConfigError(f"--speaker-judge {self.command[0]} cannot be run: {error}") from error
        if done.returncode != 0:
            raise WorkError(f"the speaker judge failed ({done.returncode}): {done.stderr[-2000:]}")
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if len(rows) != len(files):
            raise WorkError(f"the speaker judge answered for {len(rows)} of {len(files)} files")
        judges = [key for key in rows[0] if key != "file"]
        return {judge: sum(row[judge] for row in rows) / len(rows) for judge in judges}


def word_error_rate(references: Sequence[str], heard: Sequence[str]) -> float:
    """Word errors over reference words, summed over the corpus; lower case, without punctuation."""
    jiwer = importlib.import_module("jiwer")
    return float(jiwer.wer([_words(text) for text in references], [_words(text) for text in heard]))


def _words(text: str) -> str:
    kept = "".join(c for c in text.lower() if c == "'" or not unicodedata.category(c).startswith(("P", "S")))
    return re.sub(r"\s+", " ", kept.replace("'", "")).strip()
