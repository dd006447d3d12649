"""Runs with audio attention and Whisper, and adapters with them that cannot be misapplied."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from on_cpu import CPU
from peft import PeftModel
from processes import Together, forked_proofs  # noqa: F401
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny_checkpoint
from tiny_runs import DEMO_CODEC, history, make_recordings
from tiny_whisper import save_tiny_whisper
from training_world import STEP, assert_identical, assert_same, train_unproven, train_with_signal

import higgstune
from higgstune import BaseSpec
from higgstune.codec.whisper_encoder import load_whisper
from higgstune.config.recipe import Recipe, parse_recipe
from higgstune.data.manifest import Utterance, read_manifest
from higgstune.data.manifest import write_manifest as write_manifest_rows
from higgstune.data.messages import whisper_clips
from higgstune.data.store import CodeStore
from higgstune.data.whisper_features import FOLDER, FeatureStore
from higgstune.errors import CheckpointError, ConfigError, DataError, InputError
from higgstune.evaluation.clips import read_clips
from higgstune.evaluation.compare import compare
from higgstune.evaluation.evaluate import evaluate
from higgstune.families.higgs_v2.extensions import conditioning_of
from higgstune.generate.speaker import load
from higgstune.model.adapter_folder import adapter_card, adapter_conditioning, base_fingerprint
from higgstune.model.adapters import load_adapter
from higgstune.model.load import load_model
from higgstune.training.run import train
from higgstune.training.trainer import HiggsAudioTrainer
from higgstune.training.verify import probe_logits, verify_in_fresh_process

pytestmark = pytest.mark.processes

ASSETS = Path(higgstune.__file__).parent / "demo" / "assets"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its codec, a Whisper checkpoint, and a store with references and conversations."""
    folder = tmp_path_factory.mktemp("conditioned")
    save_tiny_checkpoint(folder / "base")
    shutil.copytree(DEMO_CODEC, folder / "base" / "codec")
    save_tiny_whisper(folder / "whisper")
    recordings = make_recordings(folder / "recordings", clips=10, step=4, glide=30)
    seconds = np.arange(24_000 * 3) / 24_000
    soundfile.write(recordings / "voice.wav", 0.3 * np.sin(2 * np.pi * 150 * seconds * (1 + seconds)), 24_000)
    write_manifest(recordings)
    prepare(folder)
    return folder


