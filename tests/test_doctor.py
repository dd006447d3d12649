"""The doctor: a healthy setup passes, and each planted fault is found by its own check and by no other."""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_codec import FakeCodec
from golden_values import Golden
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_cli import Command, command  # noqa: F401
from test_run import DEMO_CODEC
from tiny_checkpoint import random_codes, save_tiny_checkpoint, tiny_config, tiny_model, tiny_prompter, tiny_tokenizer
from tiny_codec import tiny_codec
from transformers import DynamicCache

import higgstune
from higgstune import hub
from higgstune.codec import MelCodec
from higgstune.codec.higgs import HiggsCodec
from higgstune.data.manifest import Utterance, read_manifest, write_manifest
from higgstune.data.store import CodeStore, Row
from higgstune.diagnosis import check_applied, doctor, examine, memory
from higgstune.diagnosis.adapter import check_card, check_effect, check_files, check_plain_peft, check_trained_on
from higgstune.diagnosis.checkpoint import check_config, check_rotary
from higgstune.diagnosis.codec import check_codes, check_fit, check_modes
from higgstune.diagnosis.data import find_features
from higgstune.diagnosis.environment import check_disk, check_versions
from higgstune.diagnosis.generation import check_generation, collate
from higgstune.diagnosis.loss import DataLoss, judge_loss, never_trained
from higgstune.diagnosis.prompt import as_trained, built_in_row, check_chat_template, check_same_prompt, check_tokens
from higgstune.diagnosis.report import Report
from higgstune.errors import ConfigError, DataError
from higgstune.model.adapters import (
    AttentionTraining,
    Lora,
    add_lora,
    base_fingerprint,
    base_shape,
    load_adapter,
)
from higgstune.model.conditioning import Conditioning, WhisperShape, add_conditioning
from higgstune.model.load import load_model
from higgstune.prompt.example import Example, Heard, Prompter
from higgstune.prompt.rows import Rendering

ASSETS = Path(higgstune.__file__).parent / "demo" / "assets"
CHANCE = math.log(1026)


def failed(report: Report) -> set[str]:
    """The checks that failed."""
    return {finding.check for finding in report.findings if finding.status == "failed"}


def told(report: Report, check: str, status: str = "failed") -> str:
    """What a check said."""
    return " | ".join(f"{f.message} -> {f.advice}" for f in report.of(check, status))  # type: ignore[arg-type]


def save_adapter(base: Path, folder: Path, *, attention: AttentionTraining | None = None) -> Path:
    """An adapter that moves every layer, as training writes one; with `attention`, on audio attention, too."""
    model = load_model(base, dtype="float32", device="cpu")
    fingerprint = base_fingerprint(model)
    conditioning = Conditioning(audio_attention=attention is not None)
    add_conditioning(model, conditioning)
    torch.manual_seed(0)
    peft_model = add_lora(model, Lora(r=4, alpha=8), "full", attention=attention or "lora")
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if "lora_B" in name or ".modules_to_save." in name:
                weight.add_(0.02 * torch.randn_like(weight))
    peft_model.peft_config["default"].base_model_name_or_path = str(base)
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    card = {
        "checkpoint": str(base), "revision": None, "codec": str(base / "codec"), "stage": "voice",
        "codec_revision": MelCodec.from_pretrained(base / "codec").revision, "base_shape": base_shape(model.config),
        "base_fingerprint": fingerprint, "conditioning": conditioning.model_dump(),
        "recipe": {"lora": {"r": 4, "alpha": 8.0, "rslora": False, "dora": False}, "stages": [
            {"name": "voice", "text_weight": 1.0, "audio_weight": 1.0}]},
    }  # fmt: skip
    write_card(folder, card)
    return folder


def write_card(folder: Path, card: dict[str, Any]) -> None:
    checksum = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    (folder / "higgstune.json").write_text(json.dumps(card | {"weights_sha256": checksum}))


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Change an adapter's tensors, and the checksum with them: what was trained was wrong already."""
    path = folder / "adapter_model.safetensors"
    save_file({key: change(key, value).contiguous() for key, value in load_file(path).items()}, path)
    write_card(folder, json.loads((folder / "higgstune.json").read_text()))


