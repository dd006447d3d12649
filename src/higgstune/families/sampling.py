"""Sampling settings, and the filters that every family's sampler uses."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from higgstune.errors import ConfigError

if TYPE_CHECKING:  # settings are checked before PyTorch is imported
    from torch import Tensor

MAX_TEMPERATURE = 100.0  # all codes are equally likely long before
_GREEDY = 1e-4  # below this, scores divided by the temperature would overflow


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn; the defaults are those recommended for the released model.

    >>> Sampling(temperature=0.7).top_k
    50
    """

    temperature: float = 1.0  # 0: greedy
    top_k: int = 50  # 0: off
    top_p: float = 0.95  # 1: off
    repeat_window: int = 7  # rows to look back; 0 switches repetition-aware sampling off
    max_repeats: int = 2  # a code that its codebook's window holds this often is redrawn

    def __post_init__(self) -> None:
        """Raises ConfigError for a value out of range."""
        for name, value, holds in (
            ("temperature", self.temperature, 0 <= self.temperature <= MAX_TEMPERATURE),
            ("top_k", self.top_k, self.top_k >= 0),
            ("top_p", self.top_p, 0 < self.top_p <= 1),
            ("repeat_window", self.repeat_window, self.repeat_window >= 0),
            ("max_repeats", self.max_repeats, self.max_repeats >= 1),
        ):
            if not holds:
                raise ConfigError(f"{name} cannot be {value}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest code is taken, as of no temperature at all."""
        return self.temperature < _GREEDY


def filtered(scores: "Tensor", sampling: Sampling) -> "Tensor":
    """Scores [K, V], with -inf for codes that top-k and top-p exclude."""
    if sampling.top_k and sampling.top_k < scores.shape[-1]:
        smallest = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -math.inf)
    if sampling.top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        dropped = before >= sampling.top_p
        dropped[..., 0] = False  # the likeliest stays, however small top_p is
        scores = scores.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)
    return scores
