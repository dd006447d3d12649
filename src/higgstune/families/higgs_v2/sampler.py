"""Draws the rows of a clip: delay pattern, start and stop."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from higgstune.families.base import Spec
from higgstune.families.higgs_v2.delay import codes_from_frames
from higgstune.families.sampling import Sampling, filtered


class RowSampler:
    """Draws the rows of one clip, one after the other, and decides when it ends.

    Row 0 is all BOS. In row r, codebook k is still delayed (BOS) while r <= k. The first EOS of any codebook fixes the
    number of frames T, and codebook k ends in row T + 1 + k exactly as in training; the native processor ends it one
    row later.
    """

    def __init__(self, spec: Spec, sampling: Sampling, *, max_frames: int, seed: int) -> None:
        self.sampling = sampling
        self.num_codebooks = spec.num_codebooks
        self.bos_id = spec.stream_bos
        self.eos_id = spec.stream_eos
        self.max_frames = max_frames
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = [[self.bos_id] * self.num_codebooks]
        self.frames: int | None = None  # T, once known
        self.hit_cap = False

    @property
    def finished(self) -> bool:
        """Whether all codebooks have ended."""
        return self.frames is not None and len(self.rows) > self.frames + self.num_codebooks

    def step(self, logits: Tensor) -> list[int]:
        """Draw the next row [K] from logits [K, V] (float32, on the CPU) and append it to `rows`."""
        row_index = len(self.rows)
        row = self._draw(logits, row_index)
        if self.frames is None:
            ended = [row_index - 1 - k for k in range(min(row_index, self.num_codebooks)) if row[k] == self.eos_id]
            if ended:
                self.frames = min(ended)
            elif row_index > self.max_frames:
                self.frames, self.hit_cap = self.max_frames, True
        row = [self._forced(k, row_index, code) for k, code in enumerate(row)]
        self.rows.append(row)
        return row

    def codes(self) -> NDArray[np.int64]:
        """The clip [T, K]."""
        return codes_from_frames(self.rows, eos_id=self.eos_id)

    def _forced(self, k: int, row_index: int, code: int) -> int:
        if row_index <= k:
            return self.bos_id
        return self.eos_id if self.frames is not None and row_index >= self.frames + 1 + k else code

    def _draw(self, logits: Tensor, row_index: int) -> list[int]:
        scores = logits.clone()
        scores[:, self.bos_id] = -torch.inf
        codes_only = scores.clone()
        codes_only[:, self.eos_id] = -torch.inf
        # A clip has at least one frame; once T is fixed, only `_forced` writes EOS.
        at_least_one = torch.arange(self.num_codebooks) <= row_index - 2
        may_end = at_least_one if self.frames is None else torch.zeros_like(at_least_one)
        scores[~may_end, self.eos_id] = -torch.inf
        if self.sampling.greedy:
            return scores.argmax(dim=-1).tolist()
        drawn = self._multinomial(filtered(scores / self.sampling.temperature, self.sampling))
        repeated = self._repeated(drawn)
        if repeated.any():
            drawn[repeated] = self._multinomial(codes_only[repeated])
        return drawn.tolist()

    def _multinomial(self, scores: Tensor) -> Tensor:
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator).squeeze(-1)

    def _repeated(self, drawn: Tensor) -> Tensor:
        """Which codebooks [K] have drawn a code that is too frequent in the window; never BOS or EOS."""
        window = self.rows[1:][-self.sampling.repeat_window :] if self.sampling.repeat_window else []
        if not window:
            return torch.zeros(self.num_codebooks, dtype=torch.bool)
        counts = (torch.tensor(window) == drawn).sum(0)
        return (counts >= self.sampling.max_repeats) & (drawn != self.bos_id) & (drawn != self.eos_id)
