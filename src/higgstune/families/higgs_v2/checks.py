"""The checks of `doctor` that depend on Higgs Audio v2."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import HiggsAudioV2Config

from higgstune.data.messages import Message
from higgstune.families.base import Batching, GoldenCheck, Layout, base_of
from higgstune.families.higgs_v2.checkpoint import inverse_frequencies
from higgstune.families.higgs_v2.extensions import is_conditioning_key
from higgstune.families.higgs_v2.original import native_state
from higgstune.families.higgs_v2.prompt import (
    AUDIO_EOS,
    AUDIO_OUT,
    AUDIO_OUT_BOS,
    BEGIN_OF_TEXT,
    END_OF_TURN,
    SCENE_END,
    SCENE_START,
    render,
)

_ENCODER = "audio_tower."  # the Whisper encoder in an original checkpoint; it is outside the native model


class HiggsV2Checks:
    """See `families.base.Checks`."""

    control_tokens: tuple[str, ...] = (
        BEGIN_OF_TEXT, "<|start_header_id|>", "<|end_header_id|>", END_OF_TURN, SCENE_START, SCENE_END, AUDIO_OUT_BOS,
        AUDIO_OUT, AUDIO_EOS,
    )  # fmt: skip
    prompt_end = AUDIO_OUT_BOS

    def tensor_shapes(self, layout: Layout) -> dict[str, tuple[int, ...]]:
        """Names in the native layout -> shapes, from the headers."""
        state: dict[str, Tensor] = {}
        for file in layout.weights:
            with safe_open(file, "pt") as weights:
                for key in weights.keys():  # noqa: SIM118
                    state[key] = torch.empty(weights.get_slice(key).get_shape(), device="meta")
        if layout.kind == "original":
            state = native_state({key: value for key, value in state.items() if not key.startswith(_ENCODER)})
        return {key: tuple(value.shape) for key, value in state.items()}

    def is_optional(self, key: str) -> bool:
        """Extensions, and the rotary buffers of some checkpoints."""
        return is_conditioning_key(key) or key.endswith(("rotary_emb.inv_freq", "rotary_emb.original_inv_freq"))

    def config_problems(self, config: HiggsAudioV2Config) -> list[str]:
        """Contradictions among the ids of special tokens and codes."""
        names = ("audio_token_id", "audio_bos_token_id", "audio_delay_token_id", "bos_token_id", "pad_token_id")
        ids = {name: getattr(config, name) for name in names if isinstance(getattr(config, name), int)}
        problems = [
            f"{name} {i} is outside the vocabulary of {config.vocab_size}"
            for name, i in ids.items()
            if not 0 <= i < config.vocab_size
        ]
        audio = [name for name in ids if name.startswith("audio_")]
        if len({ids[name] for name in audio}) < len(audio):
            problems.append("two of " + ", ".join(f"{name} {ids[name]}" for name in audio) + " are the same")
        bos, eos = config.audio_stream_bos_id, config.audio_stream_eos_id
        if sorted((bos, eos)) != [config.codebook_size - 2, config.codebook_size - 1]:
            problems.append(
                f"the stream ids {bos} and {eos} must be the last two of codebook_size {config.codebook_size}"
            )
        return problems

    def frequencies(self, config: HiggsAudioV2Config) -> Tensor:
        """See `inverse_frequencies`."""
        return inverse_frequencies(config)

    def rotary(self, model: Any) -> nn.Module:
        """The rotary embedding, which all layers share."""
        module: nn.Module = base_of(model).model.rotary_emb
        return module

    def could_be_copies(self, model: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Heads and embeddings, and the two feed-forward networks of each layer."""
        base = base_of(model)
        yield (
            "audio_lm_head is embed_audio_tokens",
            base.audio_lm_head.weight,
            base.model.embed_audio_tokens.embed_audio_tokens.weight,
        )
        if base.text_lm_head is not None and not base.config.tie_word_embeddings:
            yield "text_lm_head is embed_tokens", base.text_lm_head.weight, base.model.embed_tokens.weight
        for index, layer in enumerate(base.model.layers):
            yield f"layers.{index}.audio_mlp is mlp", layer.audio_mlp.down_proj.weight, layer.mlp.down_proj.weight

    def missing_text(self, missing: Sequence[str]) -> str | None:
        """An explanation of a known set of missing tensors."""
        if list(missing) == ["text_lm_head.weight"]:
            return "text_lm_head.weight is missing: the checkpoint was saved without its text head"
        return None

    def untaught(self, module: str, layers: int) -> str | None:
        """The last feed-forward network of a pathway learns from the loss of that pathway alone."""
        for pathway, weight in (("mlp", "text_weight"), ("audio_mlp", "audio_weight")):
            if module.startswith(f"model.layers.{layers - 1}.{pathway}."):
                return weight
        return None

    def golden(self, folder: Path, layout: Layout, tokenizer: Any, batching: Batching) -> Iterator[GoldenCheck]:
        """None: the golden values of this family are parts of its tests."""
        return iter(())

    def render(self, messages: Sequence[Message], *, generation: bool) -> str | None:
        """The prompt as the released checkpoint's chat template writes it."""
        return render(messages, generation=generation)
