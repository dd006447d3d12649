"""Draws the rows of clips of Higgs TTS 3: delay pattern, start and stop.

The rule of sglang-omni, mlx-audio and the model's ports, whose greedy rows are equal. vllm-omni ends codebooks 1 to 7
one row later than training does, and lets a clip stop before its eighth frame; it is not offered.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from higgstune.families import rows
from higgstune.families.base import Spec
from higgstune.families.higgs_tts_3.delay import undelay


class RowSampler(rows.RowSampler):
    """Draws the rows of clips and decides when each ends.

    In row r, codebooks after r are still delayed (BOC). From row K on, an EOC of codebook 0 ends the clip: K - 2 more
    rows follow, the last of them when `countdown` reaches 0. The other codebooks are drawn freely until then.
    """

    def __init__(self, spec: Spec, *args: Any, **kwargs: Any) -> None:
        super().__init__(spec, *args, **kwargs)
        self._to_come = torch.zeros_like(self.count)  # 1 + the rows to come; 0: the clip has not ended
        self._codebook = torch.arange(self.num_codebooks, device=self.count.device)

    @property
    def countdown(self) -> Tensor:
        """The rows to come [S]; -1: the clip has not ended."""
        return self._to_come - 1

    def codes(self, slot: int) -> NDArray[np.int64]:
        """The clip in a slot [T, K]; a BOC or EOC that was drawn in place of a code becomes 0, as in every server."""
        codes = undelay(self.rows_of(slot))
        return np.where(codes < self.bos_id, codes, 0)

    def _state(self) -> tuple[Tensor, ...]:
        return *super()._state(), self._to_come

    def _scores(self, logits: Tensor, slots: slice) -> Tensor:
        return logits

    def _row(self, drawn: Tensor, slots: slice) -> Tensor:
        index, to_come = self.count[slots], self._to_come[slots]
        may_end = (to_come == 0) & (index >= self.num_codebooks)
        at_cap = may_end & (index >= self.max_frames[slots]) & (drawn[:, 0] != self.eos_id)
        row = torch.where(self._codebook > index[:, None], self.bos_id, drawn)
        row[:, 0] = torch.where(at_cap, self.eos_id, row[:, 0])
        ends = may_end & (row[:, 0] == self.eos_id)
        to_come = torch.where(ends, self.num_codebooks - 1, torch.where(to_come > 1, to_come - 1, to_come))
        self._to_come[slots] = to_come
        self.hit_cap[slots] |= at_cap
        self.finished[slots] = to_come == 1
        return row
