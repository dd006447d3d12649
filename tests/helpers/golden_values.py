"""Read tests/golden: what the reference code computed (see tests/golden/README.md)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


class Golden:
    """One file: `values` without the weights, `weights` under their original names, the original `config`."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.metadata: dict[str, str] = file.metadata() or {}
        self.weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
        self.values: dict[str, Tensor] = {k: v for k, v in tensors.items() if not k.startswith("weights.")}

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(self.metadata["config"])

    def save_original_checkpoint(self, folder: Path) -> Path:
        """An original-format checkpoint with these weights."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file({k: v.clone() for k, v in self.weights.items()}, folder / "model.safetensors")
        return folder

    def native_inputs(self) -> dict[str, Tensor]:
        """The batch as the native forward takes it. Delayed frames stand in the order of the batch."""
        mask = self.values["audio_out_mask"].bool()
        rows = self.values["audio_out_ids"].T  # [rows, K] over the whole batch
        counts = mask.sum(-1).tolist()
        audio = torch.zeros(len(counts), max(counts), rows.shape[1], dtype=torch.long)
        valid = torch.zeros(len(counts), max(counts), dtype=torch.bool)
        start = 0
        for b, count in enumerate(counts):
            audio[b, :count] = rows[start : start + count]
            valid[b, :count] = True
            start += count
        attention = self.values["expanded_attention_mask"]
        return {
            "input_ids": self.values["expanded_input_ids"],
            "attention_mask": attention,
            "position_ids": (attention.cumsum(-1) - 1).clamp(min=0),
            "audio_input_ids": audio,
            "audio_input_ids_mask": valid,
        }
