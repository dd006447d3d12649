"""Checkpoints of Higgs TTS 3: read their configuration and their weights, as released.

One file holds the backbone (`body.*`), the text embedding and the audio table (`tied.embedding.*`), the codec, and
often copies of both embeddings as heads (`tied.head.*`), which the index does not list. It has no metadata.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from higgstune.checkpoint_files import malformed_errors, read_json
from higgstune.codec import CODEC_PREFIX
from higgstune.errors import CheckpointError
from higgstune.families.base import Layout, Spec
from higgstune.families.higgs_tts_3.model import HiggsTTS3, HiggsTTS3Config

THETA = 1_000_000
TEXT_EMBEDDING = "tied.embedding.text_embedding.weight"
AUDIO_TABLE = "tied.embedding.modality_embeddings.0.embedding.weight"
# Copies that a file may hold -> what they copy.
HEADS = {"tied.head.text_head.weight": TEXT_EMBEDDING, "tied.head.modality_heads.0.weight": AUDIO_TABLE}
# Full paths from the model's root: a suffix such as `q_proj` would also match the codec's HuBERT.
PROJECTIONS = r"model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
TABLE = "audio_table"  # the module
_NAMES = {"model.embed_tokens.weight": TEXT_EMBEDDING, "audio_table.weight": AUDIO_TABLE}
_PLAIN = {theirs: ours for ours, theirs in _NAMES.items()}
# The keys read from `text_config`. Others can make transformers fetch code or read other files.
_ARCHITECTURE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_COMPUTED_WITH = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "attention_dropout",
    "num_codebooks", "codebook_size",
)  # fmt: skip
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
_AGAIN = "copy or download the checkpoint again"


def read_config(folder: Path) -> HiggsTTS3Config:
    """The configuration of a checkpoint, from config.json alone. Raises CheckpointError, also for the siblings that
    this family does not load: another audio encoder, an audio head of its own, other rotary frequencies.
    """
    path = folder / "config.json"
    written = read_json(path, "a checkpoint folder needs it")
    text, audio = (_section(written, key, path) for key in ("text_config", "audio_encoder_config"))
    for section, key, expected, why in (
        (audio, "encoder_type", "discrete", "it is another model, such as the one for transcription"),
        (audio, "tie_word_embeddings", True, "its audio head is a weight of its own, which this family does not have"),
        (audio, "use_delay_pattern", True, "its codebooks are not delayed"),
        (text, "tie_word_embeddings", True, "its text head is a weight of its own, which this family does not have"),
        (text, "use_sliding_window", False, "its attention sees a window"),
    ):
        if section.get(key, expected) != expected or (key in ("encoder_type",) and key not in section):
            raise CheckpointError(f"{path} has {key} {section.get(key)!r}, where {expected!r} is expected: {why}")
    if missing := [key for key in _REQUIRED if key not in text]:
        raise CheckpointError(f"{path} has no text_config.{missing[0]}: {_AGAIN}")
    try:
        config = HiggsTTS3Config(
            **{key: text[key] for key in _ARCHITECTURE if key in text},
            rope_parameters=_rope(text, path),
            tie_word_embeddings=True,
            num_codebooks=audio["num_codebooks"],
            codebook_size=audio["vocab_size"],
        )
    except CheckpointError:
        raise
    except malformed_errors() as error:
        raise CheckpointError(
            f"{path} does not describe a model of Higgs TTS 3 ({type(error).__name__}: {error}): {_AGAIN}"
        ) from error
    if audio.get("out_dim", config.hidden_size) != config.hidden_size:
        raise CheckpointError(f"{path}: the audio table has {audio['out_dim']} columns, not {config.hidden_size}")
    return config


def _section(written: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    section = written.get(key)
    if not isinstance(section, dict):
        raise CheckpointError(f"{path} has no {key}: {_AGAIN}")
    return section


def _rope(text: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Rotary parameters; a missing theta is that of the release, as in all servers. Raises CheckpointError.

    transformers would take 10,000 for it, and a loss curve hardly shows that.
    """
    rope = text.get("rope_parameters") or {}
    theta = rope.get("rope_theta", text.get("rope_theta", THETA))
    if theta is None:
        theta = THETA
    kind = rope.get("rope_type", "default")
    if theta != THETA or kind != "default" or text.get("rope_scaling"):
        raise CheckpointError(
            f"{path} has a rope_theta of {theta} ({kind}): Higgs TTS 3 was trained with {THETA} (default); use the "
            "config.json of the release"
        )
    return {"rope_type": "default", "rope_theta": float(THETA)}


