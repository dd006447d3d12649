"""Packs of examples, one after the other, for training and for validation."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from higgstune.batch.packed import Packed, pack
from higgstune.batch.packing import PackSampler, PackSize
from higgstune.prompt.delay import IGNORE
from higgstune.prompt.example import Example


class PackLoader(DataLoader[Packed]):
    """A `DataLoader` that gives packed batches: see `batch.packed.pack`."""

    def __init__(
        self,
        examples: Any,
        size: PackSize,
        *,
        seed: int | None,
        share_prefix: bool = True,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """`examples` is map-style and gives `Example`s; where it has `lengths()`, no example is built to know its own.

        Raises ConfigError for an example that is longer than a pack.
        """
        self.packs = PackSampler(example_lengths(examples), size, seed=seed, rank=rank, processes=processes)
        super().__init__(
            _MutedOnDemand(examples),  # type: ignore[arg-type]
            batch_sampler=self.packs,
            collate_fn=partial(pack, share_prefix=share_prefix),
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=False,
            prefetch_factor=4 if workers else None,
        )

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is over the packs of this epoch."""
        self.packs.set_epoch(epoch)


def example_lengths(examples: Any) -> NDArray[np.int64]:
    """The positions of each example, [examples]."""
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