class Other:
    """The demo's codec, whose codes go through a function, under its own revision or another one."""

    def __init__(
        self, inner: MelCodec, change: Callable[[np.ndarray], np.ndarray], revision: str | None = None
    ) -> None:
        self.inner, self.change = inner, change
        self.sample_rate, self.frame_rate = inner.sample_rate, inner.frame_rate
        self.num_codebooks, self.codebook_size = inner.num_codebooks, inner.codebook_size
        self.revision = revision or inner.revision

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        return self.change(self.inner.encode(waveform)).astype(np.uint16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return self.inner.decode(codes)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base with its codec, a small store of a voice that it does not know, and an adapter."""
    folder = tmp_path_factory.mktemp("doctor")
    shutil.copytree(ASSETS / "base", folder / "base")
    shutil.copytree(ASSETS / "codec", folder / "base" / "codec")
    shutil.copytree(ASSETS / "voices", folder / "voices")
    prepare(folder, folder / "data", folder / "base" / "codec")
    save_adapter(folder / "base", folder / "adapter")
    return folder


def prepare(world: Path, out: Path, codec: Any) -> Path:
    rows = [row for _, row in read_manifest(world / "voices" / "metadata.jsonl") if isinstance(row, Utterance)]
    manifest = world / "voices" / "some.jsonl"
    mine = [row for row in rows if row.speaker == "rms"]
    write_manifest(manifest, sorted(mine, key=lambda row: (world / "voices" / str(row.audio)).stat().st_size)[:6])
    higgstune.prepare(
        manifest, out, codec=codec, codec_name="a codec", model=str(world / "base"), validation_fraction=0.2,
        references="same_speaker",
    )  # fmt: skip
    return out


@pytest.fixture
def base(world: Path, tmp_path: Path) -> Path:
    """A copy of the base to plant faults in."""
    return shutil.copytree(world / "base", tmp_path / "base")


@pytest.fixture
def adapter(world: Path, tmp_path: Path) -> Path:
    """A copy of the adapter to plant faults in."""
    return shutil.copytree(world / "adapter", tmp_path / "adapter")


def examined(world: Path, **changes: Any) -> Report:
    return doctor(**({"model": world / "base", "adapter": world / "adapter", "data": world / "data"} | changes))


def test_a_healthy_setup_has_no_failed_finding(world: Path) -> None:
    shown: list[str] = []
    report = doctor(adapter=world / "adapter", data=world / "data", progress=shown.append)
    assert report.passed, failed(report)
    assert not report.summary["skipped"]
    assert {f.check for f in report.findings} == {*examine_checks()}
    assert "base with adapter" in told(report, "generation", "ok")
    assert "a base that knows nothing of such speech" in told(report, "loss", "warning")
    assert "all 50 modules of the adapter are at work" in told(report, "adapter", "ok")
    assert "(0 of them audio)" not in told(report, "prompt", "ok")
    assert "checkpoint, model" in shown


def examine_checks() -> list[str]:
    return [
        "environment", "checkpoint", "rotary", "codec", "data", "prompt", "loss", "adapter", "generation", "memory",
    ]  # fmt: skip


def test_without_anything_the_machine_is_examined() -> None:
    assert {finding.check for finding in doctor().findings} == {"environment"}


# The checkpoint


def cut_off(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def change_weights(base: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def change_config(base: Path, **changes: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))


def flip_recorded_byte(base: Path) -> None:
    higgstune_json = {"files": {"model.safetensors": hashlib.sha256(b"as it was written").hexdigest()}}
    (base / "higgstune.json").write_text(json.dumps(higgstune_json))


NAME = "model.layers.1.audio_mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (cut_off, "truncated"),
        (lambda base: change_weights(base, lambda w: w.pop(NAME)), f"1 of 75 tensors are missing: {NAME}"),
        (lambda base: change_weights(base, lambda w: w.pop("text_lm_head.weight")), "without its text head"),
        (lambda base: change_weights(base, lambda w: w.update({NAME: w[NAME][:5].clone()})), "shape"),
        (lambda base: change_weights(base, lambda w: w[NAME].fill_(torch.nan)), f"NaN or infinity: {NAME}"),
        (lambda base: change_weights(base, lambda w: w["audio_lm_head.weight"].zero_()), "zero throughout: audio_lm"),
        (flip_recorded_byte, "is not the file that was written"),
        (lambda base: change_config(base, audio_delay_token_id=512), "outside the vocabulary"),
        (lambda base: change_config(base, audio_stream_eos_id=1020), "stream ids"),
        (lambda base: change_config(base, model_type="llama"), "'llama'"),
        (lambda base: change_config(base, hidden_size="x"), "does not describe a model"),
        (lambda base: change_config(base, rope_parameters={"rope_type": "nope", "rope_theta": 1.0}), "'nope'"),
        (lambda base: (base / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ],
)
def test_a_broken_checkpoint_is_found(world: Path, base: Path, fault: Any, says: str) -> None:
    fault(base)
    report = examined(world, model=base)
    assert failed(report) == {"checkpoint"}
    assert says in told(report, "checkpoint")
    assert report.of("data", "ok")  # what does not need the checkpoint is still examined
    assert report.of("codec", "ok")


def test_what_does_not_need_the_weights_is_still_examined(world: Path, base: Path) -> None:
    cut_off(base)
    report = examined(world, model=base)
    for check in ("codec", "data", "prompt", "memory"):
        assert report.of(check, "ok"), check
    assert report.of("adapter", "ok")  # its files
    for check in ("rotary", "loss", "generation"):
        assert report.of(check, "skipped"), check


def test_an_extra_tensor_and_copied_pathways_are_warned_of(world: Path, base: Path) -> None:
    def copy(weights: dict[str, torch.Tensor]) -> None:
        for layer in range(5):
            name = f"model.layers.{layer}.{{}}.down_proj.weight"
            weights[name.format("audio_mlp")] = weights[name.format("mlp")].clone()
        weights["model.something.weight"] = torch.ones(2)

    change_weights(base, copy)
    report = doctor(model=base)
    assert report.passed
    assert "layers.0.audio_mlp is mlp" in told(report, "checkpoint", "warning")
    assert "model.something.weight" in told(report, "checkpoint", "warning")


def test_an_original_checkpoint_is_examined(tmp_path: Path) -> None:
    golden = Golden("base")
    folder = golden.save_original_checkpoint(tmp_path / "original")
    report = doctor(model=folder, codec=DEMO_CODEC)
    assert failed(report) == {"checkpoint", "codec"}  # it has no tokenizer, and smaller codebooks than the demo's codec
    assert "original layout" in told(report, "checkpoint", "ok")
    assert report.of("rotary", "ok")
    golden.weights["rotary_emb.inv_freq"] = torch.ones(8)
    golden.save_original_checkpoint(folder)
    assert "rope_parameters" in told(doctor(model=folder, codec=DEMO_CODEC), "rotary")


def test_a_checkpoint_that_is_not_there_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor(model="/no/where")
    assert failed(report) == {"checkpoint"}
    assert "/no/where does not exist" in told(report, "checkpoint")

    def unreachable(name: str, **options: Any) -> None:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    report = doctor(model="owner/name")
    assert failed(report) == {"checkpoint"}
    assert len([f for f in report.findings if f.status == "failed"]) == 1
    assert "hf download owner/name" in told(report, "checkpoint")


def test_a_folder_that_is_no_checkpoint_is_one_finding(tmp_path: Path) -> None:
    report = doctor(model=tmp_path)
    assert [f.check for f in report.findings if f.status == "failed"] == ["checkpoint"]
    assert "config.json is missing" in told(report, "checkpoint")


def test_default_frequencies_are_warned_of(base: Path) -> None:
    change_config(base, rope_parameters=None)
    assert "no rope_parameters" in told(doctor(model=base), "rotary", "warning")


def test_special_ids_that_are_the_same_are_found() -> None:
    config = tiny_config(tiny_tokenizer())
    assert check_config(config)[0].status == "ok"
    config.audio_delay_token_id = config.audio_token_id
    assert "are the same" in check_config(config)[0].message


# Rotary buffers


def stretch(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.98)


def cast(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.to(torch.bfloat16)


def forget(model: Any) -> None:
    model.model.rotary_emb.original_inv_freq.fill_(torch.nan)


@pytest.mark.parametrize(
    ("fault", "says"), [(stretch, "by up to 2 %"), (cast, "bfloat16"), (forget, "original_inv_freq holds NaN")]
)
def test_wrong_rotary_buffers_are_found(
    world: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], None], says: str
) -> None:
    def load(*arguments: Any, **options: Any) -> Any:
        model = load_model(*arguments, **options)
        fault(model)
        return model

    monkeypatch.setattr(examine, "load_model", load)
    report = examined(world)
    assert failed(report) == {"rotary"}
    assert says in told(report, "rotary")
    assert "rotary" in told(report, "loss", "skipped")


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rotary_buffers_of_every_kind_are_computed_anew(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 8.0}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = tiny_model(tiny_config(tiny_tokenizer(), rope_parameters=rope))
    assert check_rotary(model)[0].status == "ok"
    stretch(model)
    assert check_rotary(model)[0].status == "failed"


# The codec


def test_a_codec_in_train_mode_is_found(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **options: Any) -> HiggsCodec:
        codec = HiggsCodec(tiny_codec(), "tiny")
        codec._model.train()
        return codec

    monkeypatch.setattr(examine, "load_codec", load)
    report = doctor(model=world / "base")
    assert failed(report) == {"codec"}
    assert "in train mode" in told(report, "codec")
    assert "gives other codes" in told(report, "codec")


def test_the_real_codec_class_passes() -> None:
    codec = HiggsCodec(tiny_codec(), "tiny")
    before = torch.random.get_rng_state()
    assert [f.status for f in check_modes(codec) + check_codes(codec)] == ["ok", "ok"]
    assert torch.equal(torch.random.get_rng_state(), before)


class Faulty(FakeCodec):
    """A codec with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__(codebook_size=512 if fault == "range" else 1024)
        self.fault = fault
        self.frame_rate = 50.0 if fault == "rate" else 25.0

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        codes = super().encode(waveform)
        if self.fault == "random":
            codes = codes + torch.randint(0, 2, codes.shape).numpy().astype(np.uint16)
        return codes + np.uint16(600) if self.fault == "range" else codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return super().decode(codes)[: -960 if self.fault == "length" else None]


@pytest.mark.parametrize(
    ("fault", "says"),
    [("random", "other codes"), ("rate", "50 frames"), ("range", "outside of 0 to 511"), ("length", "came back as")],
)
def test_a_faulty_codec_is_found(fault: str, says: str) -> None:
    assert check_codes(FakeCodec())[0].status == "ok"
    assert says in check_codes(Faulty(fault))[0].message


def test_a_codec_inside_the_model_and_one_of_another_kind_are_found() -> None:
    codec, (model, _) = HiggsCodec(tiny_codec(), "tiny"), tiny_prompter()
    assert check_modes(codec, model)[0].status == "ok"
    model.add_module("codec", codec._model)
    assert "module tree" in check_modes(codec, model)[0].message
    assert check_fit(codec, model.config)[0].status == "ok"
    assert "8 of 64" in check_fit(codec, tiny_prompter(codes=64)[0].config)[0].message


# Data and loss


def test_a_store_of_another_codec_is_found(world: Path, tmp_path: Path) -> None:
    codec = Other(MelCodec.from_pretrained(DEMO_CODEC), lambda codes: codes[::-1], revision="another")
    report = examined(world, data=prepare(world, tmp_path / "other", codec))
    assert failed(report) == {"codec"}
    assert "revision another" in told(report, "codec")
    assert "another codec" in told(report, "loss", "skipped")


def permuted(codes: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).permutation(1024)[codes]


def delayed(codes: np.ndarray) -> np.ndarray:
    return np.stack([np.roll(codes[:, k], k) for k in range(8)], axis=1)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda codes: np.roll(codes, 1, axis=1), "not those that the model speaks in"),
        (permuted, "not those that the model speaks in"),
        (delayed, "carry a delay already"),
        (lambda codes: codes[:, [0, 1, 2, 3, 4, 5, 7, 6]], "do not belong|not those that the model"),
    ],
    ids=["rolled", "permuted", "delayed", "swapped"],
)
def test_codes_that_do_not_fit_the_model_are_found(world: Path, tmp_path: Path, fault: Any, says: str) -> None:
    codec = Other(MelCodec.from_pretrained(DEMO_CODEC), fault)  # under the right name and revision
    report = examined(world, data=prepare(world, tmp_path / "shuffled", codec))
    assert failed(report) == {"loss"}
    assert any(part in told(report, "loss") for part in says.split("|"))


