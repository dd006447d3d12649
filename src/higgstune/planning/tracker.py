"""How many bytes of tensors are alive while code runs, and what they were when they were most."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Bytes = Counter[str]  # by kind


class Tracker(TorchDispatchMode):
    """Counts the storages that operations make until they are freed, each as of the kind that is set at the time.

    Work is cut into segments by `begin`; `peaks` has for each segment what was alive when that was most. What a kernel
    takes for itself alone is not seen. Real tensors are counted as well as fake ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "other"
        self.alive: Bytes = Counter()
        self.peaks: dict[str, Bytes] = {}
        self._segment = ""
        self._total = 0
        self._kinds: dict[int, tuple[str, int]] = {}  # storage -> its kind and bytes
        self._references: dict[int, weakref.ref[Any]] = {}

    def begin(self, segment: str, kind: str) -> None:
        """From here on: this segment (which may go on where it was left), and new storages are of this kind."""
        self._segment, self.kind = segment, kind
        self._note()

    def count(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage as of this kind, whether it was counted before or not."""
        storage = tensor.untyped_storage()
        self._forget(id(storage))
        self._add(storage, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation comes by here."""
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            for value in (result,) if isinstance(result, Tensor) else tree_iter(result):
                if isinstance(value, Tensor):
                    storage = value.untyped_storage()
                    if id(storage) not in self._kinds:
                        self._add(storage, self.kind)
        return result

    def _add(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size = id(storage), storage.nbytes()
        self._kinds[key] = kind, size
        self._references[key] = weakref.ref(storage, lambda _, key=key: self._forget(key))  # type: ignore[misc]
        self.alive[kind] += size
        self._total += size
        self._note()

    def _forget(self, key: int) -> None:
        self._references.pop(key, None)
        kind, size = self._kinds.pop(key, ("other", 0))
        self.alive[kind] -= size
        self._total -= size

    def _note(self) -> None:
        highest = self.peaks.get(self._segment)
        if highest is None or self._total > highest.total():
            self.peaks[self._segment] = Counter(self.alive)
