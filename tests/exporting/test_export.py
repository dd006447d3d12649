"""Exporting: each format is loaded the way the other software loads it, and gives the same logits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import yaml
from commands import Command
from export_world import (
    adapted_logits,
    flip_byte,
    gap,
    logits,
    make_adapter,
    nothing_is_left,
    save_base,
    tree,
    whisper_spec_of,
)
from foreign_adapters import renamed, save_foreign
from golden_values import Golden
from on_cpu import CPU
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import HiggsAudioV2ForConditionalGeneration

from higgstune import export
from higgstune.errors import CheckpointError, ConfigError, VerificationError
from higgstune.exporting.source import faults_of
from higgstune.families import read_layout
from higgstune.families.base import Conditioning
from higgstune.families.higgs_v2.original import native_config, original_config, original_state, read_original
from higgstune.model.adapters import load_adapter
from higgstune.model.load import load_model

TOKENS = {"<|AUDIO|>": 315, "<|audio_eos|>": 312}  # of the golden weights' vocabulary
GOLDEN = ("base", "audio_attention", "whisper", "whisper_audio_attention")


@pytest.mark.parametrize("name", GOLDEN)
def test_the_way_to_the_original_layout_is_the_way_back(name: str, tmp_path: Path) -> None:
    golden = Golden(name)
    layout = read_layout(golden.save_original_checkpoint(tmp_path))
    original = read_original(layout)
    state = original_state(original.state)
    if original.whisper is not None:
        state |= {f"audio_tower.{key}": value for key, value in original.whisper.state().items()}
    assert state.keys() == golden.weights.keys()
    assert all(torch.equal(state[key], value) for key, value in golden.weights.items())
    config = original_config(
        native_config(layout.config),
        tokens=TOKENS,
        conditioning=original.conditioning,
        encoder=original.whisper.config if original.whisper is not None else None,
    )
    for part in ("text_config", "audio_encoder_config"):
        found, expected = config.pop(part, {}), golden.config[part]
        assert found == {key: expected.get(key) for key in found}
    assert config.pop("architectures") == ["HiggsAudioModel"]
    assert config == {key: golden.config[key] for key in config}


def test_an_original_config_keeps_what_only_it_says() -> None:
    golden = Golden("base")
    written = golden.config | {"audio_embed_avg": True, "of_its_own": 7}
    config = original_config(native_config(written), tokens=TOKENS, written=written)
    assert config | {"architectures": None} == written | {"text_config": config["text_config"], "architectures": None}
    assert config["text_config"]["pretraining_tp"] == 1
    delayed = native_config(golden.config)
    delayed.audio_delay_token_id += 1
    with pytest.raises(CheckpointError, match="delay token"):
        original_config(delayed, tokens=TOKENS)


def test_boson_has_the_names_and_shapes_of_the_reference(world: Path, tmp_path: Path) -> None:
    result = export(world / "plain" / "adapter", tmp_path / "out", format="boson", base=CPU)
    golden, written = Golden("base"), load_file(result.folder / "model.safetensors")
    assert written.keys() == golden.weights.keys()
    for key, value in golden.weights.items():  # which have 32 codes in a codebook, the real ones 1024
        expected = tuple(8 * 1026 if size == 8 * 34 else size for size in value.shape)
        assert tuple(written[key].shape) == expected, key
    config = json.loads((result.folder / "config.json").read_text())
    assert config["model_type"] == "higgs_audio"
    assert config.keys() - {"torch_dtype"} <= golden.config.keys()
    assert config["text_config"].keys() <= golden.config["text_config"].keys() | {"rope_parameters"}
    model = load_model(result.folder, device="cpu", dtype="float32")
    assert gap(logits(model, world), adapted_logits(world, world / "plain" / "adapter")) < 5e-5
    text = (result.folder / "README.md").read_text()
    assert "HiggsAudioServeEngine" in text
    assert (result.folder / "LICENSE").exists()


@pytest.mark.parametrize("name", GOLDEN[1:])
def test_boson_has_the_names_of_the_references_extensions(world: Path, tmp_path: Path, name: str) -> None:
    has = Conditioning(
        audio_attention="audio_attention" in name, whisper=whisper_spec_of(world) if "whisper" in name else None
    )
    adapter = make_adapter(world, tmp_path / "adapter", conditioning=has)
    result = export(adapter, tmp_path / "out", format="boson", base=CPU)
    golden = Golden(name)
    assert load_file(result.folder / "model.safetensors").keys() == golden.weights.keys()
    config = json.loads((result.folder / "config.json").read_text())
    for key in ("use_audio_out_self_attention", "encode_whisper_embed", "skip_audio_tower"):
        assert config[key] == golden.config[key], key
    assert gap(logits(load_model(result.folder, device="cpu"), world), adapted_logits(world, adapter)) < 5e-5


def test_native_is_what_transformers_loads(world: Path, tmp_path: Path) -> None:
    result = export(world / "plain" / "adapter", tmp_path / "out", format="native", base_bits=8, base=CPU)
    plain = HiggsAudioV2ForConditionalGeneration.from_pretrained(result.folder, use_text_head=True)
    assert gap(logits(plain, world), adapted_logits(world, world / "plain" / "adapter")) < 5e-5
    base = load_file(world / "base" / "model.safetensors")
    written = load_file(result.folder / "model.safetensors")
    assert {key: value.shape for key, value in written.items()} == {key: value.shape for key, value in base.items()}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_is_what_plain_peft_loads(world: Path, tmp_path: Path) -> None:
    before = tree(world / "plain" / "adapter")
    result = export(world / "plain" / "adapter", tmp_path / "out", format="peft", base=CPU)
    names = {path.name for path in result.folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "higgstune.json", "README.md", "LICENSE"}
    base = HiggsAudioV2ForConditionalGeneration.from_pretrained(world / "base", use_text_head=True)
    plain = PeftModel.from_pretrained(base, result.folder)
    assert gap(logits(plain, world), adapted_logits(world, world / "plain" / "adapter")) < 1e-6
    matter = yaml.safe_load((result.folder / "README.md").read_text().split("---\n")[1])
    assert matter["library_name"] == "peft"
    assert matter["base_model_relation"] == "adapter"
    assert tree(world / "plain" / "adapter") == before
    # It is an adapter folder of ours, too, which detects a damaged file.
    moved = shutil.move(result.folder, tmp_path / "moved")
    load_adapter(load_model(world / "base", device="cpu"), moved)
    flip_byte(moved / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="checksum"):
        load_adapter(load_model(world / "base", device="cpu"), moved)


def test_an_adapter_that_does_nothing_is_not_passed_on(world: Path, tmp_path: Path) -> None:
    nothing = make_adapter(world, tmp_path / "adapter", strength=0)
    with pytest.raises(CheckpointError, match="changes nothing, as all of its LoRA is zero"):
        export(nothing, tmp_path / "out", format="peft", base=CPU)
    hardly = make_adapter(world, tmp_path / "hardly", strength=1e-9)
    with pytest.raises(VerificationError, match="hardly changes the base"):
        export(hardly, tmp_path / "out", format="peft", base=CPU)
    assert nothing_is_left(tmp_path / "out")


@pytest.mark.parametrize("format", ["native", "peft"])
def test_modules_that_would_be_lost_are_named(world: Path, tmp_path: Path, format: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.layers\.\*\.audio_attn.*model\.audio_encoder_proj"):
        export(world / "both" / "adapter", tmp_path / "out", format=format, base=CPU)
    assert nothing_is_left(tmp_path / "out")


def test_they_can_be_dropped_for_native(world: Path, tmp_path: Path) -> None:
    result = export(world / "both" / "adapter", tmp_path / "out", drop_modules=True, base=CPU)
    assert result.format == "native"
    assert "model.layers.*.audio_attn" in result.dropped
    HiggsAudioV2ForConditionalGeneration.from_pretrained(result.folder, use_text_head=True)


def snippet(folder: Path) -> str:
    """The last Python in a card, which loads the folder without Higgstune."""
    return (folder / "README.md").read_text().split("```python\n")[-1].split("```")[0]


@pytest.mark.parametrize("format", ["native", "boson", "peft"])
def test_the_cards_python_makes_sound(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """With fewer frames than its text would take: these weights are random, and do not stop by themselves."""
    folder = export(world / "plain" / "adapter", tmp_path / "out", format=format, base=CPU).folder
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("higgstune.generate.speaker.frame_cap", lambda *_: 10)
    exec(code.replace("THIS_FOLDER", str(folder)), {})
    waveform, rate = soundfile.read(tmp_path / "morning.wav")
    assert rate == 24_000
    assert abs(waveform).max() > 0


@pytest.mark.parametrize("format", ["native", "peft"])
def test_a_run_that_is_not_usable_says_so(world: Path, tmp_path: Path, format: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(world / "plain" / "adapter", run / "voice" / "adapter")
    state = {"status": "not usable", "adapter": "voice/adapter", "stages": {"voice": {"verdict": {"reasons": ["x_y"]}}}}
    (run / "run.json").write_text(json.dumps(state))
    result = export(run, tmp_path / "out", format=format, data=world / "data", base=CPU)
    assert result.faults == ("x_y",)
    assert "**The run that trained it ended as not usable**: " in (result.folder / "README.md").read_text()
    (run / "run.json").write_text(json.dumps(state | {"status": "finished"}))
    assert faults_of(run / "voice" / "adapter") == ()


@pytest.mark.parametrize("format", ["native", "peft"])
@pytest.mark.parametrize("bits", [4, 8, None])
def test_the_cards_snippet_is_python_that_says_the_bits(
    world: Path, tmp_path: Path, format: str, bits: int | None
) -> None:
    folder = export(world / "plain" / "adapter", tmp_path / "out", format=format, base_bits=bits, base=CPU).folder
    code = snippet(folder)
    called: dict[str, dict[str, Any]] = {}
    run_with_stand_ins(code, called)
    assert called["HiggsAudioV2ForConditionalGeneration"]["use_text_head"] is True
    assert ("PeftModel" in called) == (format == "peft")
    if bits is None:
        assert "BitsAndBytesConfig" not in code
        assert called["HiggsAudioV2ForConditionalGeneration"]["dtype"] is torch.float32
    else:
        assert called["BitsAndBytesConfig"][f"load_in_{bits}bit"] is True
        assert called["BitsAndBytesConfig"]["llm_int8_skip_modules"] == ["audio_lm_head", "text_lm_head"]
        assert f"to {bits} bits as it loads them" in (folder / "README.md").read_text()


def run_with_stand_ins(code: str, called: dict[str, dict[str, Any]]) -> None:
    """Run a snippet with classes that only note how they were called."""

    def stand_in(name: str) -> Any:
        class StandIn:
            def __init__(self, **options: Any) -> None:
                called[name] = options

            @classmethod
            def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
                called[name] = options
                return cls

        return StandIn

    lines = [line for line in code.splitlines() if not line.startswith(("from", "import"))]
    names = ("HiggsAudioV2ForConditionalGeneration", "PeftModel", "BitsAndBytesConfig")
    # `import torch` is the snippet's own: without it, what needs torch fails here.
    scope: dict[str, Any] = {name: stand_in(name) for name in names if name in code}
    exec("\n".join([*(["import torch"] if "import torch" in code else []), *lines]), scope)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gguf"}, "native, extended, boson, peft"),
        ({"format": "boson", "base_bits": 4}, "--base-bits has no effect"),
        ({"format": "native", "base_bits": 5}, "4, 8"),
        ({"format": "peft", "dtype": "bfloat16"}, "--dtype has no effect"),
        ({"format": "peft", "drop_modules": True}, "--drop-modules has no effect"),
        ({"format": "boson", "drop_modules": True}, "--drop-modules has no effect"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    world: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(world / "plain" / "adapter", tmp_path / "out", base=CPU, **options)
    assert nothing_is_left(tmp_path / "out")


def test_the_command(world: Path, tmp_path: Path, command: Command) -> None:
    code, out, _ = command("export", "--help")
    assert code == 0
    assert "Example: higgstune export" in out
    arguments = ("export", world / "plain" / "adapter", "--out", tmp_path / "out", "--device", "cpu")
    code, out, err = command(*arguments, "--format", "peft", "--json")
    assert code == 0, err
    assert json.loads(out)["format"] == "peft"
    for wrong in (("--format", "peft"), ("--format", "onnx"), ()):
        code, _, err = command(*arguments, *wrong)
        assert code == 2
        assert "Traceback" not in err


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_modules_that_others_trained_in_full_are_merged(world: Path, tmp_path: Path, stored: str) -> None:
    base = save_base(tmp_path / "base")
    if stored == "bfloat16":
        path = base / "model.safetensors"
        save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    in_full = ["audio_lm_head", "text_lm_head", "embed_tokens", "embed_audio_tokens.embed_audio_tokens"]
    adapter = save_foreign(base, tmp_path / "adapter", targets=["q_proj"], in_full=in_full)
    found = export(adapter, tmp_path / "out", data=world / "data", base=CPU)
    assert found.check.from_base > 0.1
    written, trained = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    for name in in_full:
        [key] = [key for key in written if key.endswith(f"{name}.weight")]
        expected = trained[f"base_model.model.{key}"]
        assert torch.equal(written[key], expected.to(written[key].dtype))


def test_peft_gets_the_names_of_the_base(world: Path, tmp_path: Path) -> None:
    plain = save_foreign(world / "base", tmp_path / "plain")
    theirs = renamed(plain, tmp_path / "theirs", lambda key: f"module.{key.replace('model.model.', 'model.')}")
    for adapter in (plain, theirs):
        export(adapter, tmp_path / f"{adapter.name}-peft", format="peft", data=world / "data", base=CPU)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "plain-peft" / name).read_bytes() == (plain / name).read_bytes()
    written = load_file(tmp_path / "theirs-peft" / "adapter_model.safetensors")
    assert written.keys() == load_file(plain / "adapter_model.safetensors").keys()