def losses(real: float, rolled: float = 12.0, undelayed: float = 8.0, swapped: float = 7.0) -> DataLoss:
    return DataLoss(*((value,) * 8 for value in (real, rolled, undelayed, swapped)))


@pytest.mark.parametrize(
    ("loss", "status", "says"),
    [
        (losses(4.0), "ok", "4.00 nats"),
        (losses(6.5), "warning", "a new language"),
        (losses(0.3), "failed", "unseen audio cannot"),
        (losses(9.0, rolled=9.5), "failed", "another codec"),
        (losses(8.7, rolled=11.7, undelayed=9.0, swapped=9.0), "warning", "high"),
        (losses(6.0, rolled=6.0), "warning", "random weights"),
        (losses(5.0, undelayed=4.0), "failed", "carry a delay"),
        (losses(4.0, swapped=3.9), "warning", "words make no difference"),
        (losses(math.nan), "failed", "nan"),
        (dataclasses.replace(losses(4.0), real=(4.0,) * 7 + (13.0,)), "failed", "codebooks 7 "),
    ],
)
def test_losses_are_judged(loss: DataLoss, status: str, says: str) -> None:
    finding = judge_loss(loss, CHANCE, untrained=False, rows=16)[-1]
    assert finding.status == status
    assert says in f"{finding.message} {finding.advice}"


