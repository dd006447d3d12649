"""Judges of speech, behind three small protocols: what was said, whose voice it is, and how natural it sounds.

Each is named in every result with its version and its weights' hash: a number without its judge means nothing. A judge
is given as a spec, which is one of

    a folder      of a model: ~/models/whisper-large-v3
    a name        of a model: large-v3, microsoft/wavlm-base-plus-sv, distillmos
    a command     two words or more, or the path of a program: "python judge.py asr"; see `external`
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from huggingface_hub import try_to_load_from_cache

from higgstune.errors import ConfigError
from higgstune.evaluation.external import ExternalQualityJudge, ExternalSpeakerJudge, ExternalTranscriber, command_words

# Equal-error thresholds on real speech: a judge's own word for "the same speaker".
SAME_SPEAKER = {"resemblyzer": 0.757, "campplus": 0.581}
DEFAULT_SPEAKER = "microsoft/wavlm-base-plus-sv"
AUTO = "auto"  # the default model of a role, where it is on this disk; nothing is fetched for it
DISTILLMOS = "distillmos"


class Transcriber(Protocol):
    """Writes down what is said."""

    name: str  # with version

    def transcribe(
        self, files: Sequence[Path], *, language: str | None = None, seconds: float | None = None
    ) -> list[str]:
        """One text a file, empty where nothing is heard; with `seconds`, of the beginning alone.

        `language` is an ISO 639-1 code; without one, the judge finds it out, file by file.
        """
        ...


class SpeakerJudge(Protocol):
    """Says how near a voice is to another."""

    name: str  # with version

    def similarities(self, references: Sequence[Path], files: Sequence[Path]) -> dict[str, list[float]]:
        """By model, the main one first: for each file, its cosine to the mean of the references, -1 to 1."""
        ...


class QualityJudge(Protocol):
    """Says how natural speech sounds."""

    name: str  # with version

    def rate(self, files: Sequence[Path]) -> dict[str, list[float]]:
        """By model, the main one first: for each file, a mean opinion score, 1 (bad) to 5 (excellent)."""
        ...


@dataclass(frozen=True)
class Judges:
    """Who judges; None where no one does."""

    asr: Transcriber | None = None
    speaker: SpeakerJudge | None = None
    quality: QualityJudge | None = None


OPTIONS = {"asr": "--asr", "speaker": "--speaker-judge", "naturalness": "--quality-judge"}  # by role


def role_of(metric: str) -> str | None:
    """The role of the judge that a metric needs; None where it needs none."""
    if metric.startswith(("wer", "cer", "babble_", "recording_", "leak_")):
        return "asr"
    if metric.startswith(("similarity", "speaker_")):
        return "speaker"
    return "naturalness" if metric == "naturalness" else None


def load_judges(
    asr: str | None = None, speaker: str | None = None, quality: str | None = None, *, device: str = "cpu"
) -> Judges:
    """The judges of these specs, their models loaded onto `device`.

    ASR: a Whisper of faster-whisper, by name ("large-v3") or CTranslate2 folder, or of transformers, by folder or hub
    id. Speaker: a WavLM x-vector model of transformers, by folder or hub id; "auto" is `DEFAULT_SPEAKER` where that was
    fetched before, else nobody. Quality: "distillmos".
    Each may be a command. Raises ConfigError for a spec that leads to no judge, or needs an extra that is not
    installed, and CheckpointError for a model that cannot be loaded.
    """
    return Judges(
        asr=None if asr is None else _transcriber(asr, device),
        speaker=None if speaker is None else _speaker_judge(speaker, device),
        quality=None if quality is None else _quality_judge(quality, device),
    )


def check_languages(judges: Judges, languages: Iterable[str | None]) -> None:
    """Raises ConfigError for a language that the ASR does not know, before anything is spoken for it."""
    for language in dict.fromkeys(languages):
        if judges.asr is not None:
            judges.asr.transcribe([], language=language)


# The modules of models import their libraries, so each is imported where a judge of it is asked for.
def _transcriber(spec: str, device: str) -> Transcriber:
    if words := command_words(spec):
        return ExternalTranscriber(words)
    from higgstune.evaluation.whisper import load_transcriber

    return load_transcriber(spec, device)


def _speaker_judge(spec: str, device: str) -> SpeakerJudge | None:
    if spec == AUTO:
        if not isinstance(try_to_load_from_cache(DEFAULT_SPEAKER, "config.json"), str):
            return None
        spec = DEFAULT_SPEAKER
    if words := command_words(spec):
        return ExternalSpeakerJudge(words)
    from higgstune.evaluation.wavlm import WavLM

    return WavLM(spec, device=device)


def _quality_judge(spec: str, device: str) -> QualityJudge:
    if words := command_words(spec):
        return ExternalQualityJudge(words)
    if spec != DISTILLMOS:
        raise ConfigError(f"there is no quality judge {spec!r}: give {DISTILLMOS!r}, or a command")
    from higgstune.evaluation.naturalness import DistillMos

    return DistillMos(device=device)
