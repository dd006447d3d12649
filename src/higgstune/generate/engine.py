"""Step-by-step generation with a KV cache, for a batch of prompts of unequal lengths.

The model reads each prompt once, then one row of codes at a time. The family decides how: see `Decoder` and
`RowSampler` in `families.base`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from higgstune.families import family_of
from higgstune.families.base import Example, base_of
from higgstune.families.sampling import Sampling


@dataclass(frozen=True)
class Generated:
    """One generated clip."""

    codes: NDArray[np.int64]  # [frames, K]
    hit_cap: bool  # the frame cap ended it, not the model


def generate(
    model: Any,
    prompts: Sequence[Example],
    *,
    max_frames: Sequence[int],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    on_row: Callable[[], None] | None = None,
    sync_logits: Callable[[Tensor], Tensor] | None = None,
) -> list[Generated]:
    """Generate the clips of a batch of prompts (see `Prompter.prompt`). A clip depends only on its own prompt and seed,
    up to the rounding of batched arithmetic. `model` is a loaded model or a peft model around one, in eval mode.

    If several processes run one model together, `sync_logits` gives all of them the logits of one. Otherwise a rounding
    difference would make them draw different codes, and one would stop while the others wait for it.
    """
    family = family_of(model)
    spec = family.spec(base_of(model).config)
    samplers = [
        family.sampler(spec, sampling or Sampling(), max_frames=cap, seed=seed)
        for cap, seed in zip(max_frames, seeds, strict=True)
    ]
    with torch.inference_mode():
        decoder = family.decoder(model, prompts)
        logits = decoder.logits
        while not all(sampler.finished for sampler in samplers):
            if logits is None:
                logits = decoder.step(torch.tensor([sampler.rows[-1] for sampler in samplers]))
            drawn_from = logits.float().cpu()
            drawn_from = drawn_from if sync_logits is None else sync_logits(drawn_from)
            for sampler, row_logits in zip(samplers, drawn_from, strict=True):
                if not sampler.finished:
                    sampler.step(row_logits)
            logits = None
            if on_row is not None:
                on_row()
    return [Generated(sampler.codes(), sampler.hit_cap) for sampler in samplers]
