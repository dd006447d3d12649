"""Judges: models with tiny random weights, commands, and errors for wrong answers."""

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from recordings import speech, write
from safetensors.torch import load_file, save_file
from tiny_judges import save_tiny_asr, save_tiny_wavlm
from tiny_whisper import save_tiny_whisper

from higgstune import torchaudio_compat
from higgstune.errors import CheckpointError, ConfigError, DataError, WorkError
from higgstune.evaluation import judges
from higgstune.evaluation.judges import load_judges
from higgstune.evaluation.judges.asr import FasterWhisper, TransformersWhisper, load_transcriber
from higgstune.evaluation.judges.base import SpeakerJudge, Transcriber, check_language, short_name
from higgstune.evaluation.judges.command import ExternalSpeakerJudge, command_words
from higgstune.evaluation.judges.models import DistillMos, WavLM

SPEECH = Path(__file__).parents[3] / "shared" / "speech" / "ljspeech" / "wavs"
COMMAND = """
import json, os, sys
import soundfile
role, files = sys.argv[1], sys.argv[2:]
references = []
if role == "speaker":
    assert files[0] == "--reference"
    split = files.index("--")
    references, files = files[1:split], files[split + 1:]
print("loading the model")
for file in files:
    seconds = soundfile.info(file).duration
    answers = {"asr": {"text": f" {seconds:.1f} s "}, "speaker": {"main": seconds / 10, "other": len(references) / 8},
               "quality": {"mos": 1 + seconds}}
    print(json.dumps({"file": file, **answers[role]}))
"""


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    """1 s, 0.3 s, and nothing at all."""
    lengths = {"one.wav": 1.0, "short -name.wav": 0.3, "empty.wav": 0.0}
    return [
        write(tmp_path / name, speech(1, seed)[: int(16_000 * s)]) for seed, (name, s) in enumerate(lengths.items())
    ]


@pytest.fixture
def judge(tmp_path: Path) -> str:
    script = tmp_path / "judge of mine.py"
    script.write_text(COMMAND)
    return f"{sys.executable} '{script}'"


@pytest.fixture(scope="module")
def wavlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wavlm(tmp_path_factory.mktemp("judges") / "tiny-sv")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_asr(tmp_path_factory.mktemp("judges") / "tiny-asr", seconds=2)


# Commands


def test_commands_answer_a_line_per_file_and_do_not_get_empty_files(judge: str, clips: list[Path]) -> None:
    judges = load_judges(f"{judge} asr", f"{judge} speaker", f"{judge} quality")
    assert judges.asr is not None
    assert judges.speaker is not None
    assert judges.quality is not None
    assert judges.asr.transcribe(clips) == ["1.0 s", "0.3 s", ""]
    assert judges.asr.transcribe(clips, language="de", seconds=0.5) == ["0.5 s", "0.3 s", ""]
    found = judges.speaker.similarities(clips, clips)
    assert list(found) == ["main", "other"]
    assert found["main"] == pytest.approx([0.1, 0.03, 0.0])
    assert found["other"] == [0.25, 0.25, 0.0], "an empty reference is none"
    assert judges.quality.rate(clips) == {"mos": pytest.approx([2.0, 1.3, 1.0])}
    assert judges.quality.rate(clips[:0]) == {judges.quality.name: []}
    with pytest.raises(ConfigError, match="no recording of the speaker"):
        judges.speaker.similarities(clips[2:], clips)
    with pytest.raises(DataError, match="no such file"):
        judges.asr.transcribe([Path("nowhere.wav")])


