"""Draws the rows of a clip of Higgs TTS 3: delay pattern, start and stop.

The rule of sglang-omni, mlx-audio and the model's ports, whose greedy rows are equal. vllm-omni ends codebooks 1 to 7
one row later than training does, and lets a clip stop before its eighth frame; it is not offered.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from higgstune.families.base import Spec
from higgstune.families.higgs_tts_3.delay import undelay
from higgstune.families.sampling import Sampling, filtered


class RowSampler:
    """Draws the rows of one clip, one after the other, and decides when it ends.

    In row r, codebooks after r are still delayed (BOC). From row K on, an EOC of codebook 0 ends the clip: K - 2 more
    rows follow, the last of them when `countdown` reaches 0. The other codebooks are drawn freely until then.
    """

    def __init__(self, spec: Spec, sampling: Sampling, *, max_frames: int, seed: int) -> None:
        self.sampling = sampling
        self.num_codebooks = spec.num_codebooks
        self.boc_id = spec.stream_bos
        self.eoc_id = spec.stream_eos
        self.max_frames = max_frames
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: list[list[int]] = []
        self.countdown = -1  # rows to come; -1: the clip has not ended
        self.hit_cap = False

    @property
    def finished(self) -> bool:
        """Whether the last row was drawn."""
        return self.countdown == 0

    def step(self, logits: Tensor) -> list[int]:
        """Draw the next row [K] from logits [K, V] (float32, on the CPU) and append it to `rows`."""
        index = len(self.rows)
        row = [self.boc_id if k > index else code for k, code in enumerate(self._drawn(logits))]
        if self.countdown > 0:
            self.countdown -= 1
        elif index >= self.num_codebooks:
            self.hit_cap = index >= self.max_frames and row[0] != self.eoc_id
            if self.hit_cap:
                row[0] = self.eoc_id
            if row[0] == self.eoc_id:
                self.countdown = self.num_codebooks - 2
        self.rows.append(row)
        return row

    def codes(self) -> NDArray[np.int64]:
        """The clip [T, K]; a BOC or EOC that was drawn in place of a code becomes 0, as in every server."""
        codes = undelay(self.rows)
        return np.where(codes < self.boc_id, codes, 0)

    def _drawn(self, logits: Tensor) -> list[int]:
        if self.sampling.greedy:
            return logits.argmax(dim=-1).tolist()
        scores = filtered(logits / self.sampling.temperature, self.sampling).softmax(dim=-1)
        return torch.multinomial(scores, 1, generator=self.generator).squeeze(-1).tolist()
