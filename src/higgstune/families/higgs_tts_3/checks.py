"""The checks of `doctor` that depend on Higgs TTS 3."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from higgstune.codec import CODEC_PREFIX
from higgstune.data.messages import Message
from higgstune.families.base import Batching, GoldenCheck, Layout, base_of
from higgstune.families.higgs_tts_3.checkpoint import HEADS, THETA, tensor_shapes
from higgstune.families.higgs_tts_3.model import HiggsTTS3Config
from higgstune.families.higgs_tts_3.tokens import AUDIO, REFERENCE_AUDIO, REFERENCE_TEXT, TEXT, TTS


class HiggsTTS3Checks:
    """See `families.base.Checks`."""

    control_tokens: tuple[str, ...] = (TTS, TEXT, AUDIO, REFERENCE_AUDIO, REFERENCE_TEXT)
    prompt_end = AUDIO

    def tensor_shapes(self, layout: Layout) -> dict[str, tuple[int, ...]]:
        """Names in the model -> shapes, from the headers."""
        return tensor_shapes(layout)

    def is_optional(self, key: str) -> bool:
        """The codec, and copies of the embeddings as heads."""
        return key in HEADS or key.startswith(CODEC_PREFIX)

    def missing_text(self, missing: Sequence[str]) -> None:
        """No set of missing tensors has an explanation."""

    def config_problems(self, config: HiggsTTS3Config) -> list[str]:
        """`read_config` has refused all contradictions."""
        return []

    def frequencies(self, config: HiggsTTS3Config) -> Tensor:
        """The inverse rotary frequencies [head_dim / 2], float32."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / THETA**exponents

    def rotary(self, model: object) -> nn.Module:
        """The rotary embedding, which all layers share."""
        module: nn.Module = base_of(model).model.rotary_emb
        return module

    def could_be_copies(self, model: object) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Heads are meant to be the embeddings here."""
        return iter(())

    def untaught(self, module: str, layers: int) -> None:
        """All layers learn from every loss."""

    def golden(self, folder: Path, layout: Layout, tokenizer: Any, batching: Batching) -> Iterator[GoldenCheck]:
        """See `golden.Golden`, which imports peft."""
        from higgstune.families.higgs_tts_3.golden import Golden

        return Golden(folder, layout, tokenizer, batching).checks()

    def render(self, messages: Sequence[Message], *, generation: bool) -> None:
        """The folder's chat template is Qwen's, and not used for speech."""
