"""Check of generation: its logits, step by step with the KV cache, are those of a batch as in training."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from higgstune.batch.collate import Batch, PaddedCollator
from higgstune.batch.dataset import PLAIN, Rendering
from higgstune.data.store import Row
from higgstune.diagnostics.prompt import as_spoken, as_trained, two_unequal
from higgstune.diagnostics.report import Finding
from higgstune.families import family_of
from higgstune.families.base import Example, Prompter, base_of
from higgstune.generate.engine import forced_logits
from higgstune.kernels import IGNORE

CHECK = "generation"
# Differences are relative to the standard deviation of the logits. In float32 the maximum counts. In half precision the
# mean does: rounding changes single logits as much as a broken cache would, but not their mean.
_TOLERANCE = 1e-4
_HALF_TOLERANCE = 5e-3  # of a model of 5 layers; rounding adds up as the root of the layers
_HALF_LAYERS = 5


def check_generation(
    model: Any, prompter: Prompter, rows: Sequence[Row], what: str, rendering: Rendering = PLAIN
) -> list[Finding]:
    """Compare teacher-forced logits of two clips of unequal length with those of generating both step by step.

    `model` is a native, an extended or a peft model in eval mode; `what` names it in messages.
    """
    clips, texts = two_unequal(rows), family_of(model).info.texts
    trained = [as_trained(prompter, row, rendering) for row in clips]
    forced = _teacher_forced(model, trained)
    stepped = _step_by_step(model, [as_spoken(prompter, row, rendering, texts) for row in clips], trained, clips)
    gap, allowed = _compare(torch.cat(forced), torch.cat(stepped), base_of(model))
    text = f"{what}: on {sum(map(len, forced))} audio frames, batch and stepwise logits differ by {gap:.2g}"
    if gap <= allowed:
        return [Finding(CHECK, "ok", f"{text} standard deviations (allowed: {allowed:.2g})")]
    advice = (
        "generation does not match training: suspect the KV cache, the attention implementation or the padding of "
        "these versions of torch and transformers, which the check of the environment lists"
    )
    return [Finding(CHECK, "failed", f"{text} standard deviations, more than {allowed:.2g}", advice)]


def _compare(forced: Tensor, stepped: Tensor, base: Any) -> tuple[float, float]:
    """Two sets of logits [frames, K * V] -> their difference in standard deviations, and the tolerance."""
    gaps, spread = (forced - stepped).abs(), max(1.0, forced.std().item())
    if base.dtype in (torch.bfloat16, torch.float16):
        depth = max(1.0, family_of(base).spec(base.config).layers / _HALF_LAYERS) ** 0.5
        return gaps.mean().item() / spread, _HALF_TOLERANCE * depth
    return gaps.max().item() / spread, _TOLERANCE


def collate(model: Any, examples: Sequence[Example]) -> Batch:
    """Examples as a padded batch with targets."""
    return PaddedCollator.of(family_of(model).spec(base_of(model).config))(examples)


def _teacher_forced(model: Any, examples: list[Example]) -> list[Tensor]:
    """For each example the audio logits [frames, K * V] of its last target's delayed frames, on the CPU."""
    batch = collate(model, examples)
    with torch.inference_mode():
        logits = family_of(model).label_logits(model, batch, len(batch["audio_positions"]), nullcontext())
    collected, start = [], 0
    for example in examples:
        labelled = np.flatnonzero((example.audio_labels != IGNORE).any(-1))
        positions = np.flatnonzero(example.audio_mask)[labelled]
        of_example = logits["audio_logits"][start : start + len(positions)]
        collected.append(of_example[_last_run(positions) :].float().cpu())
        start += len(positions)
    return collected


def _last_run(positions: np.ndarray) -> int:
    """The index at which the last contiguous run of positions starts: a conversation may have several targets."""
    breaks = np.flatnonzero(np.diff(positions) != 1)
    return int(breaks[-1]) + 1 if len(breaks) else 0


def _step_by_step(model: Any, prompts: list[Example], examples: list[Example], clips: Sequence[Row]) -> list[Tensor]:
    """The same logits from generation of a batch that is fed the clips' delayed frames."""
    family = family_of(model)
    extra = family.spec(base_of(model).config).extra_rows
    rows = [
        example.audio_input_ids[-(len(clip.codes) + extra) :] for example, clip in zip(examples, clips, strict=True)
    ]
    return [logits.flatten(1) for logits in forced_logits(model, prompts, rows)]
