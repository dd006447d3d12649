"""What all judges share: the protocols, how they read a file and compare voices, and how results name them.

Every result names its judge with version and hash of the weights: a number without its judge means nothing.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from higgstune.checkpoint_files import malformed_errors, sha256_of
from higgstune.data.audio import read_audio, resample
from higgstune.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

RATE = 16_000  # Hz, at which all judges were trained
MAX_VOICE_SAMPLES = 60 * RATE  # of a file, to compare voices: the memory of attention grows with the square
MIN_SAMPLES = RATE // 10  # a shorter file has no speech, and too few samples for the first layers. It gets:
NO_VOICE = 0.0  # as its similarity to any voice
WORST = 1.0  # as its mean opinion score
NO_REFERENCE = "there is no recording of the speaker, of 0.1 s or more, to compare with"


class Transcriber(Protocol):
    """Transcribes speech (ASR)."""

    name: str  # with version

    def transcribe(
        self, files: Sequence[Path], *, language: str | None = None, seconds: float | None = None
    ) -> list[str]:
        """One transcript per file, empty if there is no speech; with `seconds`, of the beginning only.

        `language` is an ISO 639-1 code; without one, the judge detects the language of each file.
        """
        ...


@dataclass(frozen=True)
class Transcript:
    """What is said in a clip."""

    text: str  # empty if there is no speech
    logprob: float | None  # mean log-probability of its words, where the ASR gives it


class ClipTranscriber(Protocol):
    """Transcribes many short clips at once."""

    name: str  # with version

    def transcribe_clips(self, waveforms: Sequence[np.ndarray], language: str | None) -> list[Transcript]:
        """One transcript per clip, [samples] float32 mono at 16 kHz.

        `language` is an ISO 639-1 code; without one, all clips are taken to be in the language that is detected.
        """
        ...

    def detect_language(self, waveforms: Sequence[np.ndarray]) -> str:
        """The ISO 639-1 code of the language that most of the clips are in."""
        ...


class SpeakerJudge(Protocol):
    """Measures how similar voices are."""

    name: str  # with version

    def similarities(self, references: Sequence[Path], files: Sequence[Path]) -> dict[str, list[float]]:
        """By model, the main one first: for each file, its cosine to the mean of the references, -1 to 1."""
        ...


class Embedder(Protocol):
    """Turns a voice into a vector: the nearer two of them, by cosine, the more alike the voices."""

    name: str  # with version

    def embed(self, waveform: np.ndarray) -> np.ndarray:
        """[samples] float32 mono at 16 kHz, 0.1 s or more -> [dim] float32 of length 1."""
        ...


class QualityJudge(Protocol):
    """Rates how natural speech sounds."""

    name: str  # with version

    def rate(self, files: Sequence[Path]) -> dict[str, list[float]]:
        """By model, the main one first: for each file, a mean opinion score, 1 (bad) to 5 (excellent)."""
        ...


@dataclass(frozen=True)
class Judges:
    """The judge of each role; None if the role has no judge."""

    asr: Transcriber | None = None
    speaker: SpeakerJudge | None = None
    quality: QualityJudge | None = None


class Voices(ABC):
    """Compares voices by the cosine of their embeddings. Keeps the embeddings of files that do not change."""

    name: str
    model: str  # its key in `similarities`

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], Tensor] = {}

    @abstractmethod
    def embed(self, waveform: np.ndarray) -> np.ndarray:
        """See `Embedder`."""

    def similarities(self, references: Sequence[Path], files: Sequence[Path]) -> dict[str, list[float]]:
        """Cosine of each file to the mean of the references' embeddings; of the first minute of each.

        A file under 0.1 s has no voice and gets 0. Raises ConfigError if no reference has a voice.
        """
        import torch
        from torch.nn.functional import normalize

        voices = [embedding for embedding in map(self._embedding, references) if embedding is not None]
        if not voices:
            raise ConfigError(NO_REFERENCE)
        centre = normalize(torch.stack(voices).mean(0), dim=0)
        embeddings = [self._embedding(file) for file in files]
        return {self.model: [NO_VOICE if found is None else float(found @ centre) for found in embeddings]}

    def _embedding(self, file: Path) -> "Tensor | None":
        """[dim] float32 of length 1; None for a file under 0.1 s."""
        import torch

        waveform = read_for_judge(file)
        if len(waveform) < MIN_SAMPLES:
            return None
        state = file.stat()
        key = (str(file.resolve()), state.st_mtime_ns, state.st_size)
        if key not in self._known:
            self._known[key] = torch.from_numpy(self.embed(waveform[:MAX_VOICE_SAMPLES]))
        return self._known[key]


OPTIONS = {"asr": "--asr", "speaker": "--speaker-judge", "naturalness": "--quality-judge"}  # by role


def role_of(metric: str) -> str | None:
    """The role of the judge that a metric needs; None if it needs no judge."""
    if metric.startswith(("wer", "cer", "babble_", "recording_", "leak_")):
        return "asr"
    if metric.startswith(("similarity", "speaker_")):
        return "speaker"
    return "naturalness" if metric == "naturalness" else None


def read_for_judge(file: Path, *, seconds: float | None = None) -> np.ndarray:
    """The waveform of a file, or of its first `seconds`: [samples] float32 mono at 16 kHz.

    Raises DataError for a file that cannot be read, or has samples that are not finite.
    """
    waveform, rate = read_audio(file, end=seconds)
    if not np.isfinite(waveform).all():
        raise DataError(f"{file} has samples that are not finite: write it again")
    return resample(waveform, rate, RATE)


def model_name(library: str, name: str | Path, weights: Sequence[Path]) -> str:
    """A judge's name in results: library and version, the model's name, and 8 digits of its weights' sha256."""
    digests = [sha256_of(path) for path in weights]
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return f"{library} {version(library)}, {short_name(name)} {whole[:8]}"


def load_weights(model_class: Any, folder: Path, what: str, **options: Any) -> Any:
    """A model of transformers from its folder, in float32 and eval mode; `what` names it in errors.

    Raises CheckpointError if it cannot be loaded or lacks a weight, which would be initialised at random.
    """
    import torch

    try:
        model, found = model_class.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32, **options
        )
    except malformed_errors(UnpicklingError) as error:
        raise CheckpointError(f"the {what} {folder} cannot be loaded: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"the {what} {folder} lacks {len(missing)} weights of a {model_class.__name__}, such as {missing[0]}: it "
            "is another model, or a damaged copy"
        )
    return model.eval()


def short_name(name: str | Path) -> str:
    """The last part of a folder's path or of a hub id; for a folder in the hub's cache, the repository's name."""
    path = Path(name)
    path = path.resolve() if path.is_dir() else path
    if path.parent.name == "snapshots":
        return path.parent.parent.name.split("--")[-1]
    return path.name


def check_language(language: str | None, known: Sequence[str], judge: str) -> str | None:
    """Whisper's code of a language: "zh" for "zh-CN". Raises ConfigError if the judge does not support it."""
    if language is None:
        return None
    code = language.replace("_", "-").split("-")[0].lower()
    if code not in known:
        supported = "English only" if list(known) == ["en"] else f"{len(known)} other languages"
        raise ConfigError(
            f"{judge} does not support the language {language!r}, it supports {supported}: name another ASR"
        )
    return code
