"""A trainer with a tiny model, and examples for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fake_codec import FakeCodec
from tiny_checkpoint import random_codes, tiny_prompter
from transformers import TrainingArguments

from higgstune.batch.dataset import TARGET
from higgstune.config.recipe import Lora
from higgstune.data.messages import speech_messages
from higgstune.families.base import Example
from higgstune.families.higgs_v2.family import FAMILY
from higgstune.families.higgs_v2.prompter import Prompter
from higgstune.model.adapters import add_lora
from higgstune.model.load import ModelAndTokenizers
from higgstune.training.trainer import HiggsAudioTrainer

CODES = 32


def loaded_and_prompter() -> tuple[ModelAndTokenizers, Prompter]:
    model, prompter = tiny_prompter(codes=CODES)
    codec = FakeCodec(CODES)
    loaded = ModelAndTokenizers(
        model, prompter.tokenizer, codec, model.config, "tiny", revision=None, codec="fake", family=FAMILY
    )
    return loaded, prompter


def example(prompter: Prompter, frames: int, seed: int, text: str = "The sun rises in the east.") -> Example:
    codes = random_codes(frames, seed, codes=CODES)
    return prompter.example([*speech_messages(text), TARGET], [codes], text_targets="transcript")


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
        "dataloader_pin_memory": False, "seed": 0,
    }  # fmt: skip
    return TrainingArguments(**(settings | changes))


def trainer(folder: Path, kind: str | None = "full", data: Sequence[Example] | None = None, **changes: Any) -> Any:
    loaded, prompter = loaded_and_prompter()
    torch.manual_seed(0)
    adapted = add_lora(loaded.model, Lora(r=4), kind) if kind else None
    weights = changes.pop("weights", None)
    evaluated = changes.pop("eval_dataset", None)
    warmup_from = changes.pop("warmup_from", 1)
    return HiggsAudioTrainer(
        loaded,
        arguments(folder, **changes),
        train_dataset=data or [example(prompter, 4 + i, seed=i) for i in range(8)],
        eval_dataset=evaluated,
        model=adapted,
        weights=weights,
        warmup_from=warmup_from,
    )
