"""Load a checkpoint: the native model with its text head, and everything that belongs to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgstune.checkpoint_files import Layout, check_checksums, malformed_errors, read_json, read_layout, read_weights
from higgstune.codec import Codec, checkpoint_codec, load_codec
from higgstune.codec.whisper_encoder import WhisperTower
from higgstune.environment import choose_device, choose_dtype
from higgstune.errors import CheckpointError
from higgstune.families.higgs_v2.checkpoint import native_config, read_original
from higgstune.families.higgs_v2.extensions import CONDITIONING_KEY, Conditioning, add_conditioning
from higgstune.families.higgs_v2.prompt import AUDIO_OUT, AUDIO_OUT_BOS
from higgstune.hub import fetch
from higgstune.inputs import ADAPTER_CONFIG
from higgstune.kernels.quantize import Quantize, check_quantize, quantize_layers
from higgstune.model.adapter_folder import UNQUANTIZED_FINGERPRINT, base_fingerprint

_TEXT_HEAD = "text_lm_head.weight"
# What a config.json may say. Other keys can make transformers fetch code (_attn_implementation) or read other files.
_ARCHITECTURE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "rope_theta", "rope_scaling",  # how rope_parameters are spelt in older files
    "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp", "tie_word_embeddings", "rope_parameters",
    "attention_bias", "attention_dropout", "mlp_bias", "head_dim", "num_codebooks", "codebook_size", "audio_token_id",
    "audio_bos_token_id", "audio_delay_token_id", "audio_stream_bos_id", "audio_stream_eos_id",
)  # fmt: skip


@dataclass(frozen=True)
class ModelAndTokenizers:
    """A checkpoint with all that training and speaking need. The codec is no part of the model's module tree."""

    model: HiggsAudioV2ForConditionalGeneration
    tokenizer: Any
    audio_tokenizer: Codec
    whisper_processor: Any | None  # only where Whisper conditioning or Whisper ASR is asked for
    config: HiggsAudioV2Config
    checkpoint: str  # as named by the user, with `revision`
    revision: str | None
    codec: str  # as named by the user or found
    whisper: WhisperTower | None = None  # the encoder that an original-format checkpoint brings
    folder: Path | None = None  # where the checkpoint lies on this disk


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    quantize: Quantize | None = None,
    cache_dir: str | Path | None = None,
) -> HiggsAudioV2ForConditionalGeneration:
    """The native model with text head, in eval mode, from a native or original-format folder or hub id.

    `dtype` and `device` are chosen where not given: see `choose_device`, `choose_dtype`. `quantize` ("4bit") puts the
    linear weights of the decoder layers into 4 bits, see `quantize_layers`; `dtype` is then what they compute in.
    Raises CheckpointError, or ConfigError where 4 bits need what is not installed.
    """
    layout = read_layout(fetch(path, what="checkpoint", revision=revision, cache_dir=cache_dir))
    return _load(layout, choose_device(device), dtype, quantize)[0]


def load_model_and_tokenizers(
    checkpoint: str | Path,
    *,
    codec: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    codec_device: str | torch.device = "cpu",
    whisper: str | None = None,
    revision: str | None = None,
    quantize: Quantize | None = None,
    cache_dir: str | Path | None = None,
) -> ModelAndTokenizers:
    """Model, tokenizer, codec and, where `whisper` names one, the Whisper processor of a checkpoint.

    The codec is the given one, else the checkpoint's sub-folder `codec`, else the released one. Everything small is
    checked, and the codec loaded, before the model's weights are read. `quantize` as in `load_model`. Raises
    CheckpointError, ConfigError.
    """
    folder = fetch(checkpoint, what="checkpoint", revision=revision, cache_dir=cache_dir)
    layout = read_layout(folder)
    config = _config(layout)
    target = choose_device(device)
    check_quantize(quantize, choose_dtype(dtype, target))
    tokenizer = load_tokenizer(folder, config)
    whisper_processor = _whisper_processor(whisper, cache_dir) if whisper else None
    codec_name = checkpoint_codec(folder, codec)
    audio_tokenizer = load_codec(codec_name, device=str(codec_device), cache_dir=cache_dir)
    check_codec(audio_tokenizer, config, codec_name)
    model, encoder = _load(layout, target, dtype, quantize)
    return ModelAndTokenizers(
        model=model,
        tokenizer=tokenizer,
        audio_tokenizer=audio_tokenizer,
        whisper_processor=whisper_processor,
        config=config,
        checkpoint=str(checkpoint),
        revision=revision,
        codec=codec_name,
        whisper=encoder,
        folder=folder,
    )


def load_tokenizer(folder: Path, config: HiggsAudioV2Config) -> Any:
    """The checkpoint's own tokenizer. Raises CheckpointError when it is missing or does not fit the config."""
    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"{folder / 'tokenizer.json'} is missing: the tokenizer belongs to the checkpoint")
    settings = read_json(folder / "tokenizer_config.json", "") if (folder / "tokenizer_config.json").exists() else {}
    # A name here would be read instead of the folder's own file. That of special_tokens_map_file never is.
    files = [key for key in settings if key.endswith("_file") and key != "special_tokens_map_file"]
    if named := [key for key in files if settings[key] is not None]:
        raise CheckpointError(f"{folder / 'tokenizer_config.json'} names a file by {named[0]}: remove the key")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers has nothing narrower
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from error
    for token, expected in {AUDIO_OUT: config.audio_token_id, AUDIO_OUT_BOS: config.audio_bos_token_id}.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != expected:
            raise CheckpointError(
                f"the tokenizer in {folder} gives {token} the id {found}, the config says {expected}: "
                "tokenizer and weights are not of the same checkpoint"
            )
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model {config.vocab_size}: "
            "tokenizer and weights are not of the same checkpoint"
        )
    return tokenizer


def check_codec(codec: Codec, config: HiggsAudioV2Config, name: str) -> None:
    """Raises CheckpointError unless the codec's codes are what the model predicts."""
    if codec.num_codebooks != config.num_codebooks or codec.codebook_size != config.audio_stream_bos_id:
        raise CheckpointError(
            f"the codec {name} has {codec.num_codebooks} codebooks of {codec.codebook_size}, the checkpoint expects "
            f"{config.num_codebooks} of {config.audio_stream_bos_id}: give the checkpoint's own codec"
        )


def _config(layout: Layout) -> HiggsAudioV2Config:
    """The architecture, and nothing else that a config may say, such as code to fetch for its attention.

    Raises CheckpointError where it does not hold together or asks for more than the weight files can fill.
    """
    path = layout.folder / "config.json"
    try:
        if layout.kind == "original":
            config = native_config(layout.config)
        else:
            config = HiggsAudioV2Config(**{key: layout.config[key] for key in _ARCHITECTURE if key in layout.config})
        ids = (config.pad_token_id or 0, config.audio_token_id, config.audio_bos_token_id, config.audio_delay_token_id)
        if not 0 < config.num_hidden_layers <= len(layout.keys):
            raise ValueError(f"{config.num_hidden_layers} layers of {len(layout.keys)} tensors")
        if not 0 <= min(ids) <= max(ids) < config.vocab_size:
            raise ValueError(f"a token id is outside of the {config.vocab_size} of the vocabulary")
        values = sum(value.numel() for value in _empty(config, Conditioning()).state_dict().values())
    except CheckpointError:
        raise
    except malformed_errors() as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy or download the checkpoint again") from error
    if values > layout.bytes:
        raise CheckpointError(f"{path} asks for {values} values, which the {layout.bytes} bytes of weights cannot hold")
    return config


def _empty(config: HiggsAudioV2Config, conditioning: Conditioning) -> HiggsAudioV2ForConditionalGeneration:
    """The model on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
        add_conditioning(model, conditioning)
    return model


def _load(
    layout: Layout, device: torch.device, dtype: str | torch.dtype | None, quantize: Quantize | None
) -> tuple[HiggsAudioV2ForConditionalGeneration, WhisperTower | None]:
    chosen = choose_dtype(dtype, device)
    check_quantize(quantize, chosen)
    check_checksums(layout.folder)
    tower = None
    config = _config(layout)
    if layout.kind == "native":
        model = _load_native(layout, config, chosen)
    elif layout.kind == "original":
        original = read_original(layout)
        tower = original.whisper
        model = _filled(layout, config, original.conditioning, original.state, chosen)
    else:
        conditioning = _written_conditioning(layout)
        model = _filled(layout, config, conditioning, read_weights(layout.weights), chosen)
    if quantize is not None:
        setattr(model, UNQUANTIZED_FINGERPRINT, base_fingerprint(model))  # how adapters know the base, whole or not
        quantize_layers(model, device)
    torch.nn.Module.to(model, device)  # transformers wraps its own `to` in a way that no type checker follows
    return model.eval(), tower


def _load_native(
    layout: Layout, config: HiggsAudioV2Config, dtype: torch.dtype
) -> HiggsAudioV2ForConditionalGeneration:
    if _TEXT_HEAD not in layout.keys:
        raise CheckpointError(
            f"{layout.folder} has no {_TEXT_HEAD}: it was saved without its text head, which the text loss needs; "
            "save it again with use_text_head=True"
        )
    if (layout.folder / ADAPTER_CONFIG).exists():  # transformers would put it on the base, unasked
        raise CheckpointError(
            f"{layout.folder} is a checkpoint with an adapter in it: keep them in folders of their own"
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
    """A model with its extensions and these weights, all of them and no others. Raises CheckpointError."""
    # Names and shapes are compared before memory is taken for the weights.
    shapes = {key: tuple(value.shape) for key, value in _empty(config, conditioning).state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    wrong = sorted(key for key in shapes.keys() | found.keys() if shapes.get(key) != found.get(key))
    if wrong:
        raise CheckpointError(
            f"the {layout.kind}-format weights in {layout.folder} do not fit its config: {len(wrong)} tensors missing, "
            f"unknown or of another shape, "
            f"such as {wrong[0]}: expected {shapes.get(wrong[0])}, got {found.get(wrong[0])}"
        )
    model = HiggsAudioV2ForConditionalGeneration._from_config(config, use_text_head=True, dtype=dtype)
    add_conditioning(model, conditioning)
    model.load_state_dict(state)
    if conditioning:
        model.model.own = conditioning
    return model


def _written_conditioning(layout: Layout) -> Conditioning:
    try:
        return Conditioning.model_validate(layout.config[CONDITIONING_KEY])
    except (KeyError, ValidationError) as error:
        raise CheckpointError(
            f"{layout.folder / 'config.json'} does not say which modules it adds ({CONDITIONING_KEY}): {error}"
        ) from error


def _whisper_processor(name: str, cache_dir: str | Path | None) -> Any:
    from transformers import WhisperProcessor

    folder = fetch(name, what="Whisper checkpoint", cache_dir=cache_dir)
    try:
        return WhisperProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"the Whisper processor in {folder} cannot be read: {error}") from error
