"""Keys and values of what prompts begin with: a scene, a voice's reference. Most texts are spoken in the same ones.

Letters in shapes: L layers, P tokens, G key heads, d head size, K codebooks.
"""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from higgstune.families.base import Example

_LEAST = 16  # tokens for which a copy pays
_MUCH = 64  # new tokens: a reference of 3 s, or a long text


class _Prefix(NamedTuple):
    rows: NDArray[np.int64]  # [P, 1 + K]
    keys_values: Tensor  # [L, P, 2G, d]


class Prefixes:
    """The prompts read last, of one model, each under its adapter: another adapter's keys would carry its voice."""

    def __init__(self, limit: int) -> None:
        """`limit` in bytes; 0 keeps nothing."""
        self._limit, self.bytes = limit, 0
        self._kept: OrderedDict[tuple[str, int], _Prefix] = OrderedDict()  # the last one used is the last
        self._count = 0

    def copy(self, prompt: Example, into: Tensor, adapter: str) -> int:
        """Copy what is known of a prompt into a slot [L, positions, 2G, d]; how many of its first tokens that are."""
        rows, best, longest = _identity(prompt), None, 0
        for key, prefix in self._kept.items():
            if key[0] == adapter and (length := _common(rows, prefix.rows)) > longest:
                best, longest = key, length
        if best is None or longest < _LEAST:
            return 0
        into[:, :longest] = self._kept[best].keys_values[:, :longest]
        self._kept.move_to_end(best)
        return longest

    def keep(self, prompt: Example, known: int, cache: Tensor, adapter: str) -> None:
        """Keep a prompt of which much was new, from its slot, in place of those not used for the longest."""
        if 2 * known >= len(prompt) and len(prompt) - known < _MUCH:
            return
        size = cache[:, : len(prompt)].nbytes
        if size > self._limit:
            return
        self._kept[adapter, self._count] = _Prefix(_identity(prompt), cache[:, : len(prompt)].clone())
        self._count, self.bytes = self._count + 1, self.bytes + size
        while self.bytes > self._limit:
            self.bytes -= self._kept.popitem(last=False)[1].keys_values.nbytes

    def forget(self, adapter: str) -> None:
        """Drop what was read with an adapter."""
        for key in [key for key in self._kept if key[0] == adapter]:
            self.bytes -= self._kept.pop(key).keys_values.nbytes


def _identity(prompt: Example) -> NDArray[np.int64]:
    """What decides a prompt's keys [P, 1 + K]: its ids, and the codes of its audio frames."""
    rows = np.zeros((len(prompt), 1 + prompt.audio_input_ids.shape[1]), dtype=np.int64)
    rows[:, 0] = prompt.input_ids
    rows[prompt.audio_mask, 0] = -1
    rows[prompt.audio_mask, 1:] = prompt.audio_input_ids
    return rows


def _common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """How many of the first rows are equal."""
    length = min(len(a), len(b))
    other = (a[:length] != b[:length]).any(1)
    return int(other.argmax()) if other.any() else length
