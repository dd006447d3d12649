"""Merging: the arithmetic, the proof on what was written, what is refused, and what is left untouched."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import yaml
from export_world import (
    adapted_logits,
    batch_of,
    flip_byte,
    gap,
    heard_through,
    logits,
    make_adapter,
    make_world,
    nothing_is_left,
    save_base,
    tree,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from test_cli import Command
from test_run import recipe
from tiny_codec import save_tiny_codec
from tiny_whisper import save_tiny_whisper
from transformers import AutoModel, AutoTokenizer, GenerationConfig, HiggsAudioV2ForConditionalGeneration

from higgstune import merge
from higgstune.errors import CheckpointError, ConfigError, DataError, VerificationError, WorkError
from higgstune.generate.speak import load_speaker, speak
from higgstune.model.adapters import load_adapter
from higgstune.model.checksums import check_checksums
from higgstune.model.conditioning import Conditioning, conditioning_of
from higgstune.model.convert import original_config, original_state
from higgstune.model.load import load_model, load_model_and_tokenizers, load_tokenizer
from higgstune.prompt.template import AUDIO_EOS, AUDIO_IN
from higgstune.sharing import check, layouts
from higgstune.sharing import merge as merging
from higgstune.sharing.held_out import HeldOut, held_out
from higgstune.sharing.layers import merge_layers
from higgstune.sharing.source import open_source
from higgstune.training.run import train
from higgstune.training.verify import write_probe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a store with Whisper features, a plain adapter and one with both extensions."""
    folder = make_world(tmp_path_factory.mktemp("merge"), whisper=True)
    make_adapter(folder, folder / "plain" / "adapter")
    both = Conditioning(audio_attention=True, whisper=heard_through(folder))
    make_adapter(folder, folder / "both" / "adapter", conditioning=both)
    return folder


