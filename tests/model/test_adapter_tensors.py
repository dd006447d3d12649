"""Adapters of other trainers: known names are mapped, everything else is refused with the module named."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_adapters import configured, renamed, save_foreign
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny_checkpoint

from higgstune.config.recipe import Lora
from higgstune.errors import CheckpointError
from higgstune.exporting.source import open_source
from higgstune.families.higgs_v2.family import FAMILY
from higgstune.inputs import BaseSpec
from higgstune.model.adapter_tensors import copy_for_peft, is_zero, plain_key
from higgstune.model.adapters import adapter_state, continue_lora, load_adapter
from higgstune.model.load import load_model
from higgstune.peft_compat import PeftModel

HEADS = ("audio_lm_head", "text_lm_head")
TABLES = ("embed_tokens", "embed_audio_tokens.embed_audio_tokens")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_foreign(base, tmp_path_factory.mktemp("plain") / "adapter")


@pytest.fixture(scope="module")
def in_full(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that trained heads and embeddings in full."""
    return save_foreign(base, tmp_path_factory.mktemp("full") / "adapter", in_full=[*HEADS, *TABLES])


def loaded(base: Path, adapter: Path, dtype: str = "float32") -> PeftModel:
    return load_adapter(load_model(base, device="cpu", dtype=dtype), adapter)


def assert_same_state(base: Path, found: Path, expected: Path) -> None:
    a, b = (adapter_state(loaded(base, folder)) for folder in (found, expected))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def original(key: str) -> str:
    """The name in the original code."""
    for native, name in {
        "model.model.embed_audio_tokens.embed_audio_tokens.": "model.audio_codebook_embeddings.",
        "model.model.": "model.",
        "model.audio_lm_head": "model.audio_decoder_proj.audio_lm_head",
        "model.text_lm_head": "model.audio_decoder_proj.text_lm_head",
    }.items():
        if f"base_{native}" not in key and native in key:
            return key.replace(native, name)
    return key


RENAMINGS: dict[str, Callable[[str], str]] = {
    "DDP around the model": lambda key: key.replace("base_model.model.", "base_model.model.module.", 1),
    "DDP around the peft model": lambda key: f"module.{key}",
    "DDP around the layers": lambda key: key.replace("model.model.", "model.model.module.", 1),
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "torch.compile of each layer": lambda key: key.replace(".self_attn.", "._orig_mod.self_attn."),
    "FSDP": lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."),
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight") if ".lora_" in key else key,
    "another adapter's name": lambda key: key.replace(".weight", ".anna.weight") if ".lora_" in key else key,
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "twice the prefix": lambda key: f"base_model.model.{key}",
    "the original code": original,
    "the original code below DDP": lambda key: f"module.{original(key)}",
    "the original code without prefix": lambda key: original(key).removeprefix("base_model.model."),
}


@pytest.mark.parametrize("change", RENAMINGS.values(), ids=RENAMINGS)
def test_names_of_other_trainers_are_mapped(
    base: Path, plain: Path, in_full: Path, tmp_path: Path, change: Callable[[str], str]
) -> None:
    for name, adapter in {"plain": plain, "in full": in_full}.items():
        assert_same_state(base, renamed(adapter, tmp_path / name, change), adapter)


def test_the_bases_own_copies_beside_trained_ones_are_left_out(base: Path, in_full: Path, tmp_path: Path) -> None:
    found = renamed(in_full, tmp_path / "a", lambda k: k.replace("_lm_head.", "_lm_head.modules_to_save.default."))
    weights = load_file(found / "adapter_model.safetensors")
    own = {k.replace("modules_to_save.default", "original_module"): v * 0 for k, v in weights.items() if "_head." in k}
    assert len(own) == len(HEADS)
    save_file(weights | own, found / "adapter_model.safetensors")
    assert_same_state(base, found, in_full)
    alone = shutil.copytree(found, tmp_path / "alone")
    save_file(
        {k: v for k, v in (weights | own).items() if ".modules_to_save." not in k}, alone / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match="original_module"):
        loaded(base, alone)