def test_high_losses_of_weights_that_were_never_trained_are_no_failure() -> None:
    assert judge_loss(losses(9.0), CHANCE, untrained=True, rows=16)[0].status == "warning"


def test_random_weights_are_named_and_are_no_failure(world: Path, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "random")
    shutil.copytree(DEMO_CODEC, folder / "codec")
    report = doctor(model=folder, data=world / "data")
    assert report.passed, failed(report)
    assert "random weights" in told(report, "loss", "warning")
    assert never_trained(load_model(folder, device="cpu"))
    assert not never_trained(load_model(world / "base", device="cpu"))


def test_a_store_that_is_not_there_or_empty_is_found(world: Path, tmp_path: Path) -> None:
    report = examined(world, data=world / "voices")
    assert failed(report) == {"data"}
    assert report.of("generation", "ok")
    store = shutil.copytree(world / "data", tmp_path / "data")
    index = json.loads((store / "store.json").read_text())
    index["shards"] = [shard for shard in index["shards"] if shard["split"] == "validation"]
    (store / "store.json").write_text(json.dumps(index))
    assert "nothing to train on" in told(examined(world, data=store), "data")


# The prompt


def test_a_changed_chat_template_is_found(world: Path, base: Path) -> None:
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|eot_id|>", "<|eot_id|>\n"))
    report = examined(world, model=base, data=None)
    assert failed(report) == {"prompt"}
    assert "writes a training row otherwise" in told(report, "prompt")
    template.write_text(template.read_text().replace("<|eot_id|>\n", "<|eot_id|>").replace("{%- endmacro -%}", ""))
    assert failed(doctor(model=base)) == {"prompt"}


