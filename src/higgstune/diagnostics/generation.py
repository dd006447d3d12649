"""Speaking is training: the logits of a whole batch are those of generation, row by row through the KV cache."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from higgstune.batch.collate import Batch, PaddedCollator
from higgstune.batch.dataset import PLAIN, Rendering
from higgstune.data.store import Row
from higgstune.diagnostics.prompt import as_spoken, as_trained, two_unequal
from higgstune.diagnostics.report import Finding
from higgstune.families.base import Example
from higgstune.families.higgs_v2.delay import build_frames
from higgstune.families.higgs_v2.extensions import base_of
from higgstune.families.higgs_v2.prompter import Prompter
from higgstune.generate.engine import Decoder
from higgstune.kernels.loss import IGNORE

CHECK = "generation"
# Differences are compared with the spread (standard deviation) of the logits. In float32 the largest of them counts. In
# half precision the mean does: single logits are rounded by as much as a broken cache moves them, their mean is not.
_TOLERANCE = 1e-4
_HALF_TOLERANCE = 5e-3  # of a model of 5 layers; rounding adds up as the root of the layers
_HALF_LAYERS = 5


def check_generation(
    model: Any, prompter: Prompter, rows: Sequence[Row], what: str, rendering: Rendering = PLAIN
) -> list[Finding]:
    """Teacher-forced logits of two clips of unequal length against those of step-by-step generation of both at once.

    `model` is a native, an extended or a peft model in eval mode; `what` names it.
    """
    clips = two_unequal(rows)
    forced = _teacher_forced(model, [as_trained(prompter, row, rendering) for row in clips])
    stepped = _step_by_step(model, [as_spoken(prompter, row, rendering) for row in clips], clips)
    gap, allowed = _compare(torch.cat(forced), torch.cat(stepped), base_of(model))
    text = f"{what}: on {sum(map(len, forced))} rows of audio, logits of a batch and step by step differ by {gap:.2g}"
    if gap <= allowed:
        return [Finding(CHECK, "ok", f"{text} of their spread (allowed {allowed:.2g})")]
    advice = (
        "what is spoken is not what was trained: suspect the KV cache, the attention implementation or the padding of "
        "these versions of torch and transformers; compare them with the environment above"
    )
    return [Finding(CHECK, "failed", f"{text} of their spread, more than {allowed:.2g}", advice)]


def _compare(forced: Tensor, stepped: Tensor, base: Any) -> tuple[float, float]:
    """Logits [rows, K * V] of both ways -> their difference in spreads, and how much is allowed."""
    gaps, spread = (forced - stepped).abs(), max(1.0, forced.std().item())
    if base.dtype in (torch.bfloat16, torch.float16):
        depth = max(1.0, base.config.num_hidden_layers / _HALF_LAYERS) ** 0.5
        return gaps.mean().item() / spread, _HALF_TOLERANCE * depth
    return gaps.max().item() / spread, _TOLERANCE


def collate(model: Any, examples: Sequence[Example]) -> Batch:
    """Examples as a batch of the model's forward, with targets."""
    config = base_of(model).config
    return PaddedCollator(pad_id=config.pad_token_id or 0, stream_eos=config.audio_stream_eos_id)(examples)


def inputs_of(model: Any, batch: Batch) -> Batch:
    """A batch without its targets, on the model's device."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items() if not key.endswith(("_positions", "_targets"))}


def _teacher_forced(model: Any, examples: list[Example]) -> list[Tensor]:
    """For each example the audio logits [rows, K * V] that predict rows 1, 2, ... of its last target, on the CPU."""
    with torch.inference_mode():
        logits = model(**inputs_of(model, collate(model, examples))).logits
    collected = []
    for b, example in enumerate(examples):
        labelled = np.flatnonzero((example.audio_labels != IGNORE).any(-1))
        positions = np.flatnonzero(example.audio_mask)[labelled] - 1
        positions = positions[_last_run(positions) :]
        collected.append(logits[b, torch.from_numpy(positions)].float().cpu())
    return collected


def _last_run(positions: np.ndarray) -> int:
    """Where the last unbroken run of positions begins: a conversation may have several targets."""
    breaks = np.flatnonzero(np.diff(positions) != 1)
    return int(breaks[-1]) + 1 if len(breaks) else 0


def _step_by_step(model: Any, prompts: list[Example], clips: Sequence[Row]) -> list[Tensor]:
    """The same logits from generation: left-padded prompts in one batch, fed the clips' own rows."""
    config = base_of(model).config
    ids = {"bos_id": config.audio_stream_bos_id, "eos_id": config.audio_stream_eos_id}
    rows = [build_frames(clip.codes, **ids)[0] for clip in clips]
    collected: list[list[Tensor]] = [[] for _ in rows]
    with torch.inference_mode():
        decoder = Decoder(model, prompts)
        for step in range(max(map(len, rows)) - 1):
            fed = np.stack([clip[min(step, len(clip) - 1)] for clip in rows])
            logits = decoder.step(torch.from_numpy(fed)).flatten(1).float().cpu()
            for b, clip in enumerate(rows):
                if step < len(clip) - 1:
                    collected[b].append(logits[b])
    return [torch.stack(logits) for logits in collected]
