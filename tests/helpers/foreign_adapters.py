"""Adapters as plain peft and other trainers save them: no card, and the names of what was around the model."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from higgstune.model.adapters import with_adapter
from higgstune.model.load import load_model
from higgstune.peft_compat import LoraConfig

WEIGHTS = "adapter_model.safetensors"


def save_foreign(
    base: Path, folder: Path, *, targets: Sequence[str] = ("q_proj", "v_proj"), in_full: Sequence[str] = (), **lora: Any
) -> Path:
    """An adapter that moves the base, as peft saves it. `in_full`: exact names of modules that are trained in full."""
    model = load_model(base, device="cpu", dtype="float32")
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), modules_to_save=list(in_full) or None, **lora)
    adapted = with_adapter(model, config)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name or ".modules_to_save." in name:
                value.add_(0.05 * torch.randn_like(value))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def renamed(adapter: Path, folder: Path, change: Callable[[str], str], **config: Any) -> Path:
    """A copy whose tensors have other names, and changes of its adapter_config.json."""
    shutil.copytree(adapter, folder)
    weights = load_file(folder / WEIGHTS)
    save_file({change(key): value for key, value in weights.items()}, folder / WEIGHTS)
    return configured(folder, **config)


def configured(folder: Path, **changes: Any) -> Path:
    """Change an adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder
