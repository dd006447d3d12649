"""Many short clips transcribed in few windows.

Whisper encodes 30 s however short a clip is. So clips are packed, in order, into stretches of up to 29 s with silence
between them; a stretch is transcribed once, and each word goes to the clip that its time overlaps most:

    clips       |-- one --|  |-- two --|      |-- three --|
    stretch     |-- one --|..|-- two --|..|-- three --|
    words        In being   compara-tive  ly modern

Word times are too early by 0.15 s in the median and vary by as much, so the silence between clips is longer than that.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from higgstune.errors import DataError
from higgstune.evaluation.judges.base import MIN_SAMPLES, RATE, Transcript

_LONGEST = 29 * RATE  # samples of a stretch of several clips; a longer clip is by itself
_GAP = RATE  # samples of silence between clips: see the log of measurements
_EARLY = 0.15  # s by which Whisper's word times are too early
_MAX_WORD_RATE = 6.0  # words a second: above it, a clip may have a neighbour's words
_MAX_COMPRESSION = 2.4  # of the text's bytes, as Whisper's own code has it: above it, a loop
_VOTES = 5  # stretches that decide about the language


@dataclass(frozen=True)
class Word:
    """A word of a transcript, as Whisper's tokens have it: with the space before it, punctuation included."""

    text: str
    start: float  # s
    end: float  # s
    logprob: float | None = None


Recognise = Callable[[np.ndarray], list[Word]]  # [samples] at 16 kHz -> its words


def transcribe_packed(waveforms: Sequence[np.ndarray], recognise: Recognise, *, pack: bool = True) -> list[Transcript]:
    """One transcript per clip, [samples] float32 mono at 16 kHz; without `pack`, each clip is a stretch.

    Clips under 0.1 s have no speech. Clips whose words look wrong are recognised by themselves.
    """
    transcripts = [Transcript("", None)] * len(waveforms)
    for stretch in _stretches(waveforms, _LONGEST if pack else 0):
        clips = [waveforms[index] for index in stretch]
        words = _words_by_clip(clips, recognise(_joined(clips)))
        for at in _doubtful(clips, words) if len(clips) > 1 else ():
            words[at] = recognise(clips[at])
        for index, found in zip(stretch, words, strict=True):
            transcripts[index] = _transcript(found)
    return transcripts


def vote_on_language(
    waveforms: Sequence[np.ndarray], probabilities: Callable[[np.ndarray], Mapping[str, float]]
) -> str:
    """The language that is likeliest over a few stretches, spread over the clips.

    Raises DataError if no clip has 0.1 s.
    """
    stretches = list(_stretches(waveforms, _LONGEST))
    if not stretches:
        raise DataError("there is no clip of 0.1 s or more to detect the language from: name the language")
    chosen = sorted({int(at) for at in np.linspace(0, len(stretches) - 1, _VOTES)})
    votes: dict[str, float] = {}
    for stretch in (stretches[at] for at in chosen):
        for language, probability in probabilities(_joined([waveforms[index] for index in stretch])).items():
            votes[language] = votes.get(language, 0.0) + probability
    return max(votes, key=lambda language: votes[language])


def _stretches(waveforms: Sequence[np.ndarray], longest: int) -> Iterator[list[int]]:
    """The indices of the clips of each stretch."""
    stretch: list[int] = []
    length = 0  # samples
    for index, waveform in enumerate(waveforms):
        if len(waveform) < MIN_SAMPLES:
            continue
        if stretch and length + _GAP + len(waveform) > longest:
            yield stretch
            stretch, length = [], 0
        length += len(waveform) + (_GAP if stretch else 0)
        stretch.append(index)
    if stretch:
        yield stretch


def _joined(clips: Sequence[np.ndarray]) -> np.ndarray:
    silence = np.zeros(_GAP, np.float32)
    return np.concatenate([part for clip in clips for part in (silence, clip)][1:])


def _words_by_clip(clips: Sequence[np.ndarray], words: Sequence[Word]) -> list[list[Word]]:
    """Each word at the clip that its time overlaps most; a word in the silence, at the nearest clip."""
    by_clip: list[list[Word]] = [[] for _ in clips]
    ends = np.cumsum([len(clip) + _GAP for clip in clips]) / RATE - _GAP / RATE
    starts = ends - np.array([len(clip) for clip in clips]) / RATE
    for word in words:
        overlaps = np.minimum(ends, word.end + _EARLY) - np.maximum(starts, word.start + _EARLY)  # below 0: a distance
        by_clip[int(overlaps.argmax())].append(word)
    return by_clip


def _doubtful(clips: Sequence[np.ndarray], words: Sequence[Sequence[Word]]) -> list[int]:
    """The clips that Whisper passed over, those that may have the words of such a neighbour; all of a loop."""
    text = "".join(word.text for found in words for word in found).encode()
    if len(text) > _MAX_COMPRESSION * len(zlib.compress(text)):
        return list(range(len(clips)))
    rates = [len(found) * RATE / len(clip) for clip, found in zip(clips, words, strict=True)]
    passed = {at for at, rate in enumerate(rates) if not rate}
    beside = {at + by for at in passed for by in (-1, 1)}
    return [at for at, rate in enumerate(rates) if at in passed or (at in beside and rate > _MAX_WORD_RATE)]


def _transcript(words: Sequence[Word]) -> Transcript:
    logprobs = [word.logprob for word in words if word.logprob is not None]
    return Transcript("".join(word.text for word in words).strip(), float(np.mean(logprobs)) if logprobs else None)
