"""Checkpoints of Higgs Audio v2 in three layouts: read their configuration, load the native model with their weights.

native      that of transformers
original    that of boson_multimodal: see `original`
extended    the native one with modules that the native class lacks. It has its own model type, so that no other
            software loads it as a native checkpoint and drops them.
"""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from higgstune.checkpoint_files import malformed_errors, read_json, read_weights
from higgstune.codec.whisper_encoder import WhisperTower
from higgstune.errors import CheckpointError
from higgstune.families.base import Conditioning, Layout, Spec
from higgstune.families.higgs_v2 import INFO
from higgstune.families.higgs_v2.extensions import CONDITIONING_KEY, add_conditioning
from higgstune.families.higgs_v2.original import native_config, read_original

TEXT_HEAD = "text_lm_head.weight"
# The keys read from a config.json. Others can make transformers fetch code (_attn_implementation) or read other files.
_ARCHITECTURE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "rope_theta", "rope_scaling",  # how rope_parameters are spelt in older files
    "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp", "tie_word_embeddings", "rope_parameters",
    "attention_bias", "attention_dropout", "mlp_bias", "head_dim", "num_codebooks", "codebook_size", "audio_token_id",
    "audio_bos_token_id", "audio_delay_token_id", "audio_stream_bos_id", "audio_stream_eos_id",
)  # fmt: skip

# Those that a model computes with, without what no layout has to repeat: ids that only name a default.
_COMPUTED_WITH = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "attention_dropout", "mlp_bias",
    "num_codebooks", "codebook_size", "audio_token_id", "audio_bos_token_id", "audio_delay_token_id",
    "audio_stream_bos_id", "audio_stream_eos_id",
)  # fmt: skip
_SCALED_BY_LENGTH = ("dynamic", "yarn", "longrope")  # kinds of rope whose frequencies depend on the longest sequence


def read_config(folder: Path) -> HiggsAudioV2Config:
    """The native configuration of a checkpoint in any layout: its architecture, and no other key of the file, such as
    code to fetch for its attention. Raises CheckpointError.
    """
    path = folder / "config.json"
    written = read_json(path, "a checkpoint folder needs it")
    try:
        if INFO.model_types[written["model_type"]] == "original":
            config = native_config(written)
        else:
            config = HiggsAudioV2Config(**{key: written[key] for key in _ARCHITECTURE if key in written})
        inverse_frequencies(config)  # an unknown kind would fail wherever a model is built
    except CheckpointError:
        raise
    except malformed_errors() as error:
        raise CheckpointError(
            f"{path} does not describe a model of {INFO.title} ({type(error).__name__}: {error}): copy or download the "
            "checkpoint again"
        ) from error
    return config


def spec_of(config: HiggsAudioV2Config) -> Spec:
    """The numbers of a configuration. A clip of T frames adds a BOS and an EOS frame, and K - 1 for the delay."""
    return Spec(
        num_codebooks=config.num_codebooks,
        codes=config.audio_stream_bos_id,
        classes=config.codebook_size,
        stream_bos=config.audio_stream_bos_id,
        stream_eos=config.audio_stream_eos_id,
        extra_rows=config.num_codebooks + 1,
        pad_id=config.pad_token_id or 0,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
    )


def architecture(config: HiggsAudioV2Config) -> dict[str, Any]:
    """What of a configuration decides ids and logits, as JSON: the same in every layout and dtype."""
    rope = {"rope_type": "default", **(config.rope_parameters or {})}
    if rope["rope_type"] in _SCALED_BY_LENGTH:
        rope["max_position_embeddings"] = config.max_position_embeddings
    found = {key: getattr(config, key) for key in _COMPUTED_WITH}
    found |= {f"rope_parameters.{key}": value for key, value in rope.items() if value is not None}
    whole = {key for key, value in found.items() if isinstance(value, float) and value.is_integer()}
    return {key: int(value) if key in whole else value for key, value in found.items()}  # 500000.0 is 500000


def written_conditioning(folder: Path) -> Conditioning:
    """The extensions of a checkpoint by its config.json; the Whisper encoder of an original one shows up on loading.

    Raises CheckpointError.
    """
    written = read_json(folder / "config.json", "a checkpoint folder needs it")
    if (extended := written.get(CONDITIONING_KEY)) is not None:
        try:
            return Conditioning.model_validate(extended)
        except ValidationError as error:
            raise CheckpointError(f"{folder / 'config.json'} is damaged ({CONDITIONING_KEY}): {error}") from error
    return Conditioning(audio_attention=bool(written.get("use_audio_out_self_attention")))


def build(
    config: HiggsAudioV2Config, *, layers: int | None = None, dtype: torch.dtype | None = None
) -> HiggsAudioV2ForConditionalGeneration:
    """The native model with its text head, without loaded weights, on the current device."""
    if layers is not None:
        config = type(config).from_dict(config.to_dict() | {"num_hidden_layers": layers})
    if dtype is None:
        return HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    return HiggsAudioV2ForConditionalGeneration._from_config(config, use_text_head=True, dtype=dtype)


