"""Draws rows of codes for many clips at once: what every family's `RowSampler` shares.

A clip's rows depend on its own logits, settings and seed alone. Its seed gives two uniform numbers for each code of a
row, one for the draw and one for a family that draws again; so neither the clips beside it nor the moment it began
change what it draws. Nothing here reads a value back from the device while clips are drawn.

Letters in shapes: S slots, n clips of a call, R rows, K codebooks, V classes of a codebook, W rows of a window.
"""

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from higgstune.families.sampling import Sampling

_NONE = Sampling(temperature=0)  # of a slot without a clip


class Numbers(Protocol):
    """What of a `families.base.Spec` decides the shape of rows."""

    @property
    def num_codebooks(self) -> int: ...
    @property
    def stream_bos(self) -> int: ...
    @property
    def stream_eos(self) -> int: ...


class RowSampler(ABC):
    """The rows of the clips in S slots. A call of `step` draws one row for each of neighbouring slots."""

    start: list[int] | None = None  # the first row [K], where the family gives it instead of drawing it

    def __init__(self, spec: Numbers, slots: int, device: torch.device | None = None) -> None:
        self.num_codebooks, self.bos_id, self.eos_id = spec.num_codebooks, spec.stream_bos, spec.stream_eos
        self.rows = torch.zeros((slots, 0, spec.num_codebooks), dtype=torch.long, device=device)
        self.count = torch.zeros(slots, dtype=torch.long, device=device)  # of rows so far
        self.max_frames = torch.zeros(slots, dtype=torch.long, device=device)
        self.finished = torch.zeros(slots, dtype=torch.bool, device=device)
        self.hit_cap = torch.zeros(slots, dtype=torch.bool, device=device)  # the frame cap ended the clip
        self._uniform = torch.zeros((slots, 0, 2, spec.num_codebooks), device=device)
        self._settings = [_NONE] * slots
        self._numbers = torch.zeros((len(_numbers(_NONE)), slots), device=device)

    @abstractmethod
    def codes(self, slot: int) -> NDArray[np.int64]:
        """The clip in a slot [T, K]."""

    @abstractmethod
    def _scores(self, logits: Tensor, slots: slice) -> Tensor:
        """Logits [n, K, V] -> those of the classes that the rules allow; the others are -inf."""

    @abstractmethod
    def _row(self, drawn: Tensor, slots: slice) -> Tensor:
        """Drawn classes [n, K] -> the row, with what the delay pattern and the end of a clip force."""

    def rows_of(self, slot: int) -> NDArray[np.int64]:
        """The rows so far of the clip in a slot [R, K]."""
        return self.rows[slot, : int(self.count[slot])].cpu().numpy()

    def admit(self, slot: int, sampling: Sampling, *, max_frames: int, seed: int) -> None:
        """Start a clip in a slot."""
        more = max_frames + self.num_codebooks + 2 - self.rows.shape[1]
        if more > 0:
            self.rows = F.pad(self.rows, (0, 0, 0, more))
            self._uniform = F.pad(self._uniform, (0, 0, 0, 0, 0, more))
        for state in self._state():
            state[slot] = 0
        self.max_frames[slot] = max_frames
        generator = torch.Generator().manual_seed(seed)
        self._uniform[slot] = torch.rand(self._uniform.shape[1:], generator=generator)
        self._settings[slot] = sampling
        self._numbers[:, slot] = torch.tensor(_numbers(sampling))
        if self.start is not None:
            self.rows[slot, 0] = torch.tensor(self.start)
            self.count[slot] = 1

    def move(self, slot: int, to: int) -> None:
        """Put the clip of a slot into another one."""
        for state in (*self._state(), self._uniform, self._numbers.T):
            state[to] = state[slot]
        self._settings[to] = self._settings[slot]

    def step(self, logits: Tensor, first: int = 0) -> Tensor:
        """Draw the next row [n, K] from logits [n, K, V] for the n slots from `first` on."""
        slots = slice(first, first + len(logits))
        logits = logits.float()
        scores = self._scores(logits, slots)
        drawn = scores.argmax(-1)
        if not all(setting.greedy for setting in self._settings[slots]):
            greedy = self._numbers[0, slots, None] == 0
            drawn = torch.where(greedy, drawn, self._again(self._drawn(scores, slots), logits, slots))
        alive = ~self.finished[slots]  # a clip that has ended keeps its rows, whatever is drawn after them
        row = self._row(drawn, slots)
        at = self.count[slots, None, None].expand(-1, 1, self.num_codebooks)
        self.rows[slots].scatter_(1, at, row[:, None])
        self.count[slots] += alive
        return row

    def _again(self, drawn: Tensor, logits: Tensor, slots: slice) -> Tensor:
        """Classes [n, K] after what a family draws again."""
        return drawn

    def _state(self) -> tuple[Tensor, ...]:
        """What belongs to a clip, each [S, ...]."""
        return self.rows, self.count, self.max_frames, self.finished, self.hit_cap

    def _drawn(self, scores: Tensor, slots: slice) -> Tensor:
        temperature, top_k, top_p, *_ = self._numbers[:, slots, None, None]
        most = max(setting.top_k or scores.shape[-1] for setting in self._settings[slots])
        scores = scores / torch.where(temperature == 0, 1, temperature)
        likeliest, classes = scores.topk(min(most, scores.shape[-1]), dim=-1)
        rank = torch.arange(likeliest.shape[-1], device=scores.device)
        probability = likeliest.masked_fill((top_k > 0) & (rank >= top_k), -torch.inf).softmax(-1)
        before = probability.cumsum(-1) - probability
        kept = (before < top_p) | (rank == 0)  # the likeliest stays, however small top_p is
        # In the order of codes: likeliest first, a rounding difference between two alike would exchange them.
        weights = torch.zeros_like(scores).scatter_(-1, classes, probability * kept)
        return pick(weights, self._uniform_at(slots, 0))

    def _uniform_at(self, slots: slice, which: int) -> Tensor:
        """The uniform numbers [n, K] of the next row."""
        at = self.count[slots, None, None].expand(-1, 1, self.num_codebooks)
        return self._uniform[slots, :, which].gather(1, at)[:, 0]

    def _repeated(self, drawn: Tensor, slots: slice) -> Tensor:
        """Which codebooks [n, K] have drawn a code that is too frequent in their window; never BOS or EOS."""
        most = max(setting.repeat_window for setting in self._settings[slots])
        window, repeats = self._numbers[3:, slots, None].long()
        back = torch.arange(1, most + 1, device=drawn.device)  # rows ago
        at = self.count[slots, None] - back
        inside = (at >= int(self.start is not None)) & (back <= window)
        past = self.rows[slots].gather(1, at.clamp(min=0)[..., None].expand(-1, -1, self.num_codebooks))
        times = ((past == drawn[:, None]) & inside[..., None]).sum(1)
        return (times >= repeats) & (drawn != self.bos_id) & (drawn != self.eos_id)


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Where [...] the cumulated weights [..., N] reach a share of their sum [...] in [0, 1); never at a weight of 0."""
    reached = weights.cumsum(-1)
    picked = (reached <= uniform[..., None] * reached[..., -1:]).sum(-1)
    last = (reached < reached[..., -1:]).sum(-1)  # the product above may round up to the whole sum
    return torch.minimum(picked, last)


def _numbers(sampling: Sampling) -> list[float]:
    temperature = 0.0 if sampling.greedy else sampling.temperature
    return [temperature, sampling.top_k, sampling.top_p, sampling.repeat_window, sampling.max_repeats]