def test_a_command_is_named_by_its_words_and_the_content_of_its_files(judge: str, tmp_path: Path) -> None:
    asr = load_judges(f"{judge} asr").asr
    assert asr is not None
    assert asr.name.startswith(f"{Path(sys.executable).name} judge of mine.py asr ")
    (tmp_path / "judge of mine.py").write_text(COMMAND + "\n")
    changed = load_judges(f"{judge} asr").asr
    assert changed is not None
    assert changed.name[:-8] == asr.name[:-8]
    assert changed.name != asr.name


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "answered for 0 of 2 files"),
        (['{"file": FIRST, "m": 1}'], "answered for 1 of 2 files"),
        (['{"file": SECOND, "m": 1}', '{"file": FIRST, "m": 1}'], "where '.*one.wav' was next"),
        (['{"m": 1}', '{"file": SECOND, "m": 1}'], "answered for None"),
        (['{"file": FIRST, "m": NaN}', '{"file": SECOND, "m": 1}'], "gave m as nan for .*one.wav"),
        (['{"file": FIRST, "m": 1}', '{"file": SECOND, "m": Infinity}'], "gave m as inf"),
        (['{"file": FIRST, "m": "0.5"}', '{"file": SECOND, "m": 1}'], "gave m as '0.5'"),
        (['{"file": FIRST, "m": true}', '{"file": SECOND, "m": 1}'], "gave m as True"),
        (['{"file": FIRST, "m": null}', '{"file": SECOND, "m": 1}'], "gave m as None"),
        (['{"file": FIRST, "m": 1}', '{"file": SECOND, "n": 1}'], "other models for .*: m"),
        (['{"file": FIRST}', '{"file": SECOND}'], "gave no number for .*one.wav"),
        (['{"file": FIRST, "m": 1', '{"file": SECOND, "m": 1}'], "not JSON: .*; its output: warming up"),
        (["{" * 100_000, '{"file": SECOND, "m": 1}'], "not JSON"),
    ],
)  # fmt: skip
def test_wrong_answers_are_errors(tmp_path: Path, clips: list[Path], lines: list[str], said: str) -> None:
    names = {"FIRST": json.dumps(str(clips[0])), "SECOND": json.dumps(str(clips[1]))}
    answers = tmp_path / "answers"
    answers.write_text("".join(line.replace("FIRST", names["FIRST"]).replace("SECOND", names["SECOND"]) + "\n"
                               for line in lines))  # fmt: skip
    script = tmp_path / "judge.sh"
    script.write_text(f"#!/bin/sh\necho warming up >&2\ncat '{answers}'\n")
    script.chmod(0o755)
    speaker = load_judges(speaker=str(script)).speaker
    assert speaker is not None
    with pytest.raises(WorkError, match=said):
        speaker.similarities(clips[:1], clips[:2])


def test_an_asr_without_text_and_a_command_that_fails_are_errors(judge: str, tmp_path: Path, clips: list[Path]) -> None:
    asr = load_judges(f"{judge} quality").asr
    assert asr is not None
    with pytest.raises(WorkError, match="gave None as the text of"):
        asr.transcribe(clips)
    failing = load_judges(f'{sys.executable} -c \'raise SystemExit("no " + "room" * 999)\'').asr
    assert failing is not None
    with pytest.raises(WorkError, match=r"failed with exit code 1; its output: .*roomroom") as caught:
        failing.transcribe(clips)
    assert len(str(caught.value)) < 2500
    program = tmp_path / "no-format"
    program.write_bytes(b"\x00\x01")
    program.chmod(0o755)
    with pytest.raises(ConfigError, match="cannot run: Exec format error"):
        ExternalSpeakerJudge([str(program)]).similarities(clips, clips)


