"""Judges of speech: an ASR for the words, a speaker judge for the voice, a quality judge for the naturalness.

A judge is given as a spec, which is one of

    a folder      of a model: ~/models/whisper-large-v3
    a .pt file    of the speaker model CAM++: ~/models/campplus_cn_en_common.pt
    a name        of a model: large-v3, microsoft/wavlm-base-plus-sv, distillmos
    a command     two words or more, or the path of a program: "python judge.py asr"; see `command`

`base` has the protocols, `asr`, `models` and `campplus` the models, `command` the judges that are programs, and `cache`
keeps the answers of any of them.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from higgstune.errors import ConfigError
from higgstune.evaluation.judges.base import ClipTranscriber, Embedder, Judges, QualityJudge, SpeakerJudge
from higgstune.evaluation.judges.command import (
    ExternalQualityJudge,
    ExternalSpeakerJudge,
    ExternalTranscriber,
    command_words,
)
from higgstune.hub import check_name

if TYPE_CHECKING:
    from higgstune.evaluation.judges.asr import FasterWhisper, TransformersWhisper
    from higgstune.evaluation.judges.campplus import CamPlus
    from higgstune.evaluation.judges.models import WavLM

# Cosines at the equal error rate on real speech: above them a judge means the same speaker.
SAME_SPEAKER = {"resemblyzer": 0.757, "campplus": 0.581}
DEFAULT_SPEAKER = "microsoft/wavlm-base-plus-sv"
AUTO = "auto"  # the default model of a role, if it is in the hub's cache; it is never downloaded
DISTILLMOS = "distillmos"


def judge_specs(
    asr: str | None = None, speaker: str | None = None, quality: str | None = None
) -> dict[str, str | None]:
    """The specs by role (asr, speaker, naturalness), with "auto" resolved: all that can be checked without a model.

    Raises ConfigError for a spec that names no judge or needs an extra that is not installed, CheckpointError for a
    folder that does not exist.
    """
    if speaker == AUTO:
        from huggingface_hub import try_to_load_from_cache

        cached = isinstance(try_to_load_from_cache(DEFAULT_SPEAKER, "config.json"), str)
        speaker = DEFAULT_SPEAKER if cached else None
    if asr is not None and not command_words(asr) and not Path(asr).expanduser().is_dir():
        if "/" in asr:
            check_name(asr, what="ASR")
        else:
            _check_installed("faster_whisper", f"the ASR {asr} needs faster-whisper", "asr")
    if asr is not None:
        _check_installed("jiwer", "error rates need jiwer", "asr")
    if speaker is not None and not command_words(speaker):
        if _is_file(speaker):
            _check_installed("kaldi_native_fbank", f"the speaker judge {speaker} needs kaldi-native-fbank", "collect")
        else:
            check_name(speaker, what="speaker judge")
    if quality is not None and not command_words(quality):
        if quality != DISTILLMOS:
            raise ConfigError(f"there is no quality judge {quality!r}: give {DISTILLMOS!r}, or a command")
        _check_installed(DISTILLMOS, f"the quality judge {DISTILLMOS} needs its package", "naturalness")
    return {"asr": asr, "speaker": speaker, "naturalness": quality}


def load_judges(
    asr: str | None = None, speaker: str | None = None, quality: str | None = None, *, device: str = "cpu"
) -> Judges:
    """The judges of these specs, with their models loaded onto `device`.

    ASR: a Whisper of faster-whisper, by name ("large-v3") or CTranslate2 folder, or of transformers, by folder or hub
    id. Speaker: a WavLM x-vector model of transformers, by folder or hub id; "auto" is `DEFAULT_SPEAKER` if it is in
    the hub's cache, else no judge. Quality: "distillmos".
    Each may also be a command. Raises ConfigError for a spec that names no judge or needs an extra that is not
    installed, and CheckpointError for a model that cannot be loaded.
    """
    specs = judge_specs(asr, speaker, quality)
    return Judges(
        asr=None if specs["asr"] is None else _transcriber(specs["asr"], device),
        speaker=None if specs["speaker"] is None else _speaker_judge(specs["speaker"], device),
        quality=None if specs["naturalness"] is None else _quality_judge(specs["naturalness"], device),
    )


def load_embedder(spec: str, device: str = "cpu") -> Embedder:
    """The speaker model of a spec, to embed voices: as `load_judges`, but a command gives cosines and no embeddings.

    Raises ConfigError for a command and for a model that needs an extra, CheckpointError if it cannot be loaded.
    """
    if command_words(spec):
        raise ConfigError(
            f"the speaker judge {spec!r} is a command, which compares files and has no embeddings: give the .pt file "
            f"of a CAM++, or the folder or hub id of a WavLM such as {DEFAULT_SPEAKER}"
        )
    judge_specs(speaker=spec)
    return _voice_model(spec, device)


def load_clip_transcriber(spec: str, device: str = "cpu") -> ClipTranscriber:
    """The ASR of a spec, to transcribe many short clips: as `load_judges`."""
    return _transcriber(spec, device)


def check_languages(judges: Judges, languages: Iterable[str | None]) -> None:
    """Raises ConfigError for a language that the ASR does not support, before anything is spoken in it."""
    for language in dict.fromkeys(languages):
        if judges.asr is not None:
            judges.asr.transcribe([], language=language)


def _check_installed(package: str, need: str, extra: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(f"{need}: pip install 'higgstune[{extra}]'")


# The modules of models import their libraries, so each is imported when one of its judges is needed.
def _transcriber(spec: str, device: str) -> "ExternalTranscriber | FasterWhisper | TransformersWhisper":
    if words := command_words(spec):
        return ExternalTranscriber(words)
    from higgstune.evaluation.judges.asr import load_transcriber

    return load_transcriber(spec, device)


def _speaker_judge(spec: str, device: str) -> SpeakerJudge:
    if words := command_words(spec):
        return ExternalSpeakerJudge(words)
    return _voice_model(spec, device)


def _voice_model(spec: str, device: str) -> "CamPlus | WavLM":
    if _is_file(spec):
        from higgstune.evaluation.judges.campplus import CamPlus

        return CamPlus(spec, device=device)
    from higgstune.evaluation.judges.models import WavLM

    return WavLM(spec, device=device)


def _is_file(spec: str) -> bool:
    return Path(spec).expanduser().is_file()


def _quality_judge(spec: str, device: str) -> QualityJudge:
    if words := command_words(spec):
        return ExternalQualityJudge(words)
    from higgstune.evaluation.judges.models import DistillMos

    return DistillMos(device=device)