def test_names_in_the_configuration_are_mapped_too(base: Path, in_full: Path, tmp_path: Path) -> None:
    theirs = ["audio_decoder_proj.audio_lm_head", "text_lm_head", "embed_tokens", "audio_codebook_embeddings"]
    layers = [f"layers.{index}.self_attn.{name}_proj" for index in (0, 1) for name in "qv"]
    changed = renamed(in_full, tmp_path / "a", original, modules_to_save=theirs, target_modules=layers)
    assert_same_state(base, changed, in_full)
    both = ["audio_decoder_proj", "embed_tokens", "audio_codebook_embeddings"]  # a module that this base has not
    assert_same_state(
        base, renamed(in_full, tmp_path / "d", original, modules_to_save=both, target_modules=layers), in_full
    )
    outer = renamed(in_full, tmp_path / "b", str, modules_to_save=["lm_head", "embed_tokens", "embed_audio_tokens"])
    assert_same_state(base, outer, in_full)  # a table inside of a module of the same name, which peft takes twice
    wrapped = [f"module.model.{name}" for name in layers]
    assert_same_state(base, renamed(in_full, tmp_path / "c", str, target_modules=wrapped), in_full)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("module.base_model.model.audio_lm_head.modules_to_save.default.weight", "audio_lm_head.weight"),
        ("base_model.model.audio_lm_head.modules_to_save.weight", "audio_lm_head.weight"),
        (
            "base_model.model.layers.0.mlp.up_proj.lora_magnitude_vector.default.weight",
            "model.layers.0.mlp.up_proj.lora_magnitude_vector",
        ),
        (  # a layer of another part of the original model, not one of its own
            "base_model.model.audio_tower.layers.0.self_attn.q_proj.lora_A.weight",
            "audio_tower.layers.0.self_attn.q_proj.lora_A.weight",
        ),
    ],
)
def test_single_names(key: str, expected: str) -> None:
    assert plain_key(key, FAMILY) == f"base_model.model.{expected}"


def test_an_adapter_of_zeros_is_known_by_its_tensors(base: Path, plain: Path, in_full: Path, tmp_path: Path) -> None:
    silent = shutil.copytree(plain, tmp_path / "zero")
    weights = load_file(silent / "adapter_model.safetensors")
    save_file({k: v * 0 if "lora_B" in k else v for k, v in weights.items()}, silent / "adapter_model.safetensors")
    assert [is_zero(folder) for folder in (silent, plain, in_full)] == [True, False, False]
    with pytest.raises(CheckpointError, match="all of its LoRA is zero: export another one"):
        open_source(silent, BaseSpec(base))


def test_dora_keeps_its_directions(base: Path, tmp_path: Path) -> None:
    adapter = save_foreign(base, tmp_path / "dora", use_dora=True)
    named = renamed(adapter, tmp_path / "named", lambda key: key.replace("vector", "vector.default.weight"))
    assert_same_state(base, named, adapter)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_modules_in_full_take_the_place_of_the_bases(base: Path, in_full: Path, dtype: str) -> None:
    model = loaded(base, in_full, dtype)
    trained = load_file(in_full / "adapter_model.safetensors")["base_model.model.audio_lm_head.weight"]
    head = model.base_model.model.audio_lm_head
    inputs = torch.randn(2, head.weight.shape[1]).to(head.weight.dtype)
    with torch.no_grad():
        assert torch.equal(head(inputs), inputs @ trained.to(inputs.dtype).T)
        with model.disable_adapter():
            assert not torch.equal(head(inputs), inputs @ trained.to(inputs.dtype).T)