def test_a_command_that_hangs_ends_with_its_children(
    tmp_path: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("higgstune.evaluation.judges.command._START", 1.0)
    monkeypatch.setattr("higgstune.evaluation.judges.command._EACH", 0.0)
    script = tmp_path / "judge.sh"
    script.write_text(f"sleep 600 &\necho $! > {tmp_path / 'child'}\nwait\n")
    asr = load_judges(f"sh {script}").asr
    assert asr is not None
    with pytest.raises(WorkError, match="did not answer within 1 s"):
        asr.transcribe(clips)
    child = int((tmp_path / "child").read_text())
    with suppress(psutil.NoSuchProcess):
        assert psutil.Process(child).status() == psutil.STATUS_ZOMBIE or not psutil.pid_exists(child)


def test_no_shell_reads_a_command(tmp_path: Path, clips: list[Path]) -> None:
    hurt = tmp_path / "hurt"
    asr = load_judges(f"{sys.executable} -c pass ; touch {hurt} | $(touch {hurt})").asr
    assert asr is not None
    with pytest.raises(WorkError, match="answered for 0"):
        asr.transcribe(clips)
    assert not hurt.exists()


def test_what_is_a_command_and_what_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert command_words(str(folder)) is None, "a folder with a space is a folder"
    assert command_words("large-v3") is None
    assert command_words("microsoft/wavlm-base-plus-sv") is None
    assert command_words(str(program)) == [str(program)]
    assert command_words(f"{program} --models 'a b'") == [str(program), "--models", "a b"]
    for spec, said in {
        " ": "empty",
        "judge 'open": "closing quotation",
        "/no/such judge": "is not a program here",
    }.items():
        with pytest.raises(ConfigError, match=said):
            command_words(spec)
    program.chmod(0o644)
    with pytest.raises(ConfigError, match="is not a program here"):
        command_words(str(program))


def test_no_spec_gives_no_judge_and_unknown_ones_are_errors(tmp_path: Path) -> None:
    assert load_judges() == load_judges(None, None, None)
    assert load_judges().asr is None
    with pytest.raises(ConfigError, match="no quality judge 'nisqa'"):
        load_judges(quality="nisqa")
    with pytest.raises(CheckpointError, match=r"speaker judge nothing does not exist"):
        load_judges(speaker="nothing")
    with pytest.raises(CheckpointError, match=r"neither a CTranslate2 folder \(with model.bin\) nor"):
        load_judges(asr=str(tmp_path))


# WavLM


def test_voices_are_compared_by_cosine(wavlm: Path, clips: list[Path]) -> None:
    judge: SpeakerJudge = WavLM(str(wavlm))
    assert judge.name.startswith("transformers 5.")
    assert ", tiny-sv " in judge.name
    (name, found), *others = judge.similarities(clips[:1], clips).items()
    assert (name, others) == ("tiny-sv", [])
    assert found[0] == pytest.approx(1.0, abs=1e-5)
    assert found[1] < 0.9999
    assert found[2] == 0.0, "in silence of no length there is no voice"
    with pytest.raises(ConfigError, match="no recording of the speaker"):
        judge.similarities(clips[2:], clips)


def test_similarity_is_to_the_mean_of_the_references(wavlm: Path, clips: list[Path]) -> None:
    judge = WavLM(str(wavlm))
    waves = speech(1, 0), speech(1, 1)[:4800]
    vectors = torch.stack([torch.from_numpy(judge.embed(wave)) for wave in waves])
    centre = torch.nn.functional.normalize(vectors.mean(0), dim=0)
    found = judge.similarities(clips[:2], clips[:2])["tiny-sv"]
    assert found == pytest.approx((vectors @ centre).tolist(), abs=1e-3), "16-bit files differ a little from the waves"


def test_a_short_clip_is_repeated_and_a_file_that_changed_is_embedded_anew(wavlm: Path, tmp_path: Path) -> None:
    judge = WavLM(str(wavlm))
    file = write(tmp_path / "a.wav", speech(0.25))
    long = write(tmp_path / "b.wav", np.tile(speech(0.25), 4))
    before = judge.similarities([long], [file, long])["tiny-sv"]
    assert before == pytest.approx([1.0, 1.0], abs=1e-4)
    write(file, speech(1.0, 5))
    assert judge.similarities([long], [file])["tiny-sv"][0] < 0.9999


def test_a_checkpoint_of_pickled_tensors_is_read_as_tensors_alone(
    wavlm: Path, tmp_path: Path, clips: list[Path]
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(wavlm, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    expected = WavLM(str(wavlm)).similarities(clips[:1], clips)["tiny-sv"]
    assert WavLM(str(folder)).similarities(clips[:1], clips)["pickled"] == pytest.approx(expected)
    torch.save({**weights, "evil": Evil(tmp_path / "hurt")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        WavLM(str(folder))
    assert not (tmp_path / "hurt").exists()


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_wavlm_without_a_head_or_another_model_is_refused(wavlm: Path, whisper: Path, tmp_path: Path) -> None:
    folder = tmp_path / "headless"
    shutil.copytree(wavlm, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if not name.startswith("feature_extractor.")},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"lacks \d+ weights of a WavLMForXVector, such as feature_extractor"):
        WavLM(str(folder))
    with pytest.raises(CheckpointError, match="model_type 'whisper'"):
        WavLM(str(whisper))
    (folder / "preprocessor_config.json").unlink()
    shutil.copy(wavlm / "model.safetensors", folder)
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        WavLM(str(folder))


# Whisper


def test_transformers_whisper_is_deterministic_and_takes_long_clips(whisper: Path, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{s}.wav", speech(s, seed)) for seed, s in enumerate((1.0, 5.0))]
    files.append(write(tmp_path / "empty.wav", speech(1)[:0]))
    asr: Transcriber = load_transcriber(str(whisper))
    assert isinstance(asr, TransformersWhisper)
    assert ", tiny-asr " in asr.name
    transcripts = asr.transcribe(files, language="en")
    assert transcripts == asr.transcribe(files, language="en-GB")
    assert transcripts[2] == ""
    assert all(transcripts[:2])
    assert asr.transcribe(files, seconds=0.7) != asr.transcribe(files)
    assert asr.transcribe(files[::-1], language="en") == transcripts[::-1], "each file by itself"
    with pytest.raises(ConfigError, match="does not support the language 'vi', it supports 2 other languages"):
        asr.transcribe(files, language="vi")


def test_an_english_only_whisper_refuses_german(tmp_path: Path, clips: list[Path]) -> None:
    asr = TransformersWhisper(str(save_tiny_asr(tmp_path / "asr.en", multilingual=False)))
    assert asr.transcribe(clips[:1]) == asr.transcribe(clips[:1], language="en")
    with pytest.raises(ConfigError, match="does not support the language 'de', it supports English only"):
        asr.transcribe(clips, language="de")


def test_a_whisper_without_tokenizer_languages_or_weights_is_refused(whisper: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        TransformersWhisper(str(save_tiny_whisper(tmp_path / "bare")))
    folder = tmp_path / "old"
    shutil.copytree(whisper, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps({key: value for key, value in settings.items() if key != "is_multilingual"})
    )
    with pytest.raises(CheckpointError, match="does not say which languages"):
        TransformersWhisper(str(folder))
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.encoder.conv1.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of a .*, such as model.encoder.conv1"):
        TransformersWhisper(str(folder))


def test_a_ctranslate2_folder_goes_to_faster_whisper(whisper: Path, tmp_path: Path) -> None:
    converters = pytest.importorskip("ctranslate2.converters", reason="needs the extra asr")
    pytest.importorskip("faster_whisper", reason="needs the extra asr")
    folder = tmp_path / "converted"
    converters.TransformersConverter(str(whisper), copy_files=["tokenizer.json", "preprocessor_config.json"]).convert(
        str(folder)
    )
    asr = load_transcriber(str(folder))
    assert isinstance(asr, FasterWhisper)
    assert asr.name.startswith("faster-whisper 1.")
    assert asr.name.endswith(" int8")
    assert ", converted " in asr.name
    (folder / "model.bin").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        FasterWhisper(str(folder))
    with pytest.raises(CheckpointError, match=r"cannot be loaded: Invalid model size 'hugest'"):
        FasterWhisper("hugest")


def test_faster_whisper_decodes_greedily_and_each_file_by_itself(
    tmp_path: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, dict[str, Any]]] = []
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.bin").write_bytes(b"weights")
    library = fake_faster_whisper(calls)
    monkeypatch.setitem(sys.modules, "faster_whisper", library)
    monkeypatch.setattr("higgstune.evaluation.judges.base.version", lambda name: "1.2.1")
    asr = load_transcriber(str(tmp_path / "base"))
    assert asr.name == "faster-whisper 1.2.1, base 9a129038 int8"
    long = write(tmp_path / "long.wav", speech(31))
    assert asr.transcribe([*clips, long], language="zh-CN") == ["so viel", "so viel", "", "so viel"]
    assert [length for length, _ in calls] == [16_000, 4800, 31 * 16_000]
    assert all(options["language"] == "zh" and options["temperature"] == 0 for _, options in calls)
    assert [options["without_timestamps"] for _, options in calls] == [True, True, False]
    assert asr.transcribe([long], seconds=2) == ["so viel"]
    assert calls[-1][0] == 32_000
    with pytest.raises(ConfigError, match="does not support the language 'tlh'"):
        asr.transcribe(clips, language="tlh")


def fake_faster_whisper(calls: list[tuple[int, dict[str, Any]]]) -> ModuleType:
    """The part of the library that is used; records the calls of its model."""

    class Segment:
        def __init__(self, text: str) -> None:
            self.text = text

    class WhisperModel:
        supported_languages = ("en", "zh")

        def __init__(self, folder: str, **options: Any) -> None:
            assert options == {"device": "cpu", "device_index": 0, "compute_type": "int8"}

        def transcribe(self, waveform: np.ndarray, **options: Any) -> tuple[list[Segment], None]:
            calls.append((len(waveform), options))
            return [Segment(" so "), Segment(" viel")], None

    library = ModuleType("faster_whisper")
    library.WhisperModel = WhisperModel  # type: ignore[attr-defined]
    return library


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(ConfigError, match=r"higgstune\[asr\]"):
        load_judges(asr="base")
    monkeypatch.setitem(sys.modules, "distillmos", None)
    with pytest.raises(ConfigError, match=r"higgstune\[naturalness\]"):
        load_judges(quality="distillmos")


# Quality


def test_distillmos_prefers_real_speech_to_noise(tmp_path: Path) -> None:
    torchaudio_compat.install()
    pytest.importorskip("distillmos", reason="needs the extra naturalness")
    files = sorted(SPEECH.glob("*.wav"))[:1]
    if not files:
        pytest.skip("needs real speech at ../shared/speech")
    noise = write(tmp_path / "noise.wav", 0.1 * np.random.default_rng(0).standard_normal(32_000).astype(np.float32))
    empty = write(tmp_path / "empty.wav", speech(1)[:0])
    judge = DistillMos()
    assert judge.name.startswith("distillmos 0.")
    ((name, found),) = judge.rate([*files, noise, empty]).items()
    assert name == "distillmos"
    assert found[0] > 3.5 > 3 > found[1]
    assert found[2] == 1.0


def test_distillmos_takes_at_most_a_minute_and_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths: list[int] = []

    class ConvTransformerSQAModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sys.stdout.write("weights loaded from ...")

        def forward(self, waveform: torch.Tensor) -> torch.Tensor:
            lengths.append(waveform.shape[1])
            return torch.full((1, 1), 3.25)

    weights = tmp_path / "v7.pt"
    weights.write_bytes(b"weights")
    library = ModuleType("distillmos.sqa")
    library.ConvTransformerSQAModel = ConvTransformerSQAModel  # type: ignore[attr-defined]
    library.DEFAULT_WEIGHTS_CHKPT = str(weights)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "distillmos", ModuleType("distillmos"))
    monkeypatch.setitem(sys.modules, "distillmos.sqa", library)
    monkeypatch.setattr("higgstune.evaluation.judges.base.version", lambda name: "0.9.1")
    judge = DistillMos()
    assert judge.name == "distillmos 0.9.1, v7 9a129038"
    files = [write(tmp_path / "long.wav", speech(61)), write(tmp_path / "short.wav", speech(0.05))]
    assert judge.rate(files) == {"distillmos": [3.25, 1.0]}
    assert lengths == [60 * 16_000]
    assert capsys.readouterr().out == ""


# The hub's cache


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache of a machine without a network; `cached` puts folders into it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(cache: Path, name: str, folder: Path) -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return Path(shutil.copytree(folder, repository / "snapshots" / ("0" * 40)))


def test_models_come_from_the_hubs_cache(hub_cache: Path, wavlm: Path, whisper: Path, clips: list[Path]) -> None:
    cached(hub_cache, "owner/voices", wavlm)
    cached(hub_cache, "owner/asr", whisper)
    judges = load_judges("owner/asr", "owner/voices")
    assert isinstance(judges.asr, TransformersWhisper)
    assert ", asr " in judges.asr.name
    assert judges.speaker is not None
    assert judges.speaker.similarities(clips[:1], clips[:1]) == {"voices": [pytest.approx(1.0)]}
    with pytest.raises(CheckpointError, match="owner/nothing is neither a local folder nor in the hub's cache"):
        load_judges(speaker="owner/nothing")


def test_a_hub_id_may_be_pickled_or_of_ctranslate2(
    hub_cache: Path, wavlm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cached(hub_cache, "owner/voices", wavlm)
    torch.save(load_file(snapshot / "model.safetensors"), snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    assert WavLM("owner/voices").model == "voices"
    (snapshot / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="the weights are missing"):
        WavLM("owner/voices")
    (snapshot / "config.json").write_text('{"suppress_ids": []}')
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(ConfigError, match="owner/voices needs faster-whisper"):
        load_transcriber("owner/voices")


# What they share


def test_samples_that_are_not_finite_are_errors(wavlm: Path, tmp_path: Path) -> None:
    wave = speech(1)
    wave[100] = np.nan
    file = write(tmp_path / "nan.wav", wave, subtype="FLOAT")
    with pytest.raises(DataError, match=r"nan\.wav has samples that are not finite"):
        WavLM(str(wavlm)).similarities([file], [file])


def test_names_and_languages(tmp_path: Path) -> None:
    cached = tmp_path / "models--microsoft--wavlm-base-plus-sv" / "snapshots" / ("0" * 40)
    cached.mkdir(parents=True)
    assert short_name(cached) == "wavlm-base-plus-sv"
    assert short_name("microsoft/wavlm-base-plus-sv") == "wavlm-base-plus-sv"
    assert check_language(None, ["en"], "x") is None
    assert check_language("pt_BR", ["en", "pt"], "x") == "pt"


def test_wavlm_is_the_default_if_it_is_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_wavlm(tmp_path / "wavlm")
    monkeypatch.setattr(judges, "DEFAULT_SPEAKER", "nobody/never-fetched")
    assert load_judges(speaker="auto").speaker is None
    monkeypatch.setattr(judges, "DEFAULT_SPEAKER", str(folder))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: str(Path(name) / file))
    found = load_judges(speaker="auto").speaker
    assert found is not None
    assert "wavlm" in found.name.lower()