def write_manifest(recordings: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"audio": f"clip{i}.wav", "text": f"Sentence number {i}.", "speaker": "anna"} for i in range(7)
    ]
    for i, read_as in ((7, None), (8, "codes"), (9, "whisper")):
        part: dict[str, Any] = {"type": "audio", "url": "voice.wav"} | ({"as": read_as} if read_as else {})
        user = {"role": "user", "content": [part, {"type": "text", "text": f"Say sentence {i}."}]}
        said = {"role": "assistant", "content": [{"type": "audio", "url": f"clip{i}.wav"}]}
        rows.append({"messages": [user, said]})
    (recordings / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(folder: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "codec": folder / "base" / "codec", "whisper": str(folder / "whisper"), "references": "same_speaker",
        "validation_fraction": 0.2,
    }  # fmt: skip
    return higgstune.prepare(folder / "recordings" / "manifest.jsonl", folder / "data", **(settings | options))


def recipe(world: Path, *, attention: Any = True, **changes: Any) -> Recipe:
    stage = {"max_steps": 6, "learning_rate": 1e-2, "batch_size": 2}
    tree: dict[str, Any] = {
        "model": {
            "checkpoint": str(world / "base"), "device": "cpu", "dtype": "float32", "audio_attention": attention,
            "whisper": str(world / "whisper"),
        },
        "data": {"store": str(world / "data"), "reference": "scene"},
        "lora": {"r": 4, "alpha": 8},
        "stages": [{"name": "stage1", "kind": "text", **stage}, {"name": "stage2", "kind": "full", **stage}],
        "log_steps": 2, "eval_steps": 3, "save_steps": 3, "evaluation": {"clips": 0},
    }  # fmt: skip
    return parse_recipe(tree | changes, where="test")


@pytest.fixture(scope="module", params=["lora", "full"])
def run(request: pytest.FixtureRequest, world: Path) -> Path:
    """A finished two-stage run with both conditionings."""
    train(recipe(world, attention=request.param), world / request.param)
    return world / request.param


def test_features_are_stored_once_for_each_clip(world: Path) -> None:
    store = CodeStore.open(world / "data")
    features = FeatureStore.open(world / "data", str(world / "whisper"))
    needed = {sha256 for row in store.rows() for sha256 in whisper_clips(row, "scene")}
    assert needed
    assert needed == {sha256 for row in store.contexts() for sha256 in whisper_clips(row, "scene")}
    assert all(sha256 in features for sha256 in needed)
    talk = next(row for row in store.rows() if row.messages is not None and whisper_clips(row, "turn"))
    kept = features.read(talk.context_sha256[0])
    waveform, _ = soundfile.read(world / "recordings" / "voice.wav", dtype="float32")
    tower = load_whisper(world / "whisper")
    fresh = tower.encode(higgstune.data.audio.resample(waveform, 24_000, 16_000))  # type: ignore[attr-defined]
    assert kept.chunks == fresh.chunks == (50, 25)  # 3 s in chunks of 2 s, 25 positions a second
    np.testing.assert_array_equal(kept.features, fresh.features)
    before = sorted((world / "data" / FOLDER).rglob("*.safetensors"))
    again = prepare(world)
    assert again.whisper == len(needed)
    assert sorted((world / "data" / FOLDER).rglob("*.safetensors")) == before


def test_a_row_is_inspected_as_it_is_trained_on(world: Path) -> None:
    store = CodeStore.open(world / "data")
    prompts = {}
    for index, row in enumerate(store.rows()):
        found = higgstune.inspect_row(
            world / "data", index, model=world / "base", reference="scene", whisper=str(world / "whisper")
        )
        prompts[row.text] = found
        assert found.tokens == found.text_tokens + found.feature_positions + found.audio_rows
    chunk = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    assert prompts["Say sentence 7."].prompt.count(chunk) == prompts["Say sentence 9."].prompt.count(chunk) == 2
    assert prompts["Say sentence 7."].feature_positions == 75
    assert chunk not in prompts["Say sentence 8."].prompt  # "as": "codes"
    assert f"SPEAKER0: {chunk}" in prompts["Sentence number 1."].prompt.replace("\n", "")


def test_both_stages_train_on_from_the_base_and_from_each_other(world: Path, run: Path) -> None:
    first = [entry["eval_loss"] for entry in history(run, "stage1") if "eval_loss" in entry]
    second = [entry["eval_loss"] for entry in history(run, "stage2") if "eval_loss" in entry]
    assert first[-1] < first[0]
    assert second[0] == pytest.approx(first[-1], abs=1e-5)
    assert second[-1] < second[0]
    text, full = (load_file(run / name / "adapter" / "adapter_model.safetensors") for name in ("stage1", "stage2"))
    assert not [key for key in text if "audio_attn" in key or "audio_mlp" in key]
    assert [key for key in text if "audio_encoder_proj" in key]
    attention = [key for key in full if "audio_attn" in key]
    assert len(attention) == (16 if run.name == "lora" else 10)  # 2 layers: 4 x (A, B), or 4 projections and a norm
    assert all(("lora_" in key) == (run.name == "lora") for key in attention)
    assert any(full[key].abs().max() > 0 for key in attention if "o_proj" in key)


def test_the_adapter_folder_is_all_that_is_needed(world: Path, run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run / "stage2" / "adapter", tmp_path / "elsewhere")
    probe = tmp_path / "probe.safetensors"
    shutil.copy(run / "stage2" / "verify" / "probe.safetensors", probe)
    found = verify_in_fresh_process(
        adapter=moved, checkpoint=str(world / "base"), revision=None, dtype="float32", device="cpu", probe=probe
    )
    assert found.from_trained == 0
    assert found.from_base > 1e-2
    card = adapter_card(moved)
    assert card["data"]["train_rows"] + card["data"]["validation_rows"] == 10
    assert [stage["name"] for stage in card["stages"]] == ["stage1", "stage2"]
    assert card["base_fingerprint"] == base_fingerprint(load_model(world / "base", device="cpu"))


def test_every_conditioning_reaches_the_logits(world: Path, run: Path) -> None:
    probe = load_file(run / "stage2" / "verify" / "probe.safetensors")
    batch = {key: value for key, value in probe.items() if not key.endswith("_logits")}
    model = load_adapter(load_model(world / "base", dtype="float32", device="cpu"), run / "stage2" / "adapter")
    trained = probe_logits(model, batch)["audio_logits"]
    assert torch.equal(trained, probe["audio_logits"])
    silent = probe_logits(model, batch | {"whisper_features": torch.zeros_like(batch["whisper_features"])})
    assert (silent["audio_logits"] - trained).abs().max() > 1e-4
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "audio_attn" in name and "o_proj" in name and ("lora_B" in name or "modules_to_save" in name):
                parameter.zero_()
    assert (probe_logits(model, batch)["audio_logits"] - trained).abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_plain_peft_would_have_left_them_out(world: Path, run: Path) -> None:
    model = PeftModel.from_pretrained(load_model(world / "base", device="cpu"), str(run / "stage2" / "adapter"))
    assert not [name for name, _ in model.named_parameters() if "audio_attn" in name]  # in silence: see `doctor`


def test_another_encoder_is_refused_wherever_it_comes_in(world: Path, run: Path, tmp_path: Path) -> None:
    store = shutil.copytree(world / "data", tmp_path / "data")
    renamed = shutil.copytree(world / "whisper", tmp_path / "whisper")
    name = {"codec": world / "base" / "codec", "references": "same_speaker", "validation_fraction": 0.2}
    manifest = world / "recordings" / "manifest.jsonl"
    higgstune.prepare(manifest, store, whisper=renamed, **name)  # a Path is a name, too
    first = FeatureStore.open(store, str(renamed)).index.revision
    assert FeatureStore.open(store, "any name", first).index.revision == first
    save_tiny_whisper(renamed, seed=3)
    higgstune.prepare(manifest, store, whisper=str(renamed), **name)
    second = FeatureStore.open(store, str(renamed)).index.revision
    assert second != first
    stage = [{"name": "a", "kind": "full", "max_steps": 1}]
    model = recipe(world, attention=run.name).model_dump()["model"] | {"whisper": str(renamed)}
    data = {"store": str(store), "reference": "scene"}
    with pytest.raises(CheckpointError, match="was trained with features of"):
        train(recipe(world, model=model, data=data, stages=stage, init_adapter=str(run)), tmp_path / "run")
    extractor = json.loads((renamed / "preprocessor_config.json").read_text())
    (renamed / "preprocessor_config.json").write_text(json.dumps(extractor | {"feature_size": 80}))
    with pytest.raises(CheckpointError, match="of different checkpoints"):
        load_whisper(renamed)


def test_speaking_encodes_a_voice_in_the_scene(world: Path, run: Path, tmp_path: Path) -> None:
    reference = world / "recordings" / "voice.wav"
    speaker = load(run, device="cpu")
    assert speaker.reference_place == "scene"
    voice = speaker.reference(reference, "Whatever.")
    assert voice.whisper_features is not None
    assert voice.whisper_features.chunks == (50, 25)
    assert speaker.speak("Hello there.", reference=reference, max_seconds=1).seconds > 0
    other = save_tiny_whisper(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="name the right one with --whisper"):
        load(run, device="cpu", whisper=other).reference(reference)
    with pytest.raises(CheckpointError, match="name it with --whisper"):
        load(run, device="cpu", whisper=tmp_path / "nowhere").reference(reference)
    with pytest.raises(InputError, match="--whisper has no effect"):
        load(world / "base", device="cpu", whisper=other)
    by_codes = load(run, device="cpu", reference_place="turn").reference(reference, "Whatever.")
    assert by_codes.whisper_features is None


def flip(path: Path, at: float = 0.9) -> None:
    """Change one byte, in the data."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(bytes(content))


def drop_tensor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(next(key for key in weights if "audio_attn" in key))
    save_file(weights, path)
    edit(folder / "higgstune.json", lambda card: card.pop("weights_sha256"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any], *, seals: bool = True) -> None:
    """Change a JSON file; with `seals`, remove the checksums, to see what else detects the change."""
    content = json.loads(path.read_text())
    before = dict(content)
    change(content)
    if seals and content.get("higgstune") == before.get("higgstune"):
        content.pop("card_sha256", None)
    path.write_text(json.dumps(content))
    if seals and path.name == "adapter_config.json":
        edit(path.with_name("higgstune.json"), lambda card: card.pop("config_sha256"))


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda f: flip(f / "adapter_model.safetensors"), "checksum differs"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x10"), "truncated"),
        (drop_tensor, "does not fit this base"),
        (lambda f: (f / "higgstune.json").unlink(), r"higgstune\.json is missing"),
        (lambda f: (f / "higgstune.json").write_text("{"), "not valid JSON"),
        (lambda f: edit(f / "higgstune.json", lambda c: c.update(higgstune="9")), "not what was saved"),
        (lambda f: edit(f / "higgstune.json", lambda c: c.update(conditioning={"audio": 1})), "is damaged"),
        (lambda f: edit(f / "higgstune.json", lambda c: c.update(recipe=None)), "must be an object"),
        (
            lambda f: edit(f / "higgstune.json", lambda c: c["conditioning"].update(audio_attention=False)),
            "does not fit",
        ),
        (lambda f: edit(f / "adapter_config.json", lambda c: c.update(lora_alpha=80)), "was trained with 8"),
        (lambda f: edit(f / "adapter_config.json", lambda c: c.update(target_modules="(")), "does not fit"),
        (lambda f: edit(f / "adapter_config.json", lambda c: c.update(target_modules="nothing")), "does not fit"),
        (
            lambda f: edit(f / "adapter_config.json", lambda c: c.update(alpha_pattern={"q": 9}), seals=False),
            "checksum",
        ),
        (lambda f: (f / "adapter_config.json").unlink(), "neither an adapter"),
        (lambda f: edit(f / "higgstune.json", lambda c: c.update(codec_revision="x")), "another codec"),
        (lambda f: edit(f / "higgstune.json", lambda c: c["recipe"]["lora"].update(r=3), seals=False), "not what was"),
    ],
)
def test_a_damaged_adapter_is_refused(world: Path, run: Path, tmp_path: Path, damage: Any, names: str) -> None:
    copy = shutil.copytree(run / "stage2" / "adapter", tmp_path / "copy")
    damage(copy)
    with pytest.raises(CheckpointError, match=names):
        load(copy, base=BaseSpec(world / "base", device="cpu"))


def test_where_things_lie_may_be_edited(world: Path, run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(world / "base", tmp_path / "base")
    adapter = shutil.copytree(run / "stage2" / "adapter", tmp_path / "adapter")
    for name in ("adapter_config.json", "higgstune.json"):
        (adapter / name).write_text((adapter / name).read_text().replace(str(world / "base"), str(moved)))
    assert load(adapter, device="cpu").loaded.checkpoint == str(moved)


def test_another_base_is_refused(run: Path, world: Path, tmp_path: Path) -> None:
    other = save_tiny_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="have the fingerprint"):
        load_adapter(load_model(other, device="cpu"), run / "stage2" / "adapter")


def test_stored_features_that_changed_are_refused(world: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(world / "data", tmp_path / "data")
    features = FeatureStore.open(copy, str(world / "whisper"))
    clip = next(iter(features.index.files[0].clips))
    flip(features.folder / features.index.files[0].name)
    with pytest.raises(DataError, match="not the file that was written"):
        features.read(clip)
    next((copy / FOLDER).rglob("index.json")).write_text("{")
    with pytest.raises(DataError, match="damaged"):
        FeatureStore.open(copy, str(world / "whisper"))


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"model": {"audio_attention": ["lora", "full"]}}, ConfigError, "silently leave out the LoRA"),
        ({"model": {"audio_attention": "both"}}, ConfigError, "model.audio_attention: Input should be"),
        ({"stages": [{"name": "a", "kind": "text", "max_steps": 1}]}, ConfigError, "nothing would train it"),
        ({"model": {"whisper": None}}, DataError, "no Whisper is configured"),
        ({"model": {"whisper": "openai/whisper-large-v3"}}, DataError, "--whisper openai/whisper-large-v3"),
        ({"lora": {"dora": True}, "model": {"audio_attention": "lora"}}, ConfigError, "lora.dora cannot start from"),
        ({"init_adapter": "OTHER"}, CheckpointError, "must stay on"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    world: Path, run: Path, tmp_path: Path, change: dict[str, Any], error: type[Exception], names: str
) -> None:
    if "init_adapter" in change:  # it was conditioned, the recipe is not
        change = {
            "init_adapter": str(run),
            "model": {"audio_attention": False},
            "stages": [{"name": "a", "kind": "full", "max_steps": 1}],
        }
    tree = recipe(world).model_dump(mode="json")
    for key, value in change.items():
        tree[key] = tree[key] | value if isinstance(value, dict) else value
    with pytest.raises(error, match=names):
        train(parse_recipe(tree, where="test"), tmp_path / "run")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("*.safetensors"))


def test_whisper_without_clips_has_no_effect(world: Path, tmp_path: Path) -> None:
    higgstune.prepare(
        make_recordings(tmp_path / "recordings", clips=4), tmp_path / "data", codec=world / "base" / "codec",
        whisper=str(world / "whisper"), validation_fraction=0,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="has no effect"):
        train(recipe(world, data={"store": str(tmp_path / "data")}), tmp_path / "run")


def test_a_killed_run_ends_as_if_it_had_not_been(world: Path, run: Path, tmp_path: Path) -> None:
    made, out = recipe(world, attention=run.name), tmp_path / "run"
    killed = Together(tmp_path / "killed", 1, train_with_signal, made, out, signal.SIGKILL, STEP, 11)
    assert killed.exit_codes() == [-signal.SIGKILL], killed.log()
    Together(tmp_path / "resumed", 1, train_unproven, made, out, True).succeeded()
    assert_identical(out, run)


def test_sharded_it_continues_as_on_one_process(world: Path, run: Path, tmp_path: Path) -> None:
    """Also the projector, which stands outside of the layers: its moments are saved after a validation."""
    tree = recipe(world, attention=run.name, parallel="fsdp").model_dump(mode="json")
    for stage in tree["stages"]:
        stage["batch_size"] = 1
    made, out = parse_recipe(tree, where="test"), tmp_path / "run"
    killed = Together(tmp_path / "killed", 2, train_with_signal, made, out, signal.SIGKILL, STEP, 11)
    assert killed.exit_codes() == [-signal.SIGKILL, 1], killed.log(1)
    Together(tmp_path / "resumed", 2, train_unproven, made, out, True).succeeded()
    assert_same(out, run, atol=1e-4)  # at ten times the usual rate


def test_the_demos_miniature_with_both_extensions_can_be_moved(world: Path, tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "base", tmp_path / "base")
    shutil.copytree(DEMO_CODEC, tmp_path / "base" / "codec")
    shutil.copytree(ASSETS / "voices", tmp_path / "voices")
    rows = [row for _, row in read_manifest(tmp_path / "voices" / "metadata.jsonl") if isinstance(row, Utterance)]
    write_manifest_rows(tmp_path / "voices" / "some.jsonl", rows[:8])
    higgstune.prepare(
        tmp_path / "voices" / "some.jsonl", tmp_path / "data", codec=tmp_path / "base" / "codec",
        references="same_speaker", whisper=str(world / "whisper"),
    )  # fmt: skip
    made = recipe(world, attention="full", data={"store": str(tmp_path / "data"), "reference": "scene"})
    train(made.model_copy(update={"model": made.model.model_copy(update={"checkpoint": str(tmp_path / "base")})}),
          tmp_path / "run")  # fmt: skip
    moved = shutil.move(tmp_path / "run" / "stage2" / "adapter", tmp_path / "elsewhere")
    found = verify_in_fresh_process(
        adapter=Path(moved), checkpoint=str(tmp_path / "base"), revision=None, dtype="float32", device="cpu",
        probe=tmp_path / "run" / "stage2" / "verify" / "probe.safetensors",
    )  # fmt: skip
    assert found.from_trained == 0
    assert found.from_base > 0.1


@pytest.mark.parametrize(("given", "expected"), [(None, 1e-3), (5e-3, 5e-3)])
def test_what_is_trained_in_full_learns_at_its_own_rate(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: float | None, expected: float
) -> None:
    seen: list[dict[str, Any]] = []

    def stop(self: HiggsAudioTrainer, **arguments: Any) -> None:
        optimizer = self.create_optimizer()
        assert self.create_optimizer() is optimizer
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group in optimizer.param_groups:
            seen.extend({"name": names[id(p)], "lr": group["lr"]} for p in group["params"])
        raise KeyboardInterrupt

    monkeypatch.setattr(HiggsAudioTrainer, "train", stop)
    stage = {"name": "s", "kind": "full", "max_steps": 3, "learning_rate": 1e-2, "full_learning_rate": given}
    with pytest.raises(KeyboardInterrupt):
        train(recipe(world, attention=run.name, stages=[stage]), tmp_path / "run")
    in_full = [entry for entry in seen if "modules_to_save" in entry["name"]]
    assert len(in_full) == (2 if run.name == "lora" else 2 + 2 * 5)
    assert {entry["lr"] for entry in in_full} == {expected}
    assert {entry["lr"] for entry in seen if "lora_" in entry["name"]} == {1e-2}


def test_a_comparison_finds_a_whisper_that_has_moved(world: Path, run: Path, tmp_path: Path) -> None:
    """An adapter with Whisper and a base without, both in 4 bits."""
    recording = world / "recordings" / "voice.wav"
    shutil.copy(recording, tmp_path / "voice.wav")
    (tmp_path / "meta.lst").write_text("a|Whatever.|voice.wav|Oh.\n")
    moved = shutil.copytree(world / "whisper", tmp_path / "whisper")
    options: dict[str, Any] = {"texts": str(tmp_path / "meta.lst"), "base": CPU, "whisper": moved}
    found = compare(
        [run, world / "base"], out=tmp_path / "out", **(options | {"base": BaseSpec(device="cpu", quantize="4bit")})
    )
    assert [settings.dtype for settings in found.settings.values() if settings] == ["float32-4bit"] * 2
    other = save_tiny_whisper(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="name the right one with --whisper"):
        compare([run, world / "base"], out=tmp_path / "out", **(options | {"whisper": other}))
    with pytest.raises(InputError, match="no adapter here was trained with Whisper"):
        compare([world / "base", world / "base" / ".." / "base2"], out=tmp_path / "out", **options)
    with pytest.raises(InputError, match="--whisper has no effect"):
        evaluate(world / "base", out=tmp_path / "out", **options)


def test_sample_evaluation_encodes_voices_during_training(world: Path, tmp_path: Path) -> None:
    stage = {"name": "voice", "kind": "full", "max_steps": 2, "batch_size": 2}
    made = recipe(world, stages=[stage], eval_steps=2, evaluation={"clips": 2})
    train_unproven(made, tmp_path / "run")
    spoken = [read_clips(tmp_path / "run" / "voice" / "samples" / f"step-00000{step}") for step in (0, 2)]
    utterances = [row for row in CodeStore.open(world / "data").rows("validation") if row.messages is None]
    assert [len(clips) for clips in spoken] == [len(utterances)] * 2
    evaluation = json.loads((tmp_path / "run" / "voice" / "samples" / "step-000002" / "evaluation.json").read_text())
    assert evaluation["summary"]["cap_rate"]["clips"] == len(utterances) > 0


def test_a_text_adapter_is_conditioned_as_its_run_is(world: Path, run: Path) -> None:
    found = adapter_conditioning(run / "stage1" / "adapter")
    assert found == adapter_conditioning(run / "stage2" / "adapter")
    model = load_adapter(load_model(world / "base", device="cpu"), run / "stage1" / "adapter")
    assert conditioning_of(model) == found
