"""A recipe as one job: two stages, proven in a fresh process, never overwritten."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import soundfile
import yaml
from commands import Command
from foreign_adapters import renamed, save_foreign
from processes import forked_proofs  # noqa: F401
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny_checkpoint
from tiny_codec import save_tiny_codec
from tiny_runs import DEMO_CODEC, history, make_recordings, recipe

import higgstune
from higgstune.config.recipe import parse_recipe
from higgstune.data.store import CodeStore
from higgstune.errors import CheckpointError, ConfigError, DataError, VerificationError
from higgstune.generate.speaker import load
from higgstune.inputs import find_adapter
from higgstune.model.adapter_folder import adapter_card
from higgstune.model.adapters import load_adapter
from higgstune.model.load import load_model
from higgstune.training.run import train
from higgstune.training.run_dir import RunFolder, RunState
from higgstune.training.verify import probe_logits, verify_in_fresh_process, write_probe

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint (codec inside) and a prepared store."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_checkpoint(folder / "base")
    shutil.copytree(DEMO_CODEC, folder / "base" / "codec")
    recordings = make_recordings(folder / "recordings", step=4, glide=30)
    rows = [
        {"audio": path.name, "text": path.with_suffix(".txt").read_text(), "licence": "CC0-1.0"}
        for path in sorted(recordings.glob("*.wav"))
    ]
    (recordings / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    higgstune.prepare(recordings, folder / "data", codec=folder / "base" / "codec", validation_fraction=0.2)
    return folder


# Until the losses of random weights are no longer at chance.
LONGER = [
    {"name": "stage1", "kind": "text", "max_steps": 6, "learning_rate": 5e-3, "batch_size": 2},
    {"name": "stage2", "kind": "full", "max_steps": 12, "learning_rate": 2e-2, "batch_size": 4},
]


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    """A finished two-stage run."""
    train(recipe(world, stages=LONGER), world / "run")
    return world / "run"


def test_two_stages_leave_a_proven_adapter(world: Path, finished: Path) -> None:
    state = json.loads((finished / "run.json").read_text())
    assert state["status"] == "finished"
    assert state["stages"]["stage1"]["layers"] == 2 * 7
    assert state["stages"]["stage2"]["layers"] == 2 * 10
    for stage in ("stage1", "stage2"):
        proof = state["stages"][stage]["verification"]
        assert proof["from_trained"] <= 1e-5
        assert proof["from_base"] > 1e-3
        assert list((finished / stage / "tensorboard").glob("events*"))
        card = json.loads((finished / stage / "adapter" / "higgstune.json").read_text())
        assert card["checkpoint"] == str(world / "base")
        assert card["data"]["origin"]["licence"] == [{"says": "CC0-1.0", "rows": 8}]
        assert card["data"]["origin"]["consent"] == [{"says": None, "rows": 8}]
    resolved = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert parse_recipe(resolved, where="saved") == recipe(world, stages=LONGER)


def test_stage_two_starts_where_stage_one_ended(finished: Path) -> None:
    last = [entry for entry in history(finished, "stage1") if "eval_loss" in entry][-1]
    first = next(entry for entry in history(finished, "stage2") if "eval_loss" in entry)
    assert first["step"] == 0
    assert first["eval_audio_loss"] == pytest.approx(last["eval_audio_loss"], abs=1e-6)
    text = load_file(finished / "stage1" / "adapter" / "adapter_model.safetensors")
    full = load_file(finished / "stage2" / "adapter" / "adapter_model.safetensors")
    assert text.keys() < full.keys()
    assert all("audio_mlp" in key for key in full.keys() - text.keys())


def test_a_finished_run_is_not_overwritten_nor_a_strange_folder_used(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    before = (finished / "stage2" / "adapter" / "adapter_model.safetensors").read_bytes()
    for resume in (False, True):
        with pytest.raises(ConfigError, match="is finished and is not overwritten"):
            train(recipe(world), finished, resume=resume)
    assert (finished / "stage2" / "adapter" / "adapter_model.safetensors").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not a run"):
        train(recipe(world), tmp_path)


@pytest.mark.parametrize("checkpointing", [False, "auto"])
def test_a_row_that_no_pack_can_hold_is_named_before_the_folder_is_taken(
    world: Path, tmp_path: Path, checkpointing: Any
) -> None:
    stages = [{"name": "s", "kind": "full", "max_steps": 2, "batch_tokens": 20}]
    store = CodeStore.open(world / "data")
    longest = max(store.rows(), key=lambda row: (row.codes.shape[0], len(row.text)))
    with pytest.raises(ConfigError, match=rf"stages.0.batch_tokens is 20, but row {longest.id} of the {longest.split}"):
        train(recipe(world, stages=stages, gradient_checkpointing=checkpointing), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_never_began_does_not_claim_its_folder(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        train(recipe(world, data={"store": str(world / "recordings")}), tmp_path / "run")
    wrong = {"checkpoint": str(world / "nowhere"), "device": "cpu"}
    with pytest.raises(CheckpointError, match="nowhere"):
        train(recipe(world, model=wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resuming_an_empty_folder_starts_a_run_and_says_so(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    RunFolder(tmp_path / "run", recipe(world), is_main=True, processes=1).check(resume=False)
    assert caplog.messages == []
    RunFolder(tmp_path / "run", recipe(world), is_main=True, processes=1).check(resume=True)
    assert caplog.messages == [f"{tmp_path / 'run'} holds no run to resume: a new one starts there"]


def test_a_run_is_resumed_only_on_request_and_with_its_recipe(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("higgstune.training.run.train_stage", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(world), tmp_path / "run")
    with pytest.raises(ConfigError, match="--resume"):
        train(recipe(world), tmp_path / "run")
    with pytest.raises(ConfigError, match="seed differ"):
        train(recipe(world, seed=1), tmp_path / "run", resume=True)
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    for name in ("store", "base"):
        other = state["trained_on"] | {name: "another"}
        (tmp_path / "run" / "run.json").write_text(json.dumps(state | {"trained_on": other}))
        with pytest.raises(ConfigError, match=f"was started on another {name}"):
            train(recipe(world), tmp_path / "run", resume=True)


def flip_bit(base: Path) -> None:
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-3] ^= 64  # of one value of many, which no sample of them has
    (base / "model.safetensors").write_bytes(content)


def ten_times_theta(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 10
    (base / "config.json").write_text(json.dumps(config))


def deal_again(base: Path) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_a_base_or_sentences_that_changed_since_the_stop_are_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("higgstune.training.run.train_stage", stopped)
    base, texts, run = shutil.copytree(world / "base", tmp_path / "base"), tmp_path / "texts.txt", tmp_path / "run"
    texts.write_text("Hello there.")
    changes = {"checkpoint": str(base), "device": "cpu", "dtype": "float32"}
    made = recipe(world, model=changes, evaluation={"clips": 1, "texts": str(texts)})
    with pytest.raises(KeyboardInterrupt):
        train(made, run)
    state = json.loads((run / "run.json").read_text())
    assert {"base", "config_sha256", "tokenizer_sha256", "evaluation.texts"} <= state["trained_on"].keys()
    assert state["weights"]["model.safetensors"]["bytes"] == (base / "model.safetensors").stat().st_size
    for change, message in {
        flip_bit: r"another base, of which model\.safetensors has changed since",
        ten_times_theta: r"another base, of which config\.json has changed \(rope_parameters\.rope_theta is",
        deal_again: r"another base, of which tokenizer\.json has changed",
    }.items():
        change(base)
        with pytest.raises(ConfigError, match=message):
            train(made, run, resume=True)
        shutil.copytree(world / "base", base, dirs_exist_ok=True)
    texts.write_text("Hello here.")
    with pytest.raises(ConfigError, match=r"was started on another evaluation\.texts"):
        train(made, run, resume=True)
    texts.write_text("Hello there.")
    older = {key: state["trained_on"][key] for key in ("store", "base")}  # as an older version has written it
    del state["weights"]
    (run / "run.json").write_text(json.dumps(state | {"trained_on": older}))
    with pytest.raises(KeyboardInterrupt):
        train(made, run, resume=True)
    assert [record.message.partition(" of its")[0] for record in caplog.records] == [
        f"the run {run} does not record config.json and tokenizer.json"
    ]
    assert "weights" in json.loads((run / "run.json").read_text())  # from now on it does


def test_an_adapter_that_is_not_what_was_trained_is_refused(world: Path, finished: Path, tmp_path: Path) -> None:
    adapter, probe = tmp_path / "adapter", tmp_path / "probe.safetensors"
    shutil.copytree(finished / "stage2" / "adapter", adapter)
    shutil.copy(finished / "stage2" / "verify" / "probe.safetensors", probe)

    def check() -> None:
        verify_in_fresh_process(
            adapter=adapter, checkpoint=str(world / "base"), revision=None, dtype="float32", device="cpu", probe=probe
        )

    check()
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(key for key in weights if "audio_mlp" in key and "lora_B" in key)
    save_file(weights | {name: weights[name] * 1.01}, adapter / "adapter_model.safetensors")
    with pytest.raises(VerificationError, match="does not give the trained model's logits"):
        check()
    save_file({key: value for key, value in weights.items() if key != name}, adapter / "adapter_model.safetensors")
    with pytest.raises(VerificationError, match="does not fit this base"):
        check()


def test_a_stage_that_is_not_usable_is_the_last(
    world: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = {"kind": "text", "max_steps": 4, "learning_rate": 1e-9, "warmup_steps": 100}
    made = recipe(world, stages=[{"name": "lazy", **lazy}, {"name": "never", **lazy}])
    result = train(made, tmp_path / "run")
    [verdict] = [stage.verdict for stage in result.stages.values()]
    assert (result.usable, result.verdict, result.adapter) == (False, verdict, tmp_path / "run" / "lazy" / "adapter")
    assert verdict is not None
    assert verdict.reasons == ["the adapter hardly changes the base's logits"]
    assert "lower stages.0.warmup_steps" in verdict.advice
    assert f"lazy: {verdict}" in capsys.readouterr().err
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (state["status"], state["adapter"], list(state["stages"])) == ("not usable", "lazy/adapter", ["lazy"])
    assert "lazy: not usable" in (tmp_path / "run" / "report.html").read_text()
    spoken = ["--out", tmp_path / "a.wav", "--max-seconds", 0.2, "--device", "cpu"]
    code, _, err = command("speak", "Hello.", "--adapter", tmp_path / "run", *spoken)
    assert (code, "is not usable; its report says why" in err) == (0, True)

    # Resumed, it says so again, and trains nothing.
    monkeypatch.setattr("higgstune.training.run.train_stage", None)
    again = ["train", tmp_path / "run" / "recipe.yaml", "--out", tmp_path / "run", "--resume"]
    code, out, _ = command(*again)
    *_, said, following = out.splitlines()
    assert (code, said) == (3, f"verdict: {verdict}")
    assert following.startswith("next: ")
    assert "--set stages.0.warmup_steps=0.05" in following
    code, out, _ = command(*again, "--json")
    assert (code, json.loads(out)["verdict"]) == (3, json.loads(json.dumps(asdict(verdict))))
    code, _, err = command(*again[:-1])
    assert (code, "it is not usable: give another --out" in err) == (2, True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "voice")
    assert command(*again)[0] == 0


def test_a_run_without_validation_rows_is_not_judged(world: Path, tmp_path: Path) -> None:
    recordings = make_recordings(tmp_path / "recordings", clips=4)
    higgstune.prepare(recordings, tmp_path / "data", codec=world / "base" / "codec", validation_fraction=0)
    stages = [{"name": "s", "kind": "full", "max_steps": 4, "learning_rate": 1e-2}]
    result = train(recipe(world, data={"store": str(tmp_path / "data")}, stages=stages), tmp_path / "run")
    assert result.verdict is not None
    assert (result.verdict.outcome, result.usable) == ("no verdict", True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def test_modules_that_change_nothing_are_found_by_the_verification(world: Path, finished: Path, tmp_path: Path) -> None:
    adapter, probe = tmp_path / "adapter", tmp_path / "probe.safetensors"
    shutil.copytree(finished / "stage2" / "adapter", adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(key for key in weights if "layers.0.mlp.up_proj.lora_B" in key)
    save_file(weights | {name: weights[name] * 0}, adapter / "adapter_model.safetensors")
    found = load_file(finished / "stage2" / "verify" / "probe.safetensors")
    batch = {key: value for key, value in found.items() if not key.endswith("_logits")}
    logits = probe_logits(load_adapter(load_model(world / "base", device="cpu"), adapter, checksum=False), batch)
    write_probe(batch, logits, probe)
    proof = verify_in_fresh_process(
        adapter=adapter, checkpoint=str(world / "base"), revision=None, dtype="float32", device="cpu", probe=probe
    )
    assert (proof.modules, proof.idle, proof.changes_base) == (20, ["model.layers.0.mlp.up_proj"], True)


def test_old_runs_keep_their_warm_up_and_have_no_verdict(finished: Path, tmp_path: Path) -> None:
    state = json.loads((finished / "run.json").read_text())
    assert state.pop("warmup_from") == 1
    for stage in state["stages"].values():
        del stage["verdict"]
    (tmp_path / "run.json").write_text(json.dumps(state))
    read = RunState.read(tmp_path)
    assert (read.warmup_from, [stage.verdict for stage in read.stages.values()]) == (0, [None, None])


def test_an_adapter_is_continued_or_refused(world: Path, finished: Path, tmp_path: Path) -> None:
    full = [{"name": "more", "kind": "full", "max_steps": 3, "learning_rate": 5e-3}]
    train(recipe(world, stages=full, init_adapter=str(finished)), tmp_path / "more")
    first = next(entry for entry in history(tmp_path / "more", "more") if "eval_loss" in entry)
    last = [entry for entry in history(finished, "stage2") if "eval_loss" in entry][-1]
    assert first["eval_audio_loss"] == pytest.approx(last["eval_audio_loss"], abs=1e-6)
    origin = adapter_card(tmp_path / "more" / "more" / "adapter")["data"]["origin"]
    assert origin["licence"] == [{"says": "CC0-1.0", "rows": 16}]  # of both runs
    with pytest.raises(ConfigError, match="same LoRA shape"):
        train(recipe(world, stages=full, init_adapter=str(finished), lora={"r": 8, "alpha": 8}), tmp_path / "shape")
    other = tmp_path / "other"
    save_tiny_checkpoint(other, hidden_size=32)
    shutil.copytree(DEMO_CODEC, other / "codec")
    model = {"checkpoint": str(other), "device": "cpu"}
    with pytest.raises(CheckpointError, match="hidden_size"):
        train(recipe(world, stages=full, init_adapter=str(finished), model=model), tmp_path / "base")
    text = [{**full[0], "kind": "text"}]
    with pytest.raises(CheckpointError, match="cannot follow a full one"):
        train(recipe(world, stages=text, init_adapter=str(finished)), tmp_path / "text")


@pytest.mark.parametrize("shape", [{"r": 4, "alpha": 8, "rslora": True}, {"r": 4, "alpha": 8, "dora": True}])
def test_lora_variants_pass_the_same_proof(world: Path, tmp_path: Path, shape: dict[str, Any]) -> None:
    stages = [{"name": "s", "kind": "full", "max_steps": 6, "learning_rate": 5e-3, "batch_size": 2}]
    result = train(recipe(world, lora=shape, stages=stages), tmp_path / "run")
    assert result.stages["s"].verification.from_trained <= 1e-5


def test_bfloat16_weights_pass_with_their_own_tolerance(world: Path, tmp_path: Path) -> None:
    model = {"checkpoint": str(world / "base"), "device": "cpu", "dtype": "bfloat16"}
    stages = [{"name": "s", "kind": "full", "max_steps": 30, "learning_rate": 2e-2, "batch_size": 4}]
    result = train(recipe(world, model=model, stages=stages), tmp_path / "run")
    assert result.stages["s"].verification.tolerance == 5e-4


def test_a_store_of_another_codec_is_refused(world: Path, tmp_path: Path) -> None:
    store = tmp_path / "data"
    shutil.copytree(world / "data", store)
    index = json.loads((store / "store.json").read_text())
    index["info"]["codec_revision"] = "other"
    (store / "store.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="prepare the data with that codec"):
        train(recipe(world, data={"store": str(store)}), tmp_path / "run")


def test_an_adapter_speaks_from_its_folder_alone(finished: Path, tmp_path: Path) -> None:
    assert find_adapter(finished) == finished / "stage2" / "adapter"
    assert find_adapter(finished / "stage1") == finished / "stage1" / "adapter"
    clip = load(finished, device="cpu").speak("Hello there.", max_seconds=0.4)
    waveform, rate = soundfile.read(clip.save(tmp_path / "new" / "x.wav"))
    assert rate == clip.sample_rate == 24_000
    assert 0 < len(waveform) == len(clip.waveform) <= 0.4 * rate


def test_a_wrong_base_is_refused(finished: Path, tmp_path: Path) -> None:
    other = save_tiny_checkpoint(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="num_hidden_layers 2"):
        load_adapter(load_model(other, device="cpu"), finished / "stage2" / "adapter")
    moved = tmp_path / "adapter"
    shutil.copytree(finished / "stage2" / "adapter", moved)
    for name in ("adapter_config.json", "higgstune.json"):
        (moved / name).write_text((moved / name).read_text().replace("/base", "/gone"))
    with pytest.raises(CheckpointError, match="--model"):
        load(moved)


def test_the_real_codec_class_goes_the_same_way(tmp_path: Path) -> None:
    """A small random `HiggsAudioV2TokenizerModel`: prepare, train, speak."""
    save_tiny_checkpoint(tmp_path / "base")
    save_tiny_codec(tmp_path / "base" / "codec")
    recordings = make_recordings(tmp_path / "recordings", clips=4)
    higgstune.prepare(recordings, tmp_path / "data", model=tmp_path / "base", validation_fraction=0.2)
    stages = [{"name": "s", "kind": "full", "max_steps": 3, "learning_rate": 5e-3}]
    result = train(recipe(tmp_path, stages=stages), tmp_path / "run")
    clip = load(result.adapter, device="cpu").speak("Hello there.", max_seconds=0.4)
    assert clip.sample_rate == 24_000
    assert 0 < clip.seconds <= 0.4


def test_an_adapter_of_another_trainer_is_continued_with_a_warning(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = save_foreign(world / "base", tmp_path / "plain")
    theirs = renamed(plain, tmp_path / "theirs", lambda key: f"module.{key.replace('model.model.', 'model.')}")
    stages = [{"name": "s", "kind": "text", "max_steps": 2, "learning_rate": 5e-3}]
    train(recipe(world, stages=stages, init_adapter=str(theirs)), tmp_path / "run")
    assert [record.message for record in caplog.records if "has no higgstune.json" in record.message]
    heads = save_foreign(world / "base", tmp_path / "heads", in_full=["audio_lm_head"])
    with pytest.raises(CheckpointError, match="trained on audio_lm_head, which no stage trains: merge it"):
        train(recipe(world, stages=stages, init_adapter=str(heads)), tmp_path / "other")
    assert not (tmp_path / "other").exists()
