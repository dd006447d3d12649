"""Long recordings made of the demo's clips, with known truth, and an ASR and a speaker model that know it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import soundfile

from higgstune.data.audio import read_audio, resample
from higgstune.evaluation.judges.base import Transcript

RATE = 16_000
FLOOR = 1e-3  # of the room, -60 dBFS


@dataclass(frozen=True)
class Said:
    """What is said in a recording, and when, in seconds."""

    start: float
    end: float
    text: str
    speaker: str


@dataclass(frozen=True)
class Talk:
    """A recording and its truth."""

    path: Path
    samples: np.ndarray  # [samples] float32 at 16 kHz
    said: list[Said]


def clips_of(voice: str, count: int) -> list[tuple[np.ndarray, str]]:
    """The first clips of a voice of the demo at 16 kHz, trimmed, with their texts."""
    with resources.as_file(resources.files("higgstune.demo") / "assets" / "voices") as folder:
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        found = []
        for row in [row for row in rows if row["speaker"] == voice][:count]:
            waveform, rate = read_audio(folder / row["audio"])
            sound = resample(waveform, rate, RATE)
            loud = np.flatnonzero(np.abs(sound) > 0.02 * np.abs(sound).max())
            found.append((sound[loud[0] : loud[-1]], row["text"]))
    return found


def make_talk(path: Path, turns: Sequence[tuple[str, int, float]], seed: int = 0) -> Talk:
    """A recording of turns: the voice, the number of its clip, and the pause behind it in seconds."""
    random = np.random.default_rng(seed)
    clips = {voice: clips_of(voice, 1 + max(n for v, n, _ in turns if v == voice)) for voice, _, _ in turns}
    parts, said, at = [np.zeros(RATE // 2, np.float32)], [], 0.5
    for voice, number, pause in turns:
        sound, text = clips[voice][number]
        said.append(Said(at, at + len(sound) / RATE, text, voice))
        parts += [sound, np.zeros(round(pause * RATE), np.float32)]
        at += len(sound) / RATE + round(pause * RATE) / RATE
    samples = np.concatenate(parts)
    samples = (samples + FLOOR * random.standard_normal(len(samples))).astype(np.float32)
    soundfile.write(path, np.clip(samples, -1, 1), RATE)
    return Talk(path, samples, said)


def talks_of(folder: str | Path) -> list[Talk]:
    """Recordings of one sentence each, with its text beside it."""
    talks = []
    for path in sorted(Path(folder).glob("*.opus")):
        waveform, rate = read_audio(path)
        samples = resample(waveform, rate, RATE)
        said = Said(0.0, len(samples) / RATE, path.with_suffix(".txt").read_text(), "rms")
        talks.append(Talk(path, samples, [said]))
    return talks


class KnowingAsr:
    """Finds each clip in the recordings that it knows, and gives the words that are said there."""

    name = "knowing 1"

    def __init__(self, *talks: Talk, dies_at: int | None = None) -> None:
        self.talks, self.clips, self.dies_at = talks, 0, dies_at

    def detect_language(self, waveforms: Sequence[np.ndarray]) -> str:
        """English."""
        return "en"

    def transcribe_clips(self, waveforms: Sequence[np.ndarray], language: str | None = None) -> list[Transcript]:
        """The texts of what lies mostly inside of each clip."""
        if self.dies_at is not None and self.clips >= self.dies_at:
            raise KeyboardInterrupt
        self.clips += len(waveforms)
        return [Transcript(self._text(waveform), -0.2) for waveform in waveforms]

    def _text(self, waveform: np.ndarray) -> str:
        talk, start = max(((t, *_offset(t.samples, waveform)) for t in self.talks), key=lambda found: found[2])[:2]
        end = start + len(waveform) / RATE
        inside = [s.text for s in talk.said if min(end, s.end) - max(start, s.start) > 0.5 * (s.end - s.start)]
        return " ".join(inside)


class KnowingEars:
    """Embeds a span as the voice that speaks in most of it."""

    name = "knowing ears 1"

    def __init__(self, *talks: Talk) -> None:
        self.talks = talks
        self.voices = sorted({said.speaker for talk in talks for said in talk.said})
        self.spans = 0

    def embed(self, waveform: np.ndarray) -> np.ndarray:
        """[dim] float32 of length 1."""
        self.spans += 1
        talk, start = max(((t, *_offset(t.samples, waveform)) for t in self.talks), key=lambda found: found[2])[:2]
        end = start + len(waveform) / RATE
        point = np.full(len(self.voices) + 1, 0.05, np.float32)
        for said in talk.said:
            point[self.voices.index(said.speaker)] += max(0.0, min(end, said.end) - max(start, said.start))
        return point / np.linalg.norm(point)


def _offset(samples: np.ndarray, part: np.ndarray) -> tuple[float, float]:
    """Where a part lies in a recording, in seconds, and how well it fits."""
    size = 1 << int(np.ceil(np.log2(len(samples) + len(part))))
    match = np.fft.irfft(np.fft.rfft(samples, size) * np.conj(np.fft.rfft(part, size)), size)[: len(samples)]
    place = int(match.argmax())
    return place / RATE, float(match[place] / np.linalg.norm(part))
