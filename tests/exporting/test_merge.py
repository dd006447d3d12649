"""Merging: a run becomes a checkpoint that loads and speaks, and its card says what it is."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from adapter_folders import card, copy_of
from commands import Command
from export_world import adapted_logits, flip_byte, gap, logits, nothing_is_left, save_base, tree
from on_cpu import CPU
from tiny_runs import recipe
from transformers import AutoTokenizer, GenerationConfig

from higgstune import BaseSpec, export, load
from higgstune.checkpoint_files import check_checksums
from higgstune.errors import CheckpointError
from higgstune.exporting import verify as check
from higgstune.model.load import load_model, load_model_and_tokenizers
from higgstune.training.run import train


@pytest.mark.processes
def test_a_run_is_merged_by_the_command(world: Path, tmp_path: Path, command: Command) -> None:
    stage = {"name": "s", "kind": "full", "max_steps": 4, "learning_rate": 5e-3, "batch_size": 2}
    train(recipe(world, stages=[stage]), tmp_path / "run")
    before = tree(world / "base"), tree(tmp_path / "run")
    code, out, err = command("export", tmp_path / "run", "--out", tmp_path / "merged", "--device", "cpu", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["format"] == "native"
    assert result["check"]["from_adapter"] <= 5e-4 < 1e-3 < result["check"]["from_base"]
    assert "merging layers 30/30" in err
    assert (tree(world / "base"), tree(tmp_path / "run")) == before
    model = load_model(tmp_path / "merged", device="cpu", dtype="float32")
    assert gap(logits(model, world), adapted_logits(world, tmp_path / "run" / "s" / "adapter")) < 5e-5
    text = (tmp_path / "merged" / "README.md").read_text()
    assert re.search(r"\| s \| full \| 4 \| eval_audio_loss \d", text)
    code, _, err = command("export", tmp_path / "run", "--out", tmp_path / "merged")
    assert code == 2
    assert "is not overwritten" in err


def test_the_folder_has_all_that_a_checkpoint_has(world: Path, merged: Path) -> None:
    names = {path.relative_to(merged).as_posix() for path in merged.rglob("*") if path.is_file()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "LICENSE", "README.md", "higgstune.json", "codec/config.json",
        "codec/decoder.safetensors", "codec/model.safetensors", "codec/LICENSE",
    }  # fmt: skip
    assert (merged / "LICENSE").read_text() == "The terms of the base."
    assert merged.stat().st_mode & 0o777 == (world / "base").stat().st_mode & 0o777
    loaded = load_model_and_tokenizers(merged, device="cpu")
    assert loaded.codec == str(merged / "codec")
    assert GenerationConfig.from_pretrained(merged).eos_token_id == loaded.config.eos_token_id
    assert AutoTokenizer.from_pretrained(merged).chat_template


def test_the_merged_folder_speaks(merged: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(merged, tmp_path / "elsewhere")
    assert load(moved, device="cpu").speak("Hello there.", max_seconds=0.4).seconds > 0


def test_a_base_without_a_template_gets_the_native_one(world: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    (base / "LICENSE").rename(base / "LICENSE.txt")
    result = export(world / "plain" / "adapter", tmp_path / "out", base=BaseSpec(base, device="cpu"))
    expected = (world / "base" / "chat_template.jinja").read_text()
    assert (result.folder / "chat_template.jinja").read_text() == expected
    assert (result.folder / "LICENSE.txt").exists()


def test_large_weights_are_written_in_shards(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("higgstune.families.higgs_v2.export.SHARD_SIZE", "500KB")
    for format in ("native", "boson"):
        folder = export(world / "plain" / "adapter", tmp_path / format, format=format, base=CPU).folder
        shards = sorted(path.name for path in folder.glob("*.safetensors"))
        assert len(shards) > 1
        assert set(shards) < set(card(folder)["files"])
        load_model(folder, device="cpu")
        flip_byte(folder / shards[-1])
        with pytest.raises(CheckpointError, match=re.escape(shards[-1])):
            load_model(folder, device="cpu")


@pytest.mark.parametrize("damaged", ["model.safetensors", "codec/model.safetensors"])
def test_a_flipped_byte_is_reported_on_loading(merged: Path, tmp_path: Path, damaged: str) -> None:
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
    assert card(merged)["files"].keys() == {"model.safetensors", "codec/decoder.safetensors", "codec/model.safetensors"}
    assert card(merged)["adapter"]["stages"][1]["steps"] == 300
    licence = [{"says": "CC-BY-4.0", "rows": 4}, {"says": None, "rows": 2}]
    assert card(merged)["adapter"]["data"]["origin"]["licence"] == licence
    for name in ("higgstune.json", "README.md", "config.json"):  # it is passed on to strangers
        assert str(world) not in (merged / name).read_text()


def test_the_card_says_what_a_stranger_must_know(world: Path, merged: Path) -> None:
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
        "validation clips of the store data", "must have consented", "- source of the recordings: phone\n",
        "- licence of the recordings: CC-BY-4.0 (4 rows); not stated (2 rows)\n",
        "\nConsent: not stated *(to be filled in)*.",
    ):  # fmt: skip
        assert part in text, part


def test_an_adapter_without_records_is_merged_and_says_so(world: Path, tmp_path: Path) -> None:
    adapter = copy_of(world / "plain" / "adapter", tmp_path / "adapter")
    kept = {key: card(adapter)[key] for key in ("codec", "codec_revision")}
    (adapter / "higgstune.json").write_text(json.dumps(kept))
    base = save_base(tmp_path / "mine")
    (base / "LICENSE").unlink()
    shutil.rmtree(base / "codec")
    result = export(adapter, tmp_path / "out", data=world / "data", base=BaseSpec(base, device="cpu"))
    text = (result.folder / "README.md").read_text()
    assert "Stages: not recorded" in text
    assert "| train | not recorded | not recorded |" in text
    assert "- licence of the recordings: not stated\n" in text
    assert "[codec/LICENSE]" in text
    assert (result.folder / "codec" / "model.safetensors").exists()  # the adapter's, as the base brings none


def test_a_codec_that_has_moved_with_its_base_is_found(world: Path, tmp_path: Path) -> None:
    for run in ("one", "other"):  # beside runs that are not the adapter's
        (tmp_path / run).mkdir()
        (tmp_path / run / "run.json").write_text('{"status": "not usable"}')
    base = shutil.copytree(world / "base", tmp_path / "base")
    adapter = copy_of(world / "plain" / "adapter", tmp_path / "voices" / "adapter", codec="/gone/codec")
    result = export(adapter, tmp_path / "out", base=BaseSpec(base, device="cpu"))
    assert (result.folder / "codec" / "model.safetensors").exists()


def test_the_command_exits_with_2_for_wrong_input_and_1_for_failed_work(
    world: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = command("export", "--help")
    assert code == 0
    assert "Example: higgstune export" in out
    code, _, err = command("export", "/no/where", "--out", tmp_path / "out")
    assert code == 2
    assert "neither an adapter" in err
    monkeypatch.setitem(check.TOLERANCE, "float32", 0.0)
    code, _, err = command("export", world / "plain" / "adapter", "--out", tmp_path / "out", "--device", "cpu")
    assert code == 1
    assert "it was not kept" in err
    assert nothing_is_left(tmp_path / "out")