def edited(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: configured(folder, **changes) and None


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        change(weights)
        save_file(weights, folder / "adapter_model.safetensors")

    return rewrite


UNKNOWN = "base_model.model.speaker_proj.weight"
HEAD = "base_model.model.audio_lm_head.weight"
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tensors(lambda w: w.update({UNKNOWN: torch.ones(2)})), "trained on speaker_proj, which Higgs Audio v2 does"),
        (tensors(lambda w: w.update({f"{LAYER}.base_layer.weight": torch.ones(2)})), r"q_proj\.base_layer"),
        (
            tensors(lambda w: w.update({"base_model.model.audio_tower.layers.0.fc1.lora_A.weight": torch.ones(2, 2)})),
            r"audio_tower\.layers\.0\.fc1",
        ),
        (edited(modules_to_save=[*HEADS, *TABLES, "speaker_proj"]), "names speaker_proj in modules_to_save"),
        (edited(modules_to_save=["text_lm_head", *TABLES]), "weights of audio_lm_head, which modules_to_save"),
        (tensors(lambda w: w.update({HEAD: torch.ones(4, 4)})), r"audio_lm_head\.weight is \(4, 4\), expected"),
        (tensors(lambda w: w.update({HEAD.replace("weight", "bias"): torch.ones(4)})), "expected no such tensor"),
        (tensors(lambda w: w.update({f"module.{HEAD}": torch.ones(4, 4)})), "two tensors for"),
        (tensors(lambda w: w.update({f"{LAYER}.lora_A.b.weight": torch.ones(4, 4)})), "two tensors for"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    base: Path, in_full: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    adapter = renamed(in_full, tmp_path / "adapter", str)
    damage(adapter)
    with pytest.raises(CheckpointError, match=message):
        loaded(base, adapter)


def test_a_stage_continues_what_it_trains_and_names_what_it_does_not(
    base: Path, plain: Path, in_full: Path, tmp_path: Path
) -> None:
    shape = Lora(r=4, alpha=8)
    theirs = renamed(plain, tmp_path / "theirs", lambda key: f"module.{original(key)}")
    state = adapter_state(continue_lora(load_model(base, device="cpu"), theirs, shape, "text"))
    for key, value in load_file(plain / "adapter_model.safetensors").items():
        assert torch.equal(state[key], value)
    heads = save_foreign(base, tmp_path / "heads", targets=["q_proj", "audio_lm_head"])
    for adapter, name in ((in_full, "audio_lm_head"), (heads, "audio_lm_head")):
        with pytest.raises(CheckpointError, match=rf"trained on {name}, which no stage trains: merge it"):
            continue_lora(load_model(base, device="cpu"), adapter, shape, "full")
    patterned = renamed(plain, tmp_path / "pattern", str, alpha_pattern={"q_proj": 99})
    with pytest.raises(CheckpointError, match="sets alpha_pattern"):
        continue_lora(load_model(base, device="cpu"), patterned, shape, "text")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_copy_is_for_plain_peft(base: Path, plain: Path, in_full: Path, tmp_path: Path) -> None:
    files = ("adapter_config.json", "adapter_model.safetensors")
    (tmp_path / "same").mkdir()
    copy_for_peft(plain, tmp_path / "same", load_model(base, device="cpu"))
    for name in files:
        assert (tmp_path / "same" / name).read_bytes() == (plain / name).read_bytes()
    named = ["lm_head", "embed_tokens", "embed_audio_tokens"]
    theirs = renamed(in_full, tmp_path / "theirs", lambda key: f"module.{original(key)}", modules_to_save=named)
    (tmp_path / "peft").mkdir()
    copy_for_peft(theirs, tmp_path / "peft", load_model(base, device="cpu"))
    model = PeftModel.from_pretrained(load_model(base, device="cpu"), str(tmp_path / "peft"))
    expected = load_file(in_full / "adapter_model.safetensors")
    assert adapter_state(model).keys() == expected.keys()
    assert all(torch.equal(adapter_state(model)[key], value) for key, value in expected.items())
