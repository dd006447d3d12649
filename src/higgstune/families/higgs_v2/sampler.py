"""Draws the rows of clips: delay pattern, start and stop."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from higgstune.families import rows
from higgstune.families.base import Spec
from higgstune.families.higgs_v2.delay import codes_from_frames


class RowSampler(rows.RowSampler):
    """Draws the rows of clips and decides when each ends.

    Row 0 is all BOS. In row r, codebook k is still delayed (BOS) while r <= k. The first EOS of any codebook fixes the
    number of frames T, and codebook k ends in row T + 1 + k exactly as in training; the native processor ends it one
    row later.
    """

    def __init__(self, spec: Spec, *args: Any, **kwargs: Any) -> None:
        super().__init__(spec, *args, **kwargs)
        self._codes = spec.codes
        self.start = [self.bos_id] * self.num_codebooks
        self.frames = torch.zeros_like(self.count)  # T, once known; before, 0: a clip has at least one frame
        self._codebook = torch.arange(self.num_codebooks, device=self.count.device)

    def codes(self, slot: int) -> NDArray[np.int64]:
        """The clip in a slot [T, K]."""
        return codes_from_frames(self.rows_of(slot), eos_id=self.eos_id)

    def _state(self) -> tuple[Tensor, ...]:
        return *super()._state(), self.frames

    def _scores(self, logits: Tensor, slots: slice) -> Tensor:
        # A clip has at least one frame; once T is fixed, only `_row` writes EOS.
        may_end = (self._codebook <= self.count[slots, None] - 2) & (self.frames[slots, None] == 0)
        scores = logits.clone()
        scores[..., self.bos_id] = -torch.inf
        scores[..., self.eos_id] = scores[..., self.eos_id].masked_fill(~may_end, -torch.inf)
        return scores

    def _again(self, drawn: Tensor, logits: Tensor, slots: slice) -> Tensor:
        """Repetition-aware sampling: a code that is too frequent is drawn again, from all codes as they are."""
        if not any(setting.repeat_window for setting in self._settings[slots]):
            return drawn
        codes = logits[..., : self._codes].softmax(-1)
        again = rows.pick(codes, self._uniform_at(slots, 1))
        return torch.where(self._repeated(drawn, slots), again, drawn)

    def _row(self, drawn: Tensor, slots: slice) -> Tensor:
        index, frames = self.count[slots, None], self.frames[slots, None]
        ends = index - 1 - self._codebook  # T, if codebook k ends here
        first = ends.masked_fill((drawn != self.eos_id) | (ends < 0), torch.iinfo(ends.dtype).max).amin(-1, True)
        at_cap = (frames == 0) & (first > index) & (index > self.max_frames[slots, None])
        ended = torch.where(first <= index, first, torch.where(at_cap, self.max_frames[slots, None], 0))
        frames = torch.where(frames == 0, ended, frames)
        row = torch.where((frames > 0) & (ends >= frames), self.eos_id, drawn)
        row = torch.where(ends < 0, self.bos_id, row)
        self.frames[slots] = frames[:, 0]
        self.hit_cap[slots] |= at_cap[:, 0]
        self.finished[slots] = ((frames > 0) & (index + 1 > frames + self.num_codebooks))[:, 0]
        return row
