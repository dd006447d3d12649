"""Higgs TTS 3 through every verb, on the golden checkpoint with its licence files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command
from safetensors.torch import load_file
from tiny_checkpoint import save_tiny_checkpoint
from tiny_runs import DEMO_CODEC, forked_proofs, make_recordings  # noqa: F401
from tts3 import NEEDED, copy_base, stored

import higgstune
from higgstune.batch.collate import pack
from higgstune.batch.dataset import RowExamples
from higgstune.config.recipe import Recipe, parse_recipe
from higgstune.data.audio import origin_of
from higgstune.data.store import CodeStore
from higgstune.errors import CheckpointError, ConfigError, DataError, HiggstuneError
from higgstune.exporting.layouts import write_checkpoint
from higgstune.families import read_layout
from higgstune.families.base import base_of
from higgstune.families.sampling import Sampling
from higgstune.generate.engine import generate
from higgstune.model.adapters import load_adapter
from higgstune.model.load import load_model, load_model_and_tokenizers
from higgstune.planning.report import plan
from higgstune.training.run import train
from higgstune.training.trainer import HiggsAudioTrainer

pytestmark = [NEEDED, pytest.mark.processes]
CPU = higgstune.BaseSpec(device="cpu")
PREFIX = "tied.embedding.modality_embeddings.0.model."
TABLE = "tied.embedding.modality_embeddings.0.embedding.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tts3")
    copy_base(folder / "base")
    recordings = make_recordings(folder / "recordings", step=0, glide=0)
    for file in recordings.glob("*1.txt"):
        file.write_text(f"<|emotion:elation|>{file.read_text()}")
    higgstune.prepare(
        recordings, folder / "data", model=folder / "base", references="same_speaker", speaker="anna",
        validation_fraction=0.2,
    )  # fmt: skip
    return folder


def recipe(world: Path, *stages: dict[str, Any], **changes: Any) -> Recipe:
    stage = {"name": "voice", "max_steps": 4, "learning_rate": 1e-2, "batch_size": 4}
    tree: dict[str, Any] = {
        "model": {
            "family": "higgs_tts_3", "checkpoint": str(world / "base"), "device": "cpu", "dtype": "float32",
        },
        "data": {"store": str(world / "data")},
        "lora": {"r": 4, "alpha": 8},
        "stages": [stage | part for part in stages or ({},)],
        "evaluation": {"clips": 1},
        "log_steps": 1, "eval_steps": 2, "save_steps": 2,
    }  # fmt: skip
    return parse_recipe(tree | changes, where="test")


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    stages = {"name": "first"}, {"name": "second", "audio_embedding": "full"}
    train(recipe(world, *stages, evaluation={"clips": 0}), world / "run")
    return world / "run"


def test_prepare_keeps_texts_and_encodes_with_the_codec_inside(world: Path) -> None:
    store = CodeStore.open(world / "data")
    assert store.info.model_type == "higgs_multimodal_qwen3"
    assert store.info.codec_revision == load_model_and_tokenizers(world / "base", device="cpu").audio_tokenizer.revision
    texts = store.metadata["text"].to_pylist()
    assert any(text.startswith("<|emotion:elation|>") for text in texts)
    assert not any(text.endswith(".") for text in texts)  # none was added
    rows = list(store.split("train"))
    assert all(row.reference_codes is None or len(row.reference_codes) >= 25 for row in rows)
    assert {row.reference_id is not None for row in rows} == {True}
    found = higgstune.inspect_row(world / "data", 0, model=world / "base")
    assert found.prompt.startswith("<|tts|><|ref_text|>")
    assert found.prompt.endswith("<|audio|>[audio]")


def test_prepare_refuses_other_control_tokens_conversations_and_scenes(world: Path, tmp_path: Path) -> None:
    clip = str(world / "recordings" / "clip7.wav")
    other = str(world / "recordings" / "clip6.wav")
    rows = [
        {"audio": clip, "text": "<|emotion:calm|>Hello"}, {"audio": other, "text": "<|tts|>Hello"},
        {"messages": [{"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": [{"type": "audio", "url": clip}]}]},
        {"audio": clip, "text": "Hello", "reference_audio": str(world / "recordings" / "clip0.wav"),
         "reference_text": "short"},
        {"audio": other, "text": "Good."},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    higgstune.prepare(tmp_path / "rows.jsonl", tmp_path / "data", model=world / "base", allow_outside=True)
    refused = [json.loads(line) for line in (tmp_path / "data" / "rejected.jsonl").read_text().splitlines()]
    messages = " | ".join(item["message"] for item in refused)
    assert "<|emotion:calm|>, which the model has not as a tag; did you mean '<|emotion:shame|>'" in messages
    assert "<|tts|>" in messages
    assert "takes no conversations" in messages
    assert "a reference needs 1 s" in messages
    assert len(refused) == 4
    loaded = load_model_and_tokenizers(world / "base", device="cpu")
    row = next(iter(CodeStore.open(tmp_path / "data").split("train")))
    with pytest.raises(DataError, match="Higgs TTS 3 has no scenes"):
        RowExamples([replace(row, scene="In a cave.")], loaded.prompter, "none")[0]


def test_what_the_family_lacks_is_an_error_that_names_it(world: Path) -> None:
    for stage, message in (
        ({"kind": "text"}, "Higgs TTS 3 has no 'text': one of full"),
        ({"text_targets": "assistant", "text_weight": 1}, "Higgs TTS 3 has no 'assistant': one of transcript, none"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipe(world, stage)
    for key, value in (("audio_attention", True), ("whisper", "large-v3")):
        with pytest.raises(ConfigError, match=f"model.{key}: Higgs TTS 3 has no such extension"):
            recipe(world, model={"family": "higgs_tts_3", key: value})
    with pytest.raises(ConfigError, match="Higgs TTS 3 has no scenes"):
        recipe(world, data={"store": "x", "reference": "scene"})
    with pytest.raises(ConfigError, match=r"Higgs Audio v2 trains no embedding"):
        recipe(world, {"kind": "full", "audio_embedding": "full"}, model={"family": "higgs_audio_v2"})


def test_a_store_of_another_family_is_refused_with_the_command_for_the_right_one(world: Path, tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "v2")
    (tmp_path / "v2" / "codec").symlink_to(DEMO_CODEC)
    higgstune.prepare(world / "recordings", tmp_path / "data", model=tmp_path / "v2", limits=())
    command = rf"higgs_audio_v2, the base to Higgs TTS 3.*prepare RECORDINGS --model {world / 'base'} --out"
    with pytest.raises(CheckpointError, match=command):
        train(recipe(world, data={"store": str(tmp_path / "data")}), tmp_path / "run")
    with pytest.raises(CheckpointError, match=command):
        higgstune.inspect_row(tmp_path / "data", 0, model=world / "base")
    with pytest.raises(DataError, match="codec revision"):
        higgstune.prepare(world / "recordings", tmp_path / "data", model=world / "base")


def test_training_is_packed_proven_and_keeps_the_table_frozen_unless_it_is_opened(world: Path, run: Path) -> None:
    first = load_file(run / "first" / "adapter" / "adapter_model.safetensors")
    second = load_file(run / "second" / "adapter" / "adapter_model.safetensors")
    [table] = second.keys() - first.keys()
    assert table == "base_model.model.audio_table.weight"  # one tensor, embedding and head
    assert len(first) == 2 * 7 * 3
    assert second[table].dtype == torch.float32
    base = stored(world / "base")[TABLE].float()
    assert 0 < (second[table] - base).abs().max() < 0.1
    state = json.loads((run / "run.json").read_text())
    assert [stage["verification"]["modules"] for stage in state["stages"].values()] == [21, 22]


def test_a_pack_gives_the_loss_of_each_clip_with_lora_and_table(world: Path, run: Path) -> None:
    loaded = load_model_and_tokenizers(world / "base", device="cpu")
    model = load_adapter(loaded.model, run / "second" / "adapter")
    rows = RowExamples(CodeStore.open(world / "data").split("train"), loaded.prompter, "none")
    loaded.family.pack_forward(loaded.model)
    examples = [rows[index] for index in range(4)]
    with torch.no_grad():
        together = model(**pack(examples))["audio_loss"]
        alone = sum(model(**pack([example]))["audio_loss"] for example in examples)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_it_speaks_with_and_without_reference_long_texts_and_tags(world: Path, run: Path) -> None:
    voice = higgstune.load(run, device="cpu")
    clip = world / "recordings" / "clip7.wav"
    assert voice.speak("<|emotion:elation|>Hello", max_seconds=0.5).text == "<|emotion:elation|>Hello"
    spoken = [
        voice.speak("Hello", reference=clip, reference_text=words, max_seconds=0.5, seed=1).waveform
        for words in ("", "The words", "Other words")
    ]
    assert len({wave.tobytes() for wave in spoken}) == 3
    short = world / "recordings" / "clip0.wav"  # is filled up to a second
    assert len(voice.reference(short, "words").codes) == 25
    prompts: list[int] = []
    inner = voice.prompter.prompt
    voice.prompter.prompt = lambda messages, audio: prompts.append(len(audio)) or inner(messages, audio)  # type: ignore[method-assign]
    long = "Many words are spoken here in a row, one after the other. " * 9
    voice.speak(long, max_seconds=0.4)
    assert prompts[:3] == [0, 1, 1]  # later pieces imitate the first
    prompts.clear()
    voice.speak(long, reference=voice.reference(clip, "words"), max_seconds=0.4)
    assert set(prompts) == {1}
    with pytest.raises(HiggstuneError, match=r"did you mean '<.emotion:shame.>'"):
        voice.speak("<|emotion:calm|>Hello")


def test_export_is_the_released_layout_and_gives_the_logits_of_training(world: Path, run: Path) -> None:
    out = world / "merged"
    with pytest.raises(ConfigError, match=r"--format boson: Higgs TTS 3 has native, peft"):
        higgstune.export(run, out, format="boson", base=CPU)
    found = higgstune.export(run, out, dtype="float32", base=CPU)
    assert found.check.from_adapter < 1e-4
    base, merged = stored(world / "base"), stored(out)
    heads = {"tied.head.text_head.weight", "tied.head.modality_heads.0.weight"}
    assert merged.keys() == base.keys() - heads
    assert {key: value.shape for key, value in merged.items()} == {key: base[key].shape for key in merged}
    trained = load_file(run / "second" / "adapter" / "adapter_model.safetensors")["base_model.model.audio_table.weight"]
    torch.testing.assert_close(merged[TABLE], trained, rtol=0, atol=0)
    rounded = world / "rounded"
    assert higgstune.export(run, rounded, base=CPU).dtype == "bfloat16"
    merged = stored(rounded)
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    for key in merged:
        if key.startswith(PREFIX) or key in ("body.norm.weight", "tied.embedding.text_embedding.weight"):
            assert torch.equal(merged[key], base[key]), key
    index = json.loads((rounded / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == merged.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in merged.values())
    for name in ("config.json", "tokenizer.json", "LICENSE", "NOTICE"):
        assert (rounded / name).read_bytes() == (world / "base" / name).read_bytes()
    assert json.loads((rounded / "generation_config.json").read_text())["top_k"] == 50
    assert not (rounded / "codec").exists()
    card = (rounded / "README.md").read_text()
    for line in (
        "license_name: boson-higgs-tts-3-research-and-non-commercial-license", "license_link: LICENSE",
        "Derived from Higgs TTS 3, licensed from Boson AI USA, Inc.", "non-commercial",
    ):  # fmt: skip
        assert line in card
    assert higgstune.load(rounded, device="cpu").speak("Hello", max_seconds=0.5).seconds > 0.3


def test_the_untouched_base_is_written_bit_by_bit(world: Path, tmp_path: Path) -> None:
    loaded = load_model_and_tokenizers(world / "base", device="cpu", dtype="bfloat16")
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(out, loaded.model, "native", base=read_layout(world / "base"), tokenizer=loaded.tokenizer)
    base, written = stored(world / "base"), stored(out)
    assert all(torch.equal(value, base[key]) for key, value in written.items())
    published = json.loads((world / "base" / "model.safetensors.index.json").read_text())
    assert json.loads((out / "model.safetensors.index.json").read_text())["metadata"] == published["metadata"]
    again = load_model(out, device="cpu", dtype="bfloat16").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in loaded.model.state_dict().items())


def test_export_stops_where_the_base_has_no_licence(run: Path, tmp_path: Path) -> None:
    bare = copy_base(tmp_path / "bare", licensed=False)
    with pytest.raises(CheckpointError, match=r"has no LICENSE and no NOTICE"):
        higgstune.export(run, tmp_path / "out", base=higgstune.BaseSpec(bare, device="cpu"))


def test_an_adapter_alone_is_exported_and_the_doctor_finds_nothing(world: Path, run: Path) -> None:
    found = higgstune.export(run, world / "adapter", format="peft", base=CPU)
    assert (found.folder / "LICENSE").exists()
    report = higgstune.doctor(CPU, adapter=run, data=world / "data")
    assert report.passed, report.text()
    assert report.of("generation", "ok")
    base = higgstune.doctor(higgstune.BaseSpec(world / "base", device="cpu"))
    assert base.passed, base.text()


def test_it_is_evaluated_and_compared(world: Path, run: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "guard.txt").write_text("<|emotion:elation|>Hello there\nGood morning\n")
    for target in (run, world / "base"):
        code, out, err = command(
            "evaluate", str(target), "--set", str(tmp_path / "guard.txt"), "--out", str(tmp_path / target.name),
            "--device", "cpu",
        )  # fmt: skip
        assert code == 0, out + err
    code, out, err = command(
        "compare", str(tmp_path / "run"), str(tmp_path / "base"), "--out", str(tmp_path / "compared")
    )
    assert code == 0, out + err


def test_the_plan_of_a_run_with_the_table_fits(world: Path) -> None:
    found = plan(recipe(world, {"audio_embedding": "full"}), device="cpu")
    assert found.plan.stages[0].peak > 0


def test_resuming_gives_the_run_that_was_not_stopped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipe(world, {"audio_embedding": "full"})
    train(whole, tmp_path / "whole")
    steps, inner = [], HiggsAudioTrainer.training_step

    def stopping(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(HiggsAudioTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(whole, tmp_path / "cut")
    assert not (tmp_path / "cut" / "voice" / "adapter").exists()
    train(whole, tmp_path / "cut", resume=True)
    one, other = (
        load_file(tmp_path / run / "voice" / "adapter" / "adapter_model.safetensors") for run in ("whole", "cut")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(other[key], value) for key, value in one.items())


def test_one_clip_is_learnt_by_heart_and_generation_says_exactly_its_codes(world: Path) -> None:
    """T frames in, T frames out: what is trained is what generation does."""
    loaded = load_model_and_tokenizers(world / "base", device="cpu")
    rows = CodeStore.open(world / "data").split("train")
    row = min(rows, key=lambda row: len(row.codes))
    [example] = [RowExamples([row], loaded.prompter, "none")[0]]
    model = base_of(loaded.model).requires_grad_(True)
    loaded.family.pack_forward(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = pack([example])
    count = int((batch["audio_targets"] >= 0).sum())
    for _ in range(150):
        loss = model(**batch)["audio_loss"].sum() / count
        if loss < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    prompt = loaded.prompter.prompt(
        [
            {"role": "user", "content": row.reference_text},
            {"role": "assistant", "content": [{"type": "audio", "url": "reference"}]},
            {"role": "user", "content": row.text},
        ],
        [row.reference_codes],
    )
    [spoken] = generate(model, [prompt], max_frames=[100], seeds=[0], sampling=Sampling(temperature=0))
    np.testing.assert_array_equal(spoken.codes, row.codes)
    assert not spoken.hit_cap


def test_fresh_random_codes_teach_nothing(world: Path) -> None:
    """Without the shift, the labels would be among the inputs and the loss would fall."""
    loaded = load_model_and_tokenizers(world / "base", device="cpu")
    model = loaded.model.requires_grad_(True)
    loaded.family.pack_forward(model)
    row = next(iter(CodeStore.open(world / "data").split("train")))
    draw = np.random.default_rng(0)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(60):
        codes = draw.integers(0, 1024, (24, 8)).astype(np.uint16)
        example = RowExamples([replace(row, codes=codes)], loaded.prompter, "none")[0]
        batch = pack([example])
        is_code = (batch["audio_targets"] >= 0) & (batch["audio_targets"] < 1024)
        batch["audio_targets"] = batch["audio_targets"].masked_fill(~is_code, -100)
        loss = model(**batch)["audio_loss"].sum() / is_code.sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert np.mean(losses[-20:]) > np.log(1024) - 0.05


def test_it_speaks_where_the_base_has_moved(world: Path, run: Path, tmp_path: Path) -> None:
    moved = copy_base(tmp_path / "moved")
    voice = higgstune.load(run, device="cpu", base=higgstune.BaseSpec(moved))
    assert voice.speak("Hello", max_seconds=0.4).seconds > 0.3


def test_its_speech_says_where_it_comes_from_and_is_refused_as_training_data(world: Path, tmp_path: Path) -> None:
    origin = {"family": "higgs_tts_3", "licence": "boson-higgs-tts-3-research-and-non-commercial-license"}
    voice = higgstune.load(world / "base", device="cpu")
    speech = voice.speak("Hello", max_seconds=0.5)
    assert speech.generated_by == origin
    assert origin_of(speech.save(tmp_path / "recordings" / "hello.wav")) == origin
    assert origin_of(world / "recordings" / "clip0.wav") is None
    (tmp_path / "recordings" / "hello.txt").write_text("Hello")
    with pytest.raises(DataError, match="1 bad row"):
        higgstune.prepare(tmp_path / "recordings", tmp_path / "data", model=world / "base")
    [refused] = (tmp_path / "data" / "rejected.jsonl").read_text().splitlines()
    assert "is speech that higgs_tts_3 has generated" in refused
    higgstune.evaluate(world / "base", texts="en", limit=1, out=tmp_path / "evaluated", base=CPU)
    notes = [json.loads(file.read_text()) for file in (tmp_path / "evaluated").rglob("*.json")]
    assert origin in [note.get("generated_by") for note in notes if "hit_cap" in note]