def test_a_checkpoint_without_a_chat_template_skips_the_comparison() -> None:
    tokenizer = tiny_tokenizer()
    row = built_in_row(8, 1024)
    assert check_chat_template(tokenizer, row)[0].status == "ok"
    tokenizer.chat_template = None
    assert check_chat_template(tokenizer, row)[0].status == "skipped"


def conversation(row: Row) -> Row:
    """A conversation with audio of the user, and assistant text before the target."""
    said = {"role": "user", "content": [{"type": "text", "text": "Repeat:"}, {"type": "audio", "url": "a.wav"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Here."}, {"type": "audio", "url": "b.wav"}]}
    heard = [random_codes(5, seed=3)]
    return dataclasses.replace(row, messages=[said, answer], context_codes=heard, context_sha256=["0"])


@pytest.mark.parametrize("change", [lambda row: row, conversation], ids=["utterance", "conversation"])
def test_a_prompt_that_differs_between_training_and_speaking_is_found(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Row], Row]
) -> None:
    _, prompter = tiny_prompter()
    row = change(built_in_row(8, 1024))
    assert check_same_prompt(prompter, row)[0].status == "ok"
    speak = Prompter.prompt

    def other_codes(self: Prompter, *arguments: Any) -> Example:
        made = speak(self, *arguments)
        return dataclasses.replace(made, audio_input_ids=made.audio_input_ids[::-1])

    monkeypatch.setattr(Prompter, "prompt", other_codes)
    assert "other codes in speaking" in check_same_prompt(prompter, row)[0].message

    def without_beginning(self: Prompter, *arguments: Any) -> Example:
        made = speak(self, *arguments)
        return dataclasses.replace(made, input_ids=made.input_ids[1:])

    monkeypatch.setattr(Prompter, "prompt", without_beginning)
    assert "position 0 differs" in check_same_prompt(prompter, row)[0].message


class Ears:
    """Whisper features of any clip, and those of another encoder."""

    def __init__(self, value: float) -> None:
        self.value = value

    def heard(self, sha256: str) -> Heard:
        return Heard(np.full((4, 3), self.value, dtype=np.float16), (4,))


def test_what_is_heard_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    _, prompter = tiny_prompter()
    row = conversation(built_in_row(8, 1024))
    assert check_same_prompt(prompter, row, Rendering(features=Ears(1.0)))[0].status == "ok"
    speak = Prompter.prompt

    def other_features(self: Prompter, *arguments: Any) -> Example:
        made = speak(self, *arguments)
        assert made.whisper_features is not None
        return dataclasses.replace(made, whisper_features=made.whisper_features + 1)

    monkeypatch.setattr(Prompter, "prompt", other_features)
    assert "other features in speaking" in check_same_prompt(prompter, row, Rendering(features=Ears(1.0)))[0].message


def test_whisper_features_that_are_not_there_are_told(world: Path) -> None:
    store, heard = CodeStore.open(world / "data"), Rendering(reference="scene")
    assert find_features(store, heard, named=None, shape=None) == (heard, [])
    _, [finding] = find_features(store, Rendering(), named="a/whisper", shape=None)
    assert finding.status == "failed"
    assert "has anything to hear" in finding.message
    with pytest.raises(DataError, match="--whisper a/whisper"):
        find_features(store, heard, named="a/whisper", shape=None)
    shape = WhisperShape(checkpoint="a/whisper", revision="0", d_model=3, chunk_frames=4, token_id=11)
    rendering, [finding] = find_features(store, heard, named=None, shape=shape)
    assert finding.status == "warning"
    assert rendering == heard


def test_text_that_speaking_would_normalise_is_found() -> None:
    _, prompter = tiny_prompter()
    row = dataclasses.replace(built_in_row(8, 1024), text="The  sun rises in the east.")
    assert check_same_prompt(prompter, row)[0].status == "failed"


def test_a_control_token_in_pieces_is_found() -> None:
    tokenizer = tiny_tokenizer()
    assert check_tokens(tokenizer)[0].status == "ok"

    class Broken:
        def encode(self, text: str, **options: Any) -> list[int]:
            return tokenizer.encode(text.replace("<|eot_id|>", "eot"), **options)

        decode = staticmethod(tokenizer.decode)

    assert "<|eot_id|>" in check_tokens(Broken())[0].message


# Generation


def rows() -> list[Row]:
    return [built_in_row(8, 1024, seed=seed) for seed in (0, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_is_compared_in_every_dtype(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model, prompter = tiny_prompter()
    model = model.to(dtype)
    assert check_generation(model, prompter, rows(), "base")[0].status == "ok"

    class Shifted(examine.generation.Decoder):
        def __init__(self, model: Any, prompts: Any) -> None:
            super().__init__(model, prompts)
            self.lengths = self.lengths + 1  # positions one too far

    monkeypatch.setattr(examine.generation, "Decoder", Shifted)
    assert check_generation(model, prompter, rows(), "base")[0].status == "failed"


def test_a_broken_cache_is_found(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = DynamicCache.update

    def forgets(self: DynamicCache, keys: torch.Tensor, values: torch.Tensor, layer: int, *more: Any) -> Any:
        whole = update(self, keys, values, layer, *more)
        return (whole[0], torch.cat([values[:, :, -1:], whole[1][:, :, 1:]], dim=2)) if keys.shape[2] == 1 else whole

    monkeypatch.setattr(DynamicCache, "update", forgets)
    report = examined(world, data=None)
    assert failed(report) == {"generation"}
    assert "KV cache" in told(report, "generation")

    def breaks(self: DynamicCache, *arguments: Any) -> None:
        raise RuntimeError("no cache today")

    monkeypatch.setattr(DynamicCache, "update", breaks)
    report = doctor(model=world / "base")
    assert failed(report) == {"generation"}
    assert "no cache today" in told(report, "generation")


# The adapter


def zero_everything(folder: Path) -> None:
    rewrite(folder, lambda key, value: value * 0 if "lora_B" in key else value)


def zero_one(folder: Path) -> None:
    rewrite(folder, lambda key, value: value * 0 if "layers.2.mlp.up_proj.lora_B" in key else value)


def flip_byte(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def drop_tensor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
    save_file(weights, path)
    write_card(folder, json.loads((folder / "higgstune.json").read_text()))


def forget_zero_card(folder: Path) -> None:
    (folder / "higgstune.json").write_text("{")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (zero_everything, "zero in 50 of 50 modules"),
        (zero_one, "model.layers.2.mlp.up_proj"),
        (flip_byte, "its checksum differs"),
        (drop_tensor, "tensors are in only one of them"),
        (lambda folder: rewrite(folder, lambda key, value: value * torch.nan), "NaN or infinity"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"0" * 100), "truncated"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "is missing"),
        (forget_zero_card, "not valid JSON"),
        (shutil.rmtree, "neither an adapter"),
    ],
)
def test_a_broken_adapter_is_found(world: Path, adapter: Path, fault: Any, says: str) -> None:
    fault(adapter)
    report = examined(world, adapter=adapter, data=None)
    assert failed(report) == {"adapter"}
    assert says in told(report, "adapter")
    assert report.of("generation", "ok")  # of the base


def test_an_adapter_of_another_base_is_found(world: Path, base: Path) -> None:
    change_weights(base, lambda w: w["model.norm.weight"].mul_(1.05))
    report = examined(world, model=base, data=None)
    assert failed(report) == {"adapter"}
    assert "fingerprint" in told(report, "adapter")
    report = doctor(model=save_tiny_checkpoint(base / "tiny"), adapter=world / "adapter", codec=DEMO_CODEC)
    assert failed(report) == {"adapter"}
    assert "hidden_size" in told(report, "adapter")


def test_files_and_base_are_compared_before_anything_is_loaded(world: Path, adapter: Path) -> None:
    assert check_files(adapter)[0].status == "ok"
    flip_byte(adapter)
    assert "checksum" in check_files(adapter)[0].message
    model = load_model(world / "base", dtype="bfloat16", device="cpu")
    assert check_trained_on(model, adapter)[0].status == "ok"  # the same base in another dtype
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    assert "fingerprint" in check_trained_on(model, adapter)[0].message


def test_an_adapter_of_another_codec_is_found(world: Path, adapter: Path) -> None:
    card = json.loads((adapter / "higgstune.json").read_text())
    write_card(adapter, card | {"codec_revision": "another"})
    report = examined(world, adapter=adapter, data=None)
    assert failed(report) == {"codec"}
    assert "another" in told(report, "codec")


def test_an_adapter_without_a_card_is_warned_of(world: Path, adapter: Path) -> None:
    (adapter / "higgstune.json").unlink()
    report = examined(world, adapter=adapter, data=None)
    assert report.passed, failed(report)
    assert "has no higgstune.json" in told(report, "adapter", "warning")
    assert check_card(adapter)[0].status == "warning"


def test_what_a_recipe_teaches_nothing_may_be_zero(adapter: Path) -> None:
    rewrite(adapter, lambda key, value: value * 0 if "layers.4.mlp.up_proj.lora_B" in key else value)
    assert check_files(adapter)[0].status == "failed"
    card = json.loads((adapter / "higgstune.json").read_text())
    card["recipe"]["stages"] = [{"name": "voice", "text_weight": 0.0, "audio_weight": 1.0}]
    write_card(adapter, card)
    assert check_files(adapter)[0].status == "ok"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("attention", ["lora", "full"])
def test_plain_peft_that_leaves_modules_out_is_found(world: Path, tmp_path: Path, attention: AttentionTraining) -> None:
    folder = save_adapter(world / "base", tmp_path / "adapter", attention=attention)
    report = examined(world, adapter=folder, data=None)
    assert report.passed, failed(report)
    tensors = 5 * 4 * 2 if attention == "lora" else 5 * 5
    assert f"would drop {tensors} tensors" in told(report, "adapter", "warning")
    assert "modules of the adapter are at work" in told(report, "adapter", "ok")
    plain = load_model(world / "base", dtype="float32", device="cpu")
    loaded = PeftModel.from_pretrained(plain, str(folder))
    finding = check_applied(loaded, folder)
    assert finding.status == "failed"
    assert f"{tensors} of the adapter's" in finding.message
    assert "audio_attn" in finding.message
    ours = load_adapter(load_model(world / "base", dtype="float32", device="cpu"), folder)
    assert check_applied(ours, folder).status == "ok"


def test_an_adapter_that_was_changed_after_loading_is_found(world: Path) -> None:
    model = load_model(world / "base", dtype="float32", device="cpu")
    assert check_trained_on(model, world / "adapter")[0].status == "ok"
    assert check_plain_peft(model, world / "adapter") == []
    loaded = load_adapter(model, world / "adapter")
    prompter = tiny_prompter()[1]
    batch = collate(loaded, [as_trained(prompter, row, text_targets="transcript") for row in rows()])
    assert check_effect(loaded, batch)[0].status == "ok"
    layer = loaded.base_model.model.model.layers[3].audio_mlp.gate_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    assert "model.layers.3.audio_mlp.gate_proj" in check_applied(loaded, world / "adapter").message
    assert "1 of 50 modules of the adapter change nothing" in check_effect(loaded, batch)[0].message
    loaded.base_model.disable_adapter_layers()
    assert "50 of 50 modules" in check_effect(loaded, batch)[0].message


# Memory


def test_too_little_memory_is_found(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 44_400_000  # of the demo's miniature, to speak
    for free, expected in ((needed - 600_000, "failed"), (needed + 2_000_000, "warning")):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        report = doctor(adapter=world / "adapter")
        assert failed(report) == ({"memory"} if expected == "failed" else set()), free
        assert report.of("memory", expected)  # type: ignore[arg-type]
    monkeypatch.setattr(memory, "free_memory", lambda device: 1_000_000)
    report = examined(world)
    assert failed(report) == {"memory"}
    assert "do not fit" in told(report, "generation", "skipped")  # nothing is loaded that does not fit
    assert report.of("prompt", "ok")


def recipe(world: Path, folder: Path, **changes: Any) -> Path:
    stage = {"name": "voice", "kind": "full", "max_steps": 3, "batch_size": 8}
    tree = {
        "model": {"checkpoint": str(world / "base"), "device": "cpu"}, "data": {"store": str(world / "data")},
        "stages": [stage],
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(tree | changes))  # JSON is YAML
    return path


def test_a_recipe_names_the_rest_and_its_training_is_planned(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = doctor(recipe=recipe(world, tmp_path))
    assert report.passed, failed(report)
    assert report.of("loss")
    assert "training a full stage, 8 x" in told(report, "memory", "ok")
    monkeypatch.setattr(memory, "free_memory", lambda device: 100_000_000)
    report = doctor(recipe=recipe(world, tmp_path))
    assert failed(report) == {"memory"}
    assert "gradient_checkpointing" in told(report, "memory")
    assert report.of("generation", "ok")  # the weights alone do fit


def test_a_broken_recipe_is_a_finding(world: Path, tmp_path: Path) -> None:
    report = doctor(recipe=recipe(world, tmp_path, seeds=1), model=world / "base")  # the data stay unknown
    assert failed(report) == {"recipe"}
    assert "the nearest one is seed" in told(report, "recipe")
    assert report.of("generation", "ok")
    if not torch.cuda.is_available():
        model = {"checkpoint": str(world / "base"), "device": "cuda"}
        report = doctor(recipe=recipe(world, tmp_path, model=model))
        assert failed(report) == {"recipe"}
        assert "device: device cuda" in told(report, "recipe")


@pytest.mark.parametrize("attention", ["lora", "full"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_plan_counts_what_is_trained(attention: AttentionTraining, dora: bool) -> None:
    model, lora = tiny_model(tiny_config(tiny_tokenizer())), Lora(r=4, dora=dora)
    conditioning = Conditioning(audio_attention=True)
    add_conditioning(model, conditioning)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.audio_attn.o_proj.weight)  # a direction for DoRA
    counted = memory.trained_parameters(model, lora.config("full", conditioning, attention))
    peft_model = add_lora(model, lora, "full", attention=attention)
    assert counted == sum(weight.numel() for weight in peft_model.parameters() if weight.requires_grad)


# Environment, report, command


def test_wrong_versions_and_a_full_disk_are_found() -> None:
    assert check_versions().status == "ok"

    def installed(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return {"torch": "2.13.0+cpu", "transformers": "4.57.0"}[name]

    wanted = ["torch>=2.6", "transformers>=5.23,<6", "peft>=0.18", 'ruff>=0.11; extra == "dev"']
    finding = check_versions(wanted, "3.10.1", installed)
    assert finding.status == "failed"
    for part in ("Python 3.10.1", "transformers 4.57.0", "peft is not installed"):
        assert part in finding.message
    assert [check_disk(free).status for free in (10**7, 10**9, 10**12)] == ["failed", "warning", "ok"]


def test_a_device_that_does_not_exist_is_the_callers_mistake() -> None:
    with pytest.raises(ConfigError, match="unknown device"):
        doctor(device="toaster")
    with pytest.raises(ConfigError, match="unknown dtype"):
        doctor(dtype="int3")


def test_the_command_prints_a_table_or_json_and_exits_as_it_should(
    world: Path,
    command: Command,  # noqa: F811
) -> None:
    code, out, err = command("doctor", "--adapter", world / "adapter", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["passed"]
    assert result["summary"]["failed"] == 0
    assert {"check", "status", "message", "advice"} == result["findings"][0].keys()
    assert "examining checkpoint" in err
    code, out, err = command("doctor", "--model", "/no/where")
    assert code == 1
    assert "failed" in out
    assert "/no/where does not exist" in out
    assert "Traceback" not in err
    code, _, err = command("doctor", "--device", "toaster")
    assert code == 2
    assert "toaster" in err
    assert command("doctor", "--modle", "x")[0] == 2
    assert command("doctor")[0] == 0