@pytest.fixture(scope="module")
def merged(world: Path) -> Path:
    """The plain adapter, merged with all defaults."""
    return merge(world / "plain" / "adapter", world / "merged", device="cpu").folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`higgstune ...` in this process."""
    return Command(monkeypatch, capsys)


def card(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "higgstune.json").read_text())


def copy_of(adapter: Path, folder: Path, **changes: Any) -> Path:
    """An adapter elsewhere, its card changed, and without the checksum that would tell."""
    shutil.copytree(adapter, folder)
    (folder / "higgstune.json").write_text(json.dumps(card(folder) | {"card_sha256": None} | changes))
    return folder


def test_a_run_is_merged_by_the_command(world: Path, tmp_path: Path, command: Command) -> None:
    stage = {"name": "s", "kind": "full", "max_steps": 4, "learning_rate": 5e-3, "batch_size": 2}
    train(recipe(world, stages=[stage]), tmp_path / "run")
    before = tree(world / "base"), tree(tmp_path / "run")
    code, out, err = command("merge", tmp_path / "run", "--out", tmp_path / "merged", "--device", "cpu", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["layout"] == "native"
    assert result["check"]["from_adapter"] <= 5e-4 < 1e-3 < result["check"]["from_base"]
    assert "merging layers 30/30" in err
    assert (tree(world / "base"), tree(tmp_path / "run")) == before
    model = load_model(tmp_path / "merged", device="cpu", dtype="float32")
    assert gap(logits(model, world), adapted_logits(world, tmp_path / "run" / "s" / "adapter")) < 5e-5
    text = (tmp_path / "merged" / "README.md").read_text()
    assert re.search(r"\| s \| full \| 4 \| eval_audio_loss \d", text)
    code, _, err = command("merge", tmp_path / "run", "--out", tmp_path / "merged")
    assert code == 2
    assert "is not overwritten" in err


def test_the_folder_has_all_that_a_checkpoint_has(world: Path, merged: Path) -> None:
    names = {path.relative_to(merged).as_posix() for path in merged.rglob("*") if path.is_file()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "LICENSE", "README.md", "higgstune.json", "codec/config.json",
        "codec/model.safetensors", "codec/LICENSE",
    }  # fmt: skip
    assert (merged / "LICENSE").read_text() == "The terms of the base."
    assert merged.stat().st_mode & 0o777 == (world / "base").stat().st_mode & 0o777
    loaded = load_model_and_tokenizers(merged, device="cpu")
    assert loaded.codec == str(merged / "codec")
    assert GenerationConfig.from_pretrained(merged).eos_token_id == loaded.config.eos_token_id
    assert AutoTokenizer.from_pretrained(merged).chat_template


def test_the_merged_folder_speaks(merged: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(merged, tmp_path / "elsewhere")
    files = speak("Hello there.", tmp_path / "x.wav", model=moved, device="cpu", max_seconds=0.4)
    assert len(soundfile.read(files[0])[0]) > 0


def test_a_base_without_a_template_gets_the_native_one(world: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    (base / "LICENSE").rename(base / "LICENSE.txt")
    result = merge(world / "plain" / "adapter", tmp_path / "out", model=base, device="cpu")
    expected = (world / "base" / "chat_template.jinja").read_text()
    assert (result.folder / "chat_template.jinja").read_text() == expected
    assert (result.folder / "LICENSE.txt").exists()


@pytest.mark.parametrize("variant", [{"rslora": True}, {"dora": True}, {"attention": "full"}, {}])
def test_every_variant_gives_the_logits_of_base_and_adapter(
    world: Path, tmp_path: Path, variant: dict[str, Any]
) -> None:
    has = Conditioning(audio_attention=True) if "attention" in variant else None
    adapter = make_adapter(world, tmp_path / "adapter", conditioning=has, **variant)
    result = merge(adapter, tmp_path / "out", device="cpu")
    found = logits(load_model(result.folder, device="cpu", dtype="float32"), world)
    assert gap(found, adapted_logits(world, adapter)) < 5e-5
    assert gap(found, logits(load_model(world / "base", device="cpu", dtype="float32"), world)) > 0.1


def test_a_bfloat16_base_is_merged_in_float32(world: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    weights = {key: value.bfloat16() for key, value in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(world, tmp_path / "adapter", base=base)
    result = merge(adapter, tmp_path / "out", device="cpu")
    assert result.dtype == result.check.dtype == "bfloat16"
    assert json.loads((result.folder / "config.json").read_text())["dtype"] == "bfloat16"
    trained = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.audio_mlp.up_proj"
    a, b = (trained[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    key = f"{name}.weight"
    written = load_file(result.folder / "model.safetensors")[key]
    assert torch.equal(written, (weights[key].float() + 2.0 * (b @ a)).bfloat16())
    assert not torch.equal(written, weights[key] + (2.0 * (b @ a)).bfloat16())


def test_no_more_than_one_layer_is_in_float32_at_a_time(world: Path) -> None:
    model = load_adapter(load_model(world / "base", device="cpu", dtype="bfloat16"), world / "plain" / "adapter")
    wide: list[int] = []

    def count(what: str, done: int, total: int) -> None:
        weights = [part.weight for part in model.modules() if isinstance(part, torch.nn.Linear)]
        wide.append(sum(weight.dtype == torch.float32 and weight.shape[0] > 4 < weight.shape[1] for weight in weights))

    merged = merge_layers(model, torch.bfloat16, count)
    assert len(wide) == 30
    assert max(wide) == 0
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_the_dtype_of_what_is_written_can_be_chosen(world: Path, merged: Path, tmp_path: Path) -> None:
    result = merge(world / "plain" / "adapter", tmp_path / "out", dtype="bfloat16", device="cpu")
    written = load_file(result.folder / "model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    # From the float32 base, rounded once at the end.
    exact = load_file(merged / "model.safetensors")
    assert all(torch.equal(written[key], value.bfloat16()) for key, value in exact.items())
    assert 0 < result.check.from_adapter <= check.TOLERANCE["bfloat16"]
    with pytest.raises(ConfigError, match="int8"):
        merge(world / "plain" / "adapter", tmp_path / "other", dtype="int8")


def test_a_half_precision_base_asks_for_a_dtype(world: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    weights = {key: value.half() for key, value in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(world, tmp_path / "adapter", base=base)
    with pytest.raises(CheckpointError, match=r"stored as F16.*--dtype"):
        merge(adapter, tmp_path / "out", device="cpu")
    assert merge(adapter, tmp_path / "out", dtype="float32", device="cpu").dtype == "float32"


def test_large_weights_are_written_in_shards(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "SHARD_SIZE", "500KB")
    for layout in ("native", "original"):
        folder = merge(world / "plain" / "adapter", tmp_path / layout, layout=layout, device="cpu").folder
        shards = sorted(path.name for path in folder.glob("*.safetensors"))
        assert len(shards) > 1
        assert set(shards) < set(card(folder)["files"])
        load_model(folder, device="cpu")
        flip_byte(folder / shards[-1])
        with pytest.raises(CheckpointError, match=re.escape(shards[-1])):
            load_model(folder, device="cpu")


@pytest.mark.parametrize("damaged", ["model.safetensors", "codec/model.safetensors"])
def test_a_flipped_byte_is_told_where_it_is_loaded(merged: Path, tmp_path: Path, damaged: str) -> None:
    copy = shutil.copytree(merged, tmp_path / "copy")
    load_model_and_tokenizers(copy, device="cpu")
    flip_byte(copy / damaged)
    with pytest.raises(CheckpointError, match=f"{damaged} is not the file that was written"):
        load_model_and_tokenizers(copy, device="cpu")
    (copy / damaged).unlink()
    with pytest.raises(CheckpointError, match=damaged):
        check_checksums(copy)
    (copy / "higgstune.json").unlink()
    check_checksums(copy)


def test_the_folder_says_what_was_merged(world: Path, merged: Path) -> None:
    note = card(merged)["merged"]
    assert note["adapter_sha256"] == card(world / "plain" / "adapter")["weights_sha256"]
    assert note["base_fingerprint"] == card(world / "plain" / "adapter")["base_fingerprint"]
    assert card(merged)["files"].keys() == {"model.safetensors", "codec/model.safetensors"}
    assert card(merged)["adapter"]["stages"][1]["steps"] == 300
    for name in ("higgstune.json", "README.md", "config.json"):  # it is passed on to strangers
        assert str(world) not in (merged / name).read_text()


def test_the_card_tells_what_a_stranger_must_know(world: Path, merged: Path) -> None:
    _, front, text = (merged / "README.md").read_text().split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["base_model"] == "base"
    assert matter["library_name"] == "transformers"
    assert matter["license"] == "other"
    assert matter["license_link"] == "LICENSE"
    assert "higgs-audio-v2" in matter["tags"]
    note = card(world / "plain" / "adapter")
    for part in (
        "# merged", note["base_fingerprint"], note["codec_revision"], note["weights_sha256"],
        "| train | 4 | 0.25 |", "| validation | 2 | 0.125 |",
        "| stage1 | text | 40 | eval_text_loss 2.5 |", "| stage2 | full | 300 | not measured |",
        "Boson AI's community licence", "Meta's Llama 3 licence", "Apache-2.0", "[LICENSE](LICENSE)",
        "[codec/LICENSE](codec/LICENSE)", "--model THIS_FOLDER", "from_pretrained", "tolerance 5e-04",
        "validation clips of the store data", "must have agreed",
    ):  # fmt: skip
        assert part in text, part


def test_an_adapter_without_records_is_merged_and_says_so(world: Path, tmp_path: Path) -> None:
    adapter = copy_of(world / "plain" / "adapter", tmp_path / "adapter")
    kept = {key: card(adapter)[key] for key in ("codec", "codec_revision")}
    (adapter / "higgstune.json").write_text(json.dumps(kept))
    base = save_base(tmp_path / "mine")
    (base / "LICENSE").unlink()
    shutil.rmtree(base / "codec")
    result = merge(adapter, tmp_path / "out", model=base, data=world / "data", device="cpu")
    text = (result.folder / "README.md").read_text()
    assert "Stages: not recorded" in text
    assert "| train | not recorded | not recorded |" in text
    assert "[codec/LICENSE]" in text
    assert (result.folder / "codec" / "model.safetensors").exists()  # the adapter's, as the base brings none


@pytest.mark.parametrize("again", ["the same adapter", "another adapter"])
def test_merging_twice_is_refused(world: Path, merged: Path, tmp_path: Path, again: str) -> None:
    adapter, message = world / "plain" / "adapter", "is in .* already"
    if again == "another adapter":
        adapter, message = make_adapter(world, tmp_path / "adapter", strength=0.1), "is a merged checkpoint"
    with pytest.raises(CheckpointError, match=message):
        merge(adapter, tmp_path / "out", model=merged, device="cpu")
    assert nothing_is_left(tmp_path / "out")


def test_a_run_that_was_begun_on_a_merged_checkpoint_is_merged_into_it(
    world: Path, merged: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(world, tmp_path / "adapter", base=merged)
    result = merge(adapter, tmp_path / "out", device="cpu")
    found = logits(load_model(result.folder, device="cpu"), world)
    assert gap(found, logits(load_adapter(load_model(merged, device="cpu"), adapter), world)) < 5e-5
    assert card(result.folder)["merged"]["base_merged"] == card(merged)["merged"]


def test_a_base_in_the_original_layout_is_the_same_base(world: Path, merged: Path, tmp_path: Path) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    model = load_model(world / "base", device="cpu", dtype="float32")
    save_file(original_state(model.state_dict()), base / "model.safetensors")
    tokenizer = load_tokenizer(world / "base", model.config)
    tokens = {token: tokenizer.convert_tokens_to_ids(token) for token in (AUDIO_IN, AUDIO_EOS)}
    (base / "config.json").write_text(json.dumps(original_config(model.config, tokens=tokens)))
    for layout in ("native", "original"):
        result = merge(world / "plain" / "adapter", tmp_path / layout, model=base, layout=layout, device="cpu")
        expected = load_file(merged / "model.safetensors")
        if layout == "original":
            expected = original_state(expected)
        written = load_file(result.folder / "model.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[key], value) for key, value in expected.items())


def test_another_base_is_refused(world: Path, tmp_path: Path) -> None:
    same_shape = save_base(tmp_path / "other", seed=5)
    with pytest.raises(CheckpointError, match="fingerprint"):
        merge(world / "plain" / "adapter", tmp_path / "out", model=same_shape, device="cpu")
    adapter = copy_of(world / "plain" / "adapter", tmp_path / "moved")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone"}))
    with pytest.raises(CheckpointError, match="--model"):
        merge(adapter, tmp_path / "out", device="cpu")
    assert nothing_is_left(tmp_path / "out")


def test_another_codec_is_refused(world: Path, tmp_path: Path) -> None:
    codec = save_tiny_codec(tmp_path / "codec")
    with pytest.raises(CheckpointError, match="another codec"):
        merge(world / "plain" / "adapter", tmp_path / "out", codec=codec, device="cpu")
    other = tmp_path / "data"
    shutil.copytree(world / "data", other)
    index = json.loads((other / "store.json").read_text())
    index["info"]["codec_revision"] = "0123456789abcdef"
    (other / "store.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="--data"):
        merge(world / "plain" / "adapter", tmp_path / "out", data=other, device="cpu")
    assert nothing_is_left(tmp_path / "out")


def test_a_codec_that_has_moved_with_its_base_is_found(world: Path, tmp_path: Path) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    adapter = copy_of(world / "plain" / "adapter", tmp_path / "adapter", codec="/gone/codec")
    result = merge(adapter, tmp_path / "out", model=base, device="cpu")
    assert (result.folder / "codec" / "model.safetensors").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_key(path: Path) -> None:
    weights = load_file(path)
    del weights[sorted(weights)[-1]]
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("adapter/adapter_model.safetensors", truncate, "truncated"),
        ("adapter/adapter_model.safetensors", flip_byte, "checksum differs"),
        ("adapter/adapter_model.safetensors", drop_a_key, "checksum differs"),
        ("adapter/adapter_model.safetensors", Path.unlink, "missing"),
        ("adapter/adapter_config.json", Path.unlink, "neither an adapter"),
        ("base/model.safetensors", truncate, "truncated"),
        ("base/model.safetensors", drop_a_key, "text_lm_head"),
        ("base/tokenizer.json", Path.unlink, r"tokenizer\.json is missing"),
    ],
)
def test_damage_is_one_clear_error_and_leaves_nothing(
    world: Path, tmp_path: Path, part: str, damage: Any, message: str
) -> None:
    copy_of(world / "plain" / "adapter", tmp_path / "adapter")
    shutil.copytree(world / "base", tmp_path / "base")
    damage(tmp_path / part)
    with pytest.raises(CheckpointError, match=message):
        merge(tmp_path / "adapter", tmp_path / "out", model=tmp_path / "base", device="cpu")
    assert nothing_is_left(tmp_path / "out")


def test_a_key_too_few_is_told_where_no_checksum_was_recorded(world: Path, tmp_path: Path) -> None:
    adapter = copy_of(world / "plain" / "adapter", tmp_path / "adapter", weights_sha256=None)
    drop_a_key(adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit this base: 1 tensors"):
        merge(adapter, tmp_path / "out", device="cpu")


def test_folders_that_exist_are_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="is not overwritten"):
        merge(world / "plain" / "adapter", tmp_path / "out", device="cpu")
    with pytest.raises(ConfigError, match="would lie inside"):
        merge(world / "plain" / "adapter", world / "base" / "merged", device="cpu")


def test_what_was_not_merged_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, out = world / "plain" / "adapter", tmp_path / "out"
    for message, broken in {
        "hardly differs from the base": lambda layers, dtype, show: layers.unload(),
        "is not the base with its adapter": forget_one_layer,
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(merging, "merge_layers", broken)
            with pytest.raises(VerificationError, match=message):
                merge(adapter, out, device="cpu")
        assert nothing_is_left(out)


def forget_one_layer(model: Any, dtype: torch.dtype, show: Any) -> Any:
    first, *others = [part for part in model.modules() if isinstance(part, LoraLayer)]
    assert isinstance(first, LoraLayer)
    for layer in others:
        layer.merge()  # type: ignore[operator]
    return model.unload()


def test_a_layer_that_computes_something_else_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.merge", lambda self, **options: self.set_scale("default", 1.001))
    with pytest.raises(VerificationError, match=r"merging model\.layers\.0\.\S+ changed what it computes"):
        merge(world / "plain" / "adapter", tmp_path / "out", device="cpu")
    assert nothing_is_left(tmp_path / "out")


def test_what_is_compared_is_what_lies_on_the_disk(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_badly(folder: Path, *rest: Any, **options: Any) -> None:
        layouts.write_checkpoint(folder, *rest, **options)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.audio_mlp.up_proj.weight"] *= 1.01
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merging, "write_checkpoint", write_badly)
    with pytest.raises(VerificationError, match="it was not kept"):
        merge(world / "plain" / "adapter", tmp_path / "out", device="cpu")
    assert nothing_is_left(tmp_path / "out")


def test_an_adapter_that_rounding_drowns_is_refused(world: Path, tmp_path: Path) -> None:
    weak = make_adapter(world, tmp_path / "adapter", strength=3e-4)
    assert merge(weak, tmp_path / "exact", dtype="float32", device="cpu").check.from_base > 1e-3
    with pytest.raises(VerificationError, match="--dtype float32"):
        merge(weak, tmp_path / "rounded", dtype="bfloat16", device="cpu")
    nothing = make_adapter(world, tmp_path / "nothing", strength=0)
    with pytest.raises(VerificationError, match="hardly differs"):
        merge(nothing, tmp_path / "none", device="cpu")
    broken = make_adapter(world, tmp_path / "broken", strength=float("nan"))
    with pytest.raises(CheckpointError, match="cannot be merged into"):
        merge(broken, tmp_path / "none", device="cpu")
    assert nothing_is_left(tmp_path / "none")


def test_an_adapter_that_is_half_lost_in_rounding_is_refused() -> None:
    """Within the tolerance, and off the base, but no nearer to base + adapter than to the base."""
    held = HeldOut({}, 1, "clips")
    base, adapted = ({"audio_logits": torch.full((4, 8), value)} for value in (0.0, 0.2))
    for merged, message in ((0.15, None), (0.13, "rounding drowns"), (0.45, "not the base with"), (0.04, "hardly")):
        found = {"audio_logits": torch.full((4, 8), merged)}
        if message is None:
            assert check.check_merged(found, adapted, base, dtype="bfloat16", held_out=held).from_base > 0.1
            continue
        with pytest.raises(VerificationError, match=message):
            check.check_merged(found, adapted, base, dtype="bfloat16", held_out=held)
    unknown = {"audio_logits": torch.full((4, 8), float("nan"))}
    with pytest.raises(VerificationError):
        check.check_merged(unknown, adapted, base, dtype="float32", held_out=held)


def test_a_full_disk_leaves_nothing(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "copy_codec", full)
    with pytest.raises(WorkError, match="No space left"):
        merge(world / "plain" / "adapter", tmp_path / "out", device="cpu")
    assert nothing_is_left(tmp_path / "out")


def test_where_the_store_has_gone_the_runs_probe_is_compared_on(world: Path, tmp_path: Path) -> None:
    gone = {"data": {"store": "/gone/data"}, "recipe": {}}
    adapter = copy_of(world / "plain" / "adapter", tmp_path / "s" / "adapter", **gone)
    with pytest.raises(DataError, match=r"/gone/data is not here.*--data"):
        merge(adapter, tmp_path / "out", device="cpu")
    given = merge(adapter, tmp_path / "given", data=world / "data", device="cpu")
    assert (given.check.clips, given.check.origin) == (3, "validation clips of the store data")
    (tmp_path / "s" / "verify").mkdir()
    probe, model = tmp_path / "s" / "verify" / "probe.safetensors", load_model(world / "base", device="cpu")
    write_probe(model, batch_of(model, world), probe)
    probed = merge(adapter, tmp_path / "probed", device="cpu")
    assert (probed.check.clips, probed.check.origin) == (6, "the clips of the run's own verification")
    probe.write_bytes(probe.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        merge(adapter, tmp_path / "out", device="cpu")
    assert nothing_is_left(tmp_path / "out")


def test_every_clip_is_looked_at(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("higgstune.sharing.held_out._POSITIONS", 9)
    source = open_source(world / "plain" / "adapter")
    loaded = load_model_and_tokenizers(world / "base", device="cpu")
    batch = held_out(source, loaded).batch
    clips, length = batch["input_ids"].shape
    for kind in ("audio", "text"):
        assert len(batch[f"{kind}_positions"]) == len(batch[f"{kind}_targets"]) == 9
        assert set((batch[f"{kind}_positions"] // length).tolist()) == set(range(clips))


def test_extensions_go_to_the_extended_layout(world: Path, tmp_path: Path) -> None:
    adapter = world / "both" / "adapter"
    result = merge(adapter, tmp_path / "out", device="cpu")
    assert result.layout == "extended"
    config = json.loads((result.folder / "config.json").read_text())
    assert config["model_type"] == "higgs_audio_v2_extended"
    for plain in (HiggsAudioV2ForConditionalGeneration, AutoModel):  # neither leaves out what it does not know
        with pytest.raises(ValueError, match=r"higgstune\.load_model|higgs_audio_v2_extended"):
            plain.from_pretrained(result.folder)
    model = load_model(result.folder, device="cpu")
    assert conditioning_of(model).audio_attention
    assert gap(logits(model, world), adapted_logits(world, adapter)) < 5e-5
    text = (result.folder / "README.md").read_text()
    assert "references in the scene" in text
    assert load_speaker(result.folder, device="cpu").reference_place == "scene"
    assert "audio self-attention and a projector for features of the Whisper encoder whisper" in text
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "higgstune"


def test_extensions_go_to_the_original_layout_with_their_encoder(world: Path, tmp_path: Path) -> None:
    adapter = world / "both" / "adapter"
    result = merge(adapter, tmp_path / "out", layout="original", device="cpu")
    loaded = load_model_and_tokenizers(result.folder, device="cpu")
    assert gap(logits(loaded.model, world), adapted_logits(world, adapter)) < 5e-5
    assert loaded.whisper is not None
    assert loaded.whisper.revision == heard_through(world).revision
    # A merged original checkpoint can be the base of another run, and of another merge.
    further = make_adapter(world, tmp_path / "further", base=result.folder)
    again = merge(further, tmp_path / "again", layout="original", device="cpu")
    assert load_model_and_tokenizers(again.folder, device="cpu").whisper is not None


@pytest.mark.parametrize(("encoder", "message"), [("gone", "brings its Whisper encoder"), ("other", "is not the one")])
def test_an_encoder_that_has_gone_or_changed_is_told(world: Path, tmp_path: Path, encoder: str, message: str) -> None:
    save_tiny_whisper(tmp_path / "other", seed=3)
    shape = heard_through(world).model_copy(update={"checkpoint": str(tmp_path / encoder)})
    has = Conditioning(audio_attention=True, whisper=shape)
    changes = {"conditioning": has.model_dump(), "data": {}, "recipe": {}}  # no store: compared on the probe
    adapter = copy_of(world / "both" / "adapter", tmp_path / "s" / "adapter", **changes)
    model = load_adapter(load_model(world / "base", device="cpu"), adapter)
    (tmp_path / "s" / "verify").mkdir()
    write_probe(model, batch_of(model, world), tmp_path / "s" / "verify" / "probe.safetensors")
    assert merge(adapter, tmp_path / "extended", device="cpu").layout == "extended"  # it only names the encoder
    with pytest.raises(CheckpointError, match=message):
        merge(adapter, tmp_path / "out", layout="original", device="cpu")
    assert nothing_is_left(tmp_path / "out")


def test_native_takes_no_extensions_unless_they_are_dropped(world: Path, tmp_path: Path) -> None:
    adapter, out = world / "both" / "adapter", tmp_path / "out"
    with pytest.raises(ConfigError, match=r"model\.layers\.\*\.audio_attn.*audio_encoder_proj.*--drop-modules"):
        merge(adapter, out, layout="native", device="cpu")
    assert nothing_is_left(out)
    result = merge(adapter, out, layout="native", drop_modules=True, device="cpu")
    assert result.dropped == (
        "model.layers.*.audio_attn", "model.layers.*.audio_post_audio_attn_layer_norm", "model.audio_encoder_proj",
    )  # fmt: skip
    assert result.loss is not None
    assert result.loss["with"] != result.loss["without"]
    text = (out / "README.md").read_text()
    assert "It is not all that was trained" in text
    assert f"{result.loss['without']:.3f} without" in text
    HiggsAudioV2ForConditionalGeneration.from_pretrained(out, use_text_head=True)
    assert not conditioning_of(load_model(out, device="cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "extended"}, "no effect"),
        ({"layout": "native", "drop_modules": True}, "no effect"),
        ({"drop_modules": True}, "goes with --layout native"),
        ({"layout": "original", "drop_modules": True}, "goes with --layout native"),
        ({"layout": "gguf"}, "native, extended, original"),
    ],
)
def test_options_without_effect_are_refused(world: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge(world / "plain" / "adapter", tmp_path / "out", device="cpu", **options)


def test_the_command_tells_input_from_work(
    world: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = command("merge", "--help")
    assert code == 0
    assert "Example: higgstune merge" in out
    code, _, err = command("merge", "/no/where", "--out", tmp_path / "out")
    assert code == 2
    assert "neither an adapter" in err
    monkeypatch.setitem(check.TOLERANCE, "float32", 0.0)
    code, _, err = command("merge", world / "plain" / "adapter", "--out", tmp_path / "out", "--device", "cpu")
    assert code == 1
    assert "it was not kept" in err
    assert nothing_is_left(tmp_path / "out")
