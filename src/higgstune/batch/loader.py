"""Loads packs of examples for training and validation."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from higgstune.batch.collate import Packed, pack
from higgstune.batch.packing import PackSampler, PackSize
from higgstune.families.base import Example
from higgstune.kernels import IGNORE

_AHEAD = 4  # packs that are built before they are needed


class PackLoader(DataLoader[Packed]):
    """A `DataLoader` of packs (see `collate.pack`), which one thread builds ahead; there are no worker processes."""

    def __init__(
        self,
        examples: Any,
        size: PackSize,
        *,
        seed: int | None,
        share_prefix: bool = True,
        rank: int = 0,
        processes: int = 1,
        per_step: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        """`examples` is a map-style data set of `Example`s. If it has `lengths()`, no example is built to measure it.
        `per_step`: see `PackSampler`.

        Raises ConfigError for an example that is longer than a pack.
        """
        self.packs = PackSampler(
            example_lengths(examples), size, seed=seed, rank=rank, processes=processes, per_step=per_step
        )
        super().__init__(
            _MutedOnDemand(examples),  # type: ignore[arg-type]
            batch_sampler=self.packs,
            collate_fn=partial(pack, share_prefix=share_prefix),
            pin_memory=pin_memory,
            generator=torch.Generator(),  # drawing from the global one would change what dropout draws
        )

    def __iter__(self) -> "Prefetched":  # type: ignore[override]
        """The packs of an epoch. An example's error is raised in `next`."""
        return Prefetched(super().__iter__())

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is over the packs of this epoch."""
        self.packs.set_epoch(epoch)


class Prefetched(Iterator[Packed]):
    """The items of an iterator in order, computed ahead by one thread, which ends with this object."""

    def __init__(self, source: Iterator[Packed]) -> None:
        """Only the thread uses `source`."""
        self.source = source
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="packs")
        self._coming: deque[Future[Packed]] = deque()
        while len(self._coming) < _AHEAD:
            self._request()

    def __next__(self) -> Packed:
        self._request()
        return self._coming.popleft().result()

    def __del__(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _request(self) -> None:
        self._coming.append(self._thread.submit(next, self.source))


def example_lengths(examples: Any) -> NDArray[np.int64]:
    """The number of tokens of each example, [examples]."""
    if hasattr(examples, "lengths"):
        return examples.lengths()
    return np.array([len(examples[i]) for i in range(len(examples))], dtype=np.int64)


class _MutedOnDemand(Dataset[Example]):
    """The examples; index i < 0 is example ~i without labels (see `PackSampler`)."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        if index >= 0:
            return self.examples[index]
        example: Example = self.examples[~index]
        return replace(
            example,
            text_labels=np.full_like(example.text_labels, IGNORE),
            audio_labels=np.full_like(example.audio_labels, IGNORE),
        )
