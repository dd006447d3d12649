"""Examples of all kinds, and models with adapters, for packed batches."""

from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tiny_checkpoint import random_codes, tiny_prompter

from higgstune.batch.dataset import TARGET
from higgstune.codec.base import WhisperFeatures
from higgstune.config.recipe import Lora
from higgstune.data.messages import speech_messages
from higgstune.families.base import Conditioning, Example, WhisperSpec
from higgstune.families.higgs_v2.extensions import add_conditioning
from higgstune.families.higgs_v2.prompter import Prompter
from higgstune.model.adapters import add_lora

CODES = 32
D_MODEL = 6
TEXTS = ["Hello.", "Good morning to you all.", "Sun.", "The sun rises in the east, as it does.", "Hello."]


def examples(prompter: Prompter, *, whisper: bool = False) -> list[Example]:
    """Unequal lengths; a reference as a turn, a voice in the scene (Whisper features or codes), two without any."""
    made = []
    for index, text in enumerate(TEXTS):
        target, reference = (random_codes(n, seed=9 * index + n, codes=CODES) for n in (3 + 5 * index, 4))
        turn, scene = index == 1, index == 3
        features = np.random.default_rng(index).normal(size=(7, D_MODEL)).astype(np.float16)
        audio: list[Any] = (
            [reference] if turn else [WhisperFeatures(features, (7,)) if whisper else reference] if scene else []
        )
        request = speech_messages(text, context=[("Hi.", "r")] if turn else [], voice="r" if scene else None)
        made.append(prompter.example([*request, TARGET], [*audio, target], text_targets="transcript"))
    return made


def adapted(
    kind: str, dtype: torch.dtype, *, conditioned: bool = False, lora: Lora | None = None
) -> tuple[PeftModel, Prompter]:
    """A model whose LoRA, and whose extensions, are already something."""
    model, prompter = tiny_prompter(codes=CODES)
    if conditioned:
        shape = WhisperSpec(
            checkpoint="w", revision="r", d_model=D_MODEL, chunk_frames=7, token_id=prompter.whisper_token_id
        )
        add_conditioning(model, Conditioning(audio_attention=True, whisper=shape))
    torch.manual_seed(1)
    peft_model = add_lora(model, lora or Lora(r=4, alpha=8), kind).to(dtype)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name or "audio_encoder_proj" in name or "audio_attn.o_proj" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return peft_model, prompter