def load(
    layout: Layout, config: HiggsAudioV2Config, dtype: torch.dtype
) -> tuple[HiggsAudioV2ForConditionalGeneration, WhisperTower | None]:
    """The native model with text head and the extensions in its folder, and the folder's Whisper encoder.

    Raises CheckpointError.
    """
    _check_size(layout, config)
    if layout.kind == "native":
        return _load_native(layout, config, dtype), None
    if layout.kind == "original":
        original = read_original(layout)
        return _filled(layout, config, original.conditioning, original.state, dtype), original.whisper
    if CONDITIONING_KEY not in layout.config:
        raise CheckpointError(
            f"{layout.folder / 'config.json'} does not list the modules that it adds ({CONDITIONING_KEY}): copy or "
            "download the checkpoint again"
        )
    conditioning = written_conditioning(layout.folder)
    return _filled(layout, config, conditioning, read_weights(layout.weights), dtype), None


def inverse_frequencies(config: HiggsAudioV2Config) -> Tensor:
    """[head_dim / 2] float32, from the config alone. Raises CheckpointError for an unknown kind."""
    parameters: dict[str, Any] = dict(config.rope_parameters or {})
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        size = spec_of(config).head_dim
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        return 1.0 / parameters["rope_theta"] ** exponents
    if kind not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(ROPE_INIT_FUNCTIONS)
        raise CheckpointError(f"config.json has the rope_type {kind!r}: one of default, {known}")
    frequencies: Tensor = ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"))[0]
    return frequencies


def empty_model(
    config: HiggsAudioV2Config, conditioning: Conditioning | None = None
) -> HiggsAudioV2ForConditionalGeneration:
    """The model on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        model = build(config)
        add_conditioning(model, conditioning or Conditioning())
    return model


def _check_size(layout: Layout, config: HiggsAudioV2Config) -> None:
    """Raises CheckpointError if a config contradicts itself or needs more values than the weight files hold."""
    path = layout.folder / "config.json"
    ids = (config.pad_token_id or 0, config.audio_token_id, config.audio_bos_token_id, config.audio_delay_token_id)
    try:
        if not 0 < config.num_hidden_layers <= len(layout.keys):
            raise ValueError(f"{config.num_hidden_layers} layers of {len(layout.keys)} tensors")
        if not 0 <= min(ids) <= max(ids) < config.vocab_size:
            raise ValueError(f"a token id is outside the vocabulary of {config.vocab_size}")
        values = sum(value.numel() for value in empty_model(config).state_dict().values())
    except malformed_errors() as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy or download the checkpoint again") from error
    if values > layout.bytes:
        raise CheckpointError(
            f"{path} describes a model of {values} values, which the {layout.bytes} bytes of weights cannot hold: copy "
            "or download the checkpoint again"
        )


def _load_native(
    layout: Layout, config: HiggsAudioV2Config, dtype: torch.dtype
) -> HiggsAudioV2ForConditionalGeneration:
    if TEXT_HEAD not in layout.keys:
        raise CheckpointError(
            f"{layout.folder} has no {TEXT_HEAD}: it was saved without its text head, which the text loss needs; "
            "save it once more with use_text_head=True"
        )
    try:
        loaded: Any = HiggsAudioV2ForConditionalGeneration.from_pretrained(
            layout.folder,
            config=config,
            use_text_head=True,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
        )
    except malformed_errors(SafetensorError) as error:
        raise CheckpointError(f"{layout.folder} cannot be loaded: {error}") from error
    model, info = loaded
    problems = [*info["missing_keys"], *(str(item) for item in info["mismatched_keys"])]
    if problems:
        raise CheckpointError(
            f"the weights in {layout.folder} do not fill the model: {len(problems)} missing or of another shape, "
            f"such as {problems[0]}; copy or download the checkpoint again"
        )
    return model


def _filled(
    layout: Layout,
    config: HiggsAudioV2Config,
    conditioning: Conditioning,
    state: dict[str, Tensor],
    dtype: torch.dtype,
) -> HiggsAudioV2ForConditionalGeneration:
    """A model with its extensions and exactly these weights. Raises CheckpointError."""
    # Names and shapes are compared before the model is allocated.
    shapes = {key: tuple(value.shape) for key, value in empty_model(config, conditioning).state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    wrong = sorted(key for key in shapes.keys() | found.keys() if shapes.get(key) != found.get(key))
    if wrong:
        raise CheckpointError(
            f"the {layout.kind}-format weights in {layout.folder} do not fit its config: {len(wrong)} tensors missing, "
            f"unknown or of another shape, "
            f"such as {wrong[0]}: expected {shapes.get(wrong[0])}, got {found.get(wrong[0])}"
        )
    model = build(config, dtype=dtype)
    add_conditioning(model, conditioning)
    model.load_state_dict(state)
    if conditioning:
        model.model.builtin = conditioning
    return model
