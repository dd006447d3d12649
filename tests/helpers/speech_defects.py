"""Real speech as clips to judge, defects planted into it, and judges that know its words."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from higgstune.codec.mel import Spectrum
from higgstune.data.audio import read_audio, resample
from higgstune.evaluation.clips import Clip
from higgstune.evaluation.waveform_checks import sounds

SPEECH = Path(__file__).parents[3] / "shared" / "speech"
RATE = 16_000
_MEL = Spectrum(RATE, n_fft=640, hop=160, num_mels=40, max_hz=7600)


@dataclass(frozen=True)
class Take:
    """A waveform at 16 kHz and the words in it, each with the time of its middle in seconds."""

    waveform: np.ndarray
    words: tuple[tuple[float, str], ...]

    @property
    def seconds(self) -> float:
        return len(self.waveform) / RATE

    @property
    def text(self) -> str:
        return " ".join(word for _, word in self.words)

    def part(self, start: float, end: float) -> "Take":
        words = tuple((at - start, word) for at, word in self.words if start <= at < end)
        return Take(self.waveform[round(start * RATE) : round(end * RATE)], words)

    def __add__(self, other: "Take") -> "Take":
        later = tuple((at + self.seconds, word) for at, word in other.words)
        return Take(np.concatenate([self.waveform, other.waveform]), self.words + later)

    def write(self, path: Path, asr: "KnowingTranscriber") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, self.waveform, RATE, subtype="PCM_16")
        asr.known[_digest(path)] = self
        return path


def silence(seconds: float) -> Take:
    return Take(np.zeros(round(seconds * RATE), np.float32), ())


def speech_folder(name: str) -> Path:
    """A folder of real speech; skips the test where it is absent."""
    folder = SPEECH / name
    if not folder.is_dir():
        pytest.skip(f"real speech is not at {folder}")
    return folder


def real_takes(corpus: str, speaker: str | None = None, *, seconds: float = 5.0, at_least: float = 3.5) -> list[Take]:
    """The first seconds of real recordings.

    Words are assumed to be spread evenly and transcripts to be correct: the transcriber below has the same times.
    """
    folder, takes = speech_folder(corpus), []
    for line in (folder / "metadata.csv").read_text(encoding="utf-8").splitlines():
        name, *fields = line.split("|")
        if corpus == "librispeech" and fields[0] != speaker:
            continue
        waveform, rate = read_audio(next((folder / "wavs").glob(f"{name}.*")))
        waveform, words = resample(waveform, rate, RATE), fields[1].split()
        length = len(waveform) / RATE
        take = Take(waveform, tuple(((i + 0.5) * length / len(words), word) for i, word in enumerate(words)))
        if length >= at_least:
            takes.append(take.part(0, min(length, seconds)))
    return takes


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class KnowingTranscriber:
    """Knows the transcripts of the takes, and finds each take by the content of its file."""

    name = "knowing 1"

    def __init__(self) -> None:
        self.known: dict[str, Take] = {}
        self.calls: list[tuple[int, str | None, float | None]] = []

    def transcribe(
        self, files: Sequence[Path], *, language: str | None = None, seconds: float | None = None
    ) -> list[str]:
        self.calls.append((len(files), language, seconds))
        takes = [self.known[_digest(file)] for file in files]
        return [take.text if seconds is None else take.part(0, seconds).text for take in takes]


class ColourJudge:
    """Compares voices by the mean spectrum where they sound."""

    name = "colour 1"

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def similarities(self, references: Sequence[Path], files: Sequence[Path]) -> dict[str, list[float]]:
        self.calls.append((len(references), len(files)))
        voice = np.mean([_colour(file) for file in references], axis=0)
        cosines = [float(_colour(file) @ voice / np.linalg.norm(voice)) for file in files]
        return {"colour": cosines, "half": [value / 2 for value in cosines]}


def _colour(file: Path) -> np.ndarray:
    """[80], of norm 1: mean and spread of each band."""
    waveform, _ = read_audio(file)
    mel = _MEL.mel(waveform[: len(waveform) // 160 * 160])
    bands = np.log(mel[sounds(waveform, RATE)] + 1e-5)
    colour = np.concatenate([bands.mean(0) - bands.mean(), bands.std(0) - bands.std(0).mean()])
    return colour / np.linalg.norm(colour)


@dataclass
class World:
    """Clips of some speakers, with everything that can be known of them."""

    folder: Path
    asr: KnowingTranscriber
    takes: dict[str, Take]
    leading: dict[str, Take]  # of each speaker's reference
    clips: list[Clip]
    voices: Mapping[str, list[Path]]

    def with_takes(self, name: str, takes: Mapping[str, Take]) -> list[Clip]:
        """The clips, some with another sound."""
        return [
            replace(clip, file=takes[clip.id].write(self.folder / name / f"{clip.id}.wav", self.asr))
            if clip.id in takes
            else clip
            for clip in self.clips
        ]


def real_world(folder: Path, speakers: Mapping[str, list[Take]], *, clips_each: int = 5) -> World:
    """As many clips of each speaker; their other takes are the voices, and the first of these the reference."""
    world = World(folder, KnowingTranscriber(), {}, {}, [], {})
    voices = {}
    for speaker, takes in speakers.items():
        spoken, rest = takes[:clips_each], takes[clips_each:]
        voices[speaker] = [
            take.write(folder / "voices" / speaker / f"{i}.wav", world.asr) for i, take in enumerate(rest)
        ]
        world.leading[speaker] = rest[0]
        for number, take in enumerate(spoken):
            name = f"{speaker}-{number}"
            world.takes[name] = take
            recording = take.write(folder / "recordings" / f"{name}.wav", world.asr)
            file = take.write(folder / f"{name}.wav", world.asr)
            world.clips.append(Clip(name, file, take.text, "en", speaker, voices[speaker][0], rest[0].text, recording))
    world.voices = voices
    return world