def spec_of(config: HiggsTTS3Config) -> Spec:
    """The numbers of a configuration. A clip of T frames has T + K - 1 rows."""
    eos = config.eos_token_id
    return Spec(
        num_codebooks=config.num_codebooks,
        codes=config.boc_id,
        classes=config.codebook_size,
        stream_bos=config.boc_id,
        stream_eos=config.boc_id + 1,
        extra_rows=config.num_codebooks - 1,
        pad_id=config.pad_token_id or (eos if isinstance(eos, int) else 0),
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
    )


def architecture(config: HiggsTTS3Config) -> dict[str, Any]:
    """What of a configuration decides ids and logits, as JSON."""
    return {key: getattr(config, key) for key in _COMPUTED_WITH} | {"rope_theta": THETA}


def plain_name(name: str) -> str:
    """A parameter's name on disk or in peft's layout, without a leading `model.` -> its name in the model."""
    if name in _PLAIN:
        return _PLAIN[name]
    name = name.removeprefix("body.")
    return f"model.{name}" if name.startswith(("layers.", "norm.", "embed_tokens.")) else name


def stored_name(name: str) -> str:
    """A parameter's name in the model -> its name on disk."""
    return _NAMES.get(name) or f"body.{name.removeprefix('model.')}"


def build(config: HiggsTTS3Config, *, layers: int | None = None, dtype: torch.dtype | None = None) -> HiggsTTS3:
    """The model without loaded weights, on the current device, with its first `layers` layers (None: all)."""
    if layers is not None:
        settings = {key: getattr(config, key) for key in (*_ARCHITECTURE, "num_codebooks", "codebook_size")}
        rope = {"rope_parameters": config.rope_parameters, "tie_word_embeddings": True}
        config = HiggsTTS3Config(**{**settings, **rope, "num_hidden_layers": layers})
    if dtype is None:
        return HiggsTTS3(config)
    model: HiggsTTS3 = HiggsTTS3._from_config(config, dtype=dtype)
    return model


def load(layout: Layout, config: HiggsTTS3Config, dtype: torch.dtype) -> tuple[HiggsTTS3, None]:
    """The model on the CPU. Raises CheckpointError for a tensor that is missing, unknown or of another shape, and for
    a head that is not a copy of its embedding.
    """
    check_keys(layout, config)
    state: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    listed = set(layout.weights)
    # The index never lists the heads, so that they may lie in a file that it does not name.
    for file in sorted(listed.union(layout.folder.glob("model*.safetensors"))):
        with _opened(file) as weights:
            for key in weights.keys():  # noqa: SIM118
                if key in HEADS:
                    heads[key] = weights.get_tensor(key)
                elif file in listed and not key.startswith(CODEC_PREFIX):
                    state[plain_name(key)] = weights.get_tensor(key)
    for head, embedding in HEADS.items():
        if head in heads and not torch.equal(heads[head], state[plain_name(embedding)]):
            raise CheckpointError(
                f"{layout.folder}: {head} differs from {embedding}, although config.json says that they are one: it "
                f"was saved by a trainer that split them; {_AGAIN}"
            )
    heads.clear()
    with torch.device("meta"):  # no weight is drawn at random, and in the files' dtype none is copied
        model = build(config, dtype=dtype)
    model.load_state_dict({key: value.to(dtype) for key, value in state.items()}, assign=True)
    model.model.rotary_emb = Qwen3RotaryEmbedding(config)  # its buffers are not in the files
    return model, None


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): {_AGAIN}") from error


def check_keys(layout: Layout, config: HiggsTTS3Config) -> None:
    """Raises CheckpointError unless the files have all tensors of the model in their shapes, and no unknown one.

    Names and shapes are compared before a weight is read or the model allocated.
    """
    path = layout.folder / "config.json"
    if not 0 < config.num_hidden_layers <= len(layout.keys):
        raise CheckpointError(f"{path} has {config.num_hidden_layers} layers: {_AGAIN}")
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in build(config).state_dict().items()}
    found = tensor_shapes(layout)
    for head, embedding in HEADS.items():
        if head in found:
            expected[head] = expected[plain_name(embedding)]
    codec = {key for key in found if key.startswith(CODEC_PREFIX)}
    wrong = sorted(key for key in (expected.keys() | found.keys()) - codec if expected.get(key) != found.get(key))
    if wrong:
        raise CheckpointError(
            f"the weights in {layout.folder} do not fit its config: {len(wrong)} tensors missing, unknown or of "
            f"another shape, such as {wrong[0]}: expected {expected.get(wrong[0])}, got {found.get(wrong[0])}"
        )


def tensor_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Names in the model -> shapes, from the headers; heads and codec under their names on disk."""
    found = {}
    for file in layout.weights:
        with _opened(file) as weights:
            for key in weights.keys():  # noqa: SIM118
                kept = key in HEADS or key.startswith(CODEC_PREFIX)
                found[key if kept else plain_name(key)] = tuple(weights.get_slice(key).get_shape())
    return found
