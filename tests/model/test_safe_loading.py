"""Stores, checkpoints, adapters and codecs from strangers: nothing of them runs, or leads out of its folder."""

import ast
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preparing import run
from recordings import clip
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny_checkpoint
from tiny_codec import save_tiny_codec

import higgstune
from higgstune.checkpoint_files import folder_card, read_json, safetensors_keys
from higgstune.codec import load_codec
from higgstune.config.recipe import Lora
from higgstune.data.store import CodeStore
from higgstune.data.whisper_features import FeatureStore, read_feature_index
from higgstune.errors import CheckpointError, DataError
from higgstune.families.base import Conditioning
from higgstune.families.higgs_v2.family import FAMILY
from higgstune.inputs import find_adapter
from higgstune.model.adapters import add_lora, load_adapter
from higgstune.model.load import load_model, load_tokenizer

PACKAGE = Path(higgstune.__file__).parent
DEMO_CODEC = PACKAGE / "demo" / "assets" / "codec"


# The package itself


def calls(tree: ast.AST) -> list[tuple[str, dict[str, str]]]:
    """The calls in a module: what is called and its keywords, as written."""
    return [
        (ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


BETWEEN_PROCESSES = ("data/decoders.py", "raw/engines.py")  # messages of processes that the module itself started


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_unpickles_evaluates_or_starts_a_shell(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, keywords in calls(tree):
        assert name != "torch.load" or keywords.get("weights_only") == "True", "a pickle runs code"
        assert name not in ("eval", "exec", "os.system", "os.popen", "yaml.unsafe_load"), name
        if name == "pickle.loads" and str(path.relative_to(PACKAGE)) in BETWEEN_PROCESSES:
            continue
        assert not re.match(r"(pickle|joblib|dill|cloudpickle|shelve|marshal|zipfile|tarfile)\.(?!dumps?$)", name), name
        assert name != "yaml.load" or keywords == {"Loader": "_Loader"}, "another loader of YAML"
        assert keywords.get("shell", "False") == "False", f"{name} starts a shell"
        assert keywords.get("allow_pickle", "False") == "False", f"{name} unpickles"
        assert keywords.get("trust_remote_code", "False") == "False", f"{name} runs code of a repository"


# Code stores and Whisper features


@pytest.fixture
def store(tmp_path: Path) -> Path:
    clip(tmp_path / "in", "a.wav", 1)
    run(tmp_path / "in", tmp_path / "store")
    return tmp_path / "store"


def edited(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["shards"][0].update(name="../../etc/passwd"),
        lambda index: index["shards"][0].update(name="/etc/passwd"),
        lambda index: index["shards"][0].update(name=5),
        lambda index: index["shards"][0].update(split="test"),
        lambda index: index["shards"][0].update(split="validation"),
        lambda index: index["shards"][0].update(rows="many"),
        lambda index: index["shards"].append([]),
        lambda index: index.update(shards=None),
        lambda index: index["info"].update(num_codebooks=None),
        lambda index: index["info"].update(frame_rate="fast"),
        lambda index: index["info"].update(rows={"train": "x"}),
        lambda index: index["info"].update(settings=[]),
    ],
)
def test_an_index_of_a_stranger(store: Path, change: Callable[[Any], Any]) -> None:
    edited(store / "store.json", change)
    with pytest.raises(DataError, match=r"store\.json"):
        CodeStore.open(store)


def test_an_index_that_is_nested_deeply(store: Path) -> None:
    (store / "store.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"store\.json cannot be read"):
        CodeStore.open(store)


FEATURES = {
    "checkpoint": "x", "revision": "0123456789abcdef", "d_model": 4, "chunk_frames": 8,
    "files": [{"name": "features-0123456789ab.safetensors", "bytes": 1, "sha256": "x", "clips": ["a" * 64]}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(revision="../../elsewhere"), "not that of its folder"),
        (lambda index: index["files"][0].update(name="../../../secret.safetensors"), "not a file of features"),
        (lambda index: index["files"][0].update(clips=["../x"]), "than its hash"),
        (lambda index: index["files"][0].update(clips=5), "is damaged"),
        (lambda index: index["files"][0].update(name=None), "is damaged"),
        (lambda index: index.update(d_model="x"), "d_model a number"),
        (lambda index: index.update(files=7), "is damaged"),
        (lambda index: index.update(more=7), "is damaged"),
    ],
)
def test_an_index_of_features_of_a_stranger(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    path = tmp_path / "whisper" / str(FEATURES["revision"]) / "index.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(FEATURES))
    assert read_feature_index(path).d_model == 4
    edited(path, change)
    with pytest.raises(DataError, match=message):
        read_feature_index(path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a" * 64: np.zeros((3, 4), np.float16)},
        {"a" * 64: np.zeros((3, 5), np.float16), "a" * 64 + ".chunks": np.array([3], np.int32)},
        {"a" * 64: np.zeros((3, 4), np.float16), "a" * 64 + ".chunks": np.array([2], np.int32)},
        {"a" * 64: np.zeros((3, 4), np.float32), "a" * 64 + ".chunks": np.array([3], np.int32)},
    ],
    ids=["no chunks", "another width", "another length", "another dtype"],
)
def test_features_that_are_not_as_their_index_says(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    import hashlib

    from safetensors.numpy import save_file as save

    path = tmp_path / "whisper" / str(FEATURES["revision"]) / "features-0123456789ab.safetensors"
    path.parent.mkdir(parents=True)
    save(tensors, path)
    index = json.loads(json.dumps(FEATURES))
    index["files"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name("index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="copy or prepare it again"):
        FeatureStore.open(tmp_path, "x").read("a" * 64)


# Checkpoints


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def checkpoint(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "checkpoint")


def with_header(path: Path, header: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(100))


def shards(folder: Path, name: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edited(folder / "config.json", lambda written: written.update(changes))


def header(content: bytes, length: int | None = None) -> Callable[[Path], None]:
    return lambda folder: with_header(folder / "model.safetensors", content, length)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shards(f, "../../outside.safetensors"), "in its own folder"),
        (lambda f: shards(f, "/outside.safetensors"), "in its own folder"),
        (lambda f: shards(f, "pytorch_model.bin"), "in its own folder"),
        (lambda f: shards(f, 5), "in its own folder"),
        (header(b"[]"), "broken header"),
        (header(b'{"a": 5}'), "broken header"),
        (header(b'{"a": {"data_offsets": [0]}}'), "broken header"),
        (header(b'{"a": {"data_offsets": [0, "x"]}}'), "broken header"),
        (header(b"[" * 100_000), "broken header"),
        (header(b"{}", length=1 << 62), "truncated or not a safetensors"),
        (config(num_hidden_layers=10**9), "layers of"),
        (config(num_hidden_layers=-1), "layers of"),
        (config(num_hidden_layers="2"), "does not describe a model of"),
        (config(hidden_size=64 * 10**6), "cannot hold"),
        (config(vocab_size=10**12), "cannot hold"),
        (config(num_attention_heads=0), "does not describe a model of"),
        (config(pad_token_id=10**9), "token id is outside"),
        (config(audio_delay_token_id=-5), "token id is outside"),
        (config(hidden_act="os.system"), "is damaged"),
        (config(rope_parameters={"rope_type": "x"}), "has the rope_type 'x'"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda f: (f / "config.json").write_text('{"a":' * 100 + "1" + "}" * 100), "levels deep"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter in it"),
    ],
)
def test_a_checkpoint_of_a_stranger(checkpoint: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint, device="cpu")


def test_a_config_cannot_name_code_for_its_attention(checkpoint: Path) -> None:
    """transformers would fetch it from the hub and run it, where the package `kernels` is installed."""
    config(_attn_implementation="owner/kernel", attn_implementation="owner/kernel")(checkpoint)
    assert load_model(checkpoint, device="cpu").config._attn_implementation == "sdpa"


def test_what_a_config_says_of_the_architecture_counts_in_every_spelling(checkpoint: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 1024
    edited(checkpoint / "config.json", lambda written: written.pop("rope_parameters"))
    config(rope_theta=123.0, rope_scaling=rope, rms_norm_eps=1e-3)(checkpoint)
    loaded = load_model(checkpoint, device="cpu").config
    assert loaded.rope_parameters == {**rope, "rope_theta": 123.0}
    assert loaded.rms_norm_eps == 1e-3


def test_a_huge_file_of_json_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 36)  # 64 GB, of which the disk has none
    with pytest.raises(CheckpointError, match="larger than 64 MB"):
        read_json(path, "")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors"):
        safetensors_keys(path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer.json", "[" * 100_000, "cannot be read"),
        (
            "tokenizer.json",
            '{"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
            "cannot",
        ),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}', "cannot be read"),
        ("tokenizer_config.json", '{"bos_token": 5}', "cannot be read"),
        ("tokenizer_config.json", '{"vocab_file": "/etc/passwd"}', "names a file by vocab_file"),
        ("special_tokens_map.json", "[]", "cannot be read"),
    ],
)
def test_a_tokenizer_of_a_stranger(checkpoint: Path, file: str, content: str, message: str) -> None:
    (checkpoint / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(checkpoint, FAMILY, load_model(checkpoint, device="cpu").config)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "config.json"])
def test_no_code_of_a_checkpoint_runs(checkpoint: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No prompt offers to run it either: whatever is on stdin would answer."""
    ran = checkpoint / "ran"
    (checkpoint / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Tokenizer: pass\nclass Model: pass\n")
    auto_map = {
        "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
        "AutoConfig": "evil.Model",
        "AutoModel": "evil.Model",
    }
    edited(checkpoint / place, lambda written: written.update(auto_map=auto_map))
    edited(checkpoint / "tokenizer_config.json", lambda written: written.pop("tokenizer_class", None))
    monkeypatch.setattr("builtins.input", lambda text: "y")
    model = load_model(checkpoint, device="cpu")
    if place == "tokenizer_config.json":
        with pytest.raises(CheckpointError, match="custom code"):
            load_tokenizer(checkpoint, FAMILY, model.config)
    else:
        load_tokenizer(checkpoint, FAMILY, model.config)
    assert not ran.exists()


# Adapters


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as plain peft saves it: no card, so nothing but its content speaks against a change."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    add_lora(load_model(base, device="cpu"), Lora(r=2), "text", Conditioning()).save_pretrained(str(folder))  # type: ignore[call-arg]
    return folder


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "adapter")


def lora(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edited(folder / "adapter_config.json", lambda written: written.update(changes))


def tensors(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file({key: change(value) for key, value in load_file(path).items()}, path)

    return rewrite


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def test_a_plain_adapter_is_loaded(base: Path, adapter: Path) -> None:
    assert load_adapter(load_model(base, device="cpu"), adapter).peft_config["default"].r == 2
    named = ["q_proj", "k_proj", "v_proj", "o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    lora(target_modules=named)(adapter)
    assert load_adapter(load_model(base, device="cpu"), adapter).peft_config["default"].r == 2
    lora(target_modules=[*named, "audio_mlp.up_proj"])(adapter)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_adapter(load_model(base, device="cpu"), adapter)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled, "pickled weights only"),
        (lora(peft_type="PREFIX_TUNING"), "is not a LoRA configuration: peft_type"),
        (lora(peft_type=None), "is not a LoRA configuration: peft_type"),
        (lora(megatron_config={"a": 1}, megatron_core="evil"), "sets megatron_config"),
        (lora(layer_replication=[[0, 1000]]), "sets layer_replication"),
        (lora(rank_pattern={"(a+)+$": 3}), "sets rank_pattern"),
        (lora(loftq_config={"a": 1}), "sets loftq_config"),
        (lora(something_new=True), "sets something_new"),
        (lora(init_lora_weights="pissa"), "init_lora_weights"),
        (lora(target_modules="(a+)+$"), "a pattern that Higgstune did not write"),
        (lora(target_modules=["(a+)+$"]), "target_modules"),
        (lora(target_modules=5), "target_modules"),
        (lora(target_modules=["embed_tokens"]), "is not a linear layer"),
        (lora(modules_to_save=["(.*.*)*"]), "modules_to_save"),
        (lora(r="2"), "is not a LoRA configuration: r"),
        (lora(r=-2), "is not a LoRA configuration: r"),
        (lora(r=10**9), r"does not fit this base: .*expected \(1000000000"),
        (lora(lora_alpha=float("nan")), "lora_alpha"),
        (lora(bias="all"), "bias"),
        (tensors(lambda value: value * float("nan")), "holds NaN or infinity"),
        (tensors(lambda value: value.to(torch.int64)), "is not of floats"),
        (tensors(lambda value: value[:1].contiguous()), "does not fit"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}"), "does not fit"),
        (lambda f: (f / "higgstune.json").write_text('{"codec": ["x"]}'), "codec must be a string"),
        (lambda f: (f / "higgstune.json").write_text('{"recipe": {"lora": 5}}'), r"recipe\.lora must be an object"),
        (lambda f: (f / "higgstune.json").write_text('{"recipe":' * 100 + "1" + "}" * 100), "levels deep"),
    ],
)
def test_an_adapter_of_a_stranger(base: Path, adapter: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(adapter)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(load_model(base, device="cpu"), adapter)


@pytest.mark.parametrize("place", ["../elsewhere", "/elsewhere", "stage/../../elsewhere", "a\0", 5])
def test_a_run_names_no_adapter_outside_of_itself(tmp_path: Path, place: str | int) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"adapter": place}))
    with pytest.raises(CheckpointError, match="no adapter inside its run"):
        find_adapter(tmp_path)
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        find_adapter(tmp_path)


@pytest.mark.parametrize("card", [{"adapter": None}, {"adapter": {"recipe": 5}}, {"merged": 5}])
def test_a_damaged_card_of_a_merged_checkpoint(tmp_path: Path, card: dict[str, Any]) -> None:
    (tmp_path / "higgstune.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="must be an object"):
        folder_card(tmp_path)


# Codecs


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    return save_tiny_codec(tmp_path / "codec")


def test_a_pickled_codec_is_refused(codec: Path) -> None:
    tensors = load_file(codec / "model.safetensors")
    (codec / "model.safetensors").unlink()
    torch.save(tensors, codec / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights"):
        load_codec(codec)


@pytest.mark.parametrize("part", ["", "semantic_model_config"])
def test_a_codec_cannot_name_code_for_its_attention(codec: Path, part: str) -> None:
    def change(written: dict[str, Any]) -> None:
        (written[part] if part else written)["_attn_implementation"] = "owner/kernel"

    edited(codec / "config.json", change)
    with pytest.raises(CheckpointError, match="has _attn_implementation"):
        load_codec(codec)


@pytest.mark.parametrize(
    "change", [{"num_mels": 10**9}, {"n_fft": "x"}, {"hop": 0}, {"n_fft": 10**12}, {"components": 2.5}, {"more": 1}]
)
def test_a_fitted_codec_of_a_stranger(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = shutil.copytree(DEMO_CODEC, tmp_path / "codec")
    edited(folder / "config.json", lambda written: written.update(change))
    with pytest.raises(CheckpointError, match="cannot be read as a fitted codec"):
        load_codec(folder)


def test_a_checksum_of_a_file_elsewhere_is_refused(checkpoint: Path) -> None:
    (checkpoint / "higgstune.json").write_text(json.dumps({"files": {"../../secret": "0" * 64}}))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        load_model(checkpoint, device="cpu")
