"""The lengths of a large split's examples, kept beside its store: measuring them takes 0.4 ms a row.

`.lengths-KEY` may be deleted at any time. The key is a hash of what lengths depend on: the rows, the tokenizer, the
family's prompts and the place of references. A few rows are measured anew, in case the prompts have changed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from higgstune.data.shard_reader import LENGTHS_PREFIX
from higgstune.data.store import SplitView
from higgstune.families.base import Prompter
from higgstune.files import temporary_beside

_WORTHWHILE = 2000  # rows
_PROBED = 16  # rows
_CHECKSUM = 32  # bytes


def known_lengths(
    rows: SplitView, prompter: Prompter, reference: str, measure: Callable[[Sequence[int]], Sequence[int]]
) -> NDArray[np.int64]:
    """The number of tokens of each row's example, [rows]; `measure` measures those of these indices."""
    tokenizer = getattr(prompter.tokenizer, "backend_tokenizer", None)
    if len(rows) < _WORTHWHILE or tokenizer is None:
        return np.array(measure(range(len(rows))), dtype=np.int64)
    kind = f"{type(prompter).__module__}.{type(prompter).__qualname__}"
    shards = [shard.sha256 for shard in rows.store.shards]
    parts = [kind, tokenizer.to_str(), reference, [rows.indices.start, rows.indices.stop, rows.indices.step], shards]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    path = rows.store.folder / f"{LENGTHS_PREFIX}{key}"
    with suppress(OSError):
        data = path.read_bytes()
        is_whole = hashlib.sha256(data[_CHECKSUM:]).digest() == data[:_CHECKSUM]
        lengths = np.frombuffer(data, "<i4", offset=_CHECKSUM).astype(np.int64) if is_whole else np.empty(0, np.int64)
        probed = np.linspace(0, len(rows) - 1, _PROBED).astype(int).tolist()
        if len(lengths) == len(rows) and lengths[probed].tolist() == list(measure(probed)):
            return lengths
    lengths = np.array(measure(range(len(rows))), dtype=np.int64)
    content = lengths.astype("<i4").tobytes()
    temporary = temporary_beside(path)
    with suppress(OSError):  # a store may be read-only: they are measured again then
        temporary.write_bytes(hashlib.sha256(content).digest() + content)
        os.replace(temporary, path)
    return lengths
