"""The delay pattern of Higgs TTS 3: codes <-> the delayed rows that the model reads and predicts.

Codebook k is delayed by k rows, between BOC entries before it begins and EOC entries after it ends:

    row       0    1    2    3       (T = 2 frames, K = 3 codebooks)
    k = 0    c00  c10  EOC  EOC
    k = 1    BOC  c01  c11  EOC
    k = 2    BOC  BOC  c02  c12

so code t of codebook k is in row t + k, and there are T + K - 1 rows: no start row and no end row of its own.
Source: sglang-omni 0.1.9 and vllm-omni 0.30.0, whose rows are equal.
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from higgstune.errors import DataError
from higgstune.kernels import IGNORE

Labelled = Literal["codes", "codes_and_stop", "codes_and_eoc"]


def delay(codes: ArrayLike, *, boc_id: int = 1024) -> NDArray[np.int64]:
    """Codes [T, K] of any integer type -> rows [T + K - 1, K] int64; EOC is `boc_id` + 1.

    Raises DataError if the codes are not integers, not [T >= 1, K >= 1], or outside 0 <= code < boc_id.

    >>> delay([[5, 6], [7, 8]]).tolist()
    [[5, 1024], [7, 6], [1025, 8]]
    """
    array = np.asarray(codes)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "iu":
        raise DataError(
            f"codes must be integers [frames, codebooks], at least one each, not {array.dtype} of {array.shape}"
        )
    if array.min() < 0 or array.max() >= boc_id:
        raise DataError(
            f"codes must lie in 0..{boc_id - 1}, got {array.min()}..{array.max()}: "
            "were they made by another codec, or do they hold BOC or EOC already?"
        )
    frames, codebooks = array.shape
    row, codebook = np.indices((frames + codebooks - 1, codebooks))
    frame = row - codebook
    rows = np.where(frame < 0, boc_id, boc_id + 1)
    inside = (frame >= 0) & (frame < frames)
    rows[inside] = array[frame[inside], codebook[inside]]
    return rows


def undelay(rows: ArrayLike) -> NDArray[np.int64]:
    """The inverse: rows [T + K - 1, K] -> codes [T, K]. Generated rows may leave BOC and EOC among them."""
    array = np.asarray(rows, dtype=np.int64)
    frame, codebook = np.indices((max(0, len(array) - array.shape[1] + 1), array.shape[1]))
    return array[frame + codebook, codebook]


def labels_of(rows: NDArray[np.int64], entries: Labelled = "codes_and_eoc") -> NDArray[np.int64]:
    """The labels of delayed rows, in their shape: `IGNORE` where an entry has none. Not shifted.

    Training labels the codes and all EOC: samplers draw those of codebooks 1 to K - 1 freely, and feed them back. BOC
    is never a label, as samplers overwrite it. `codes_and_stop` has the EOC of codebook 0 alone, in the row that ends a
    clip; `codes` has none. Source: the samplers of servers, and sglang-omni's `delay_pattern_action_mask`.
    """
    row, codebook = np.indices(rows.shape)
    frames = len(rows) - rows.shape[1] + 1
    labelled = row >= codebook
    if entries != "codes_and_eoc":
        stop = (row == frames) & (codebook == 0) & (entries == "codes_and_stop")
        labelled = (labelled & (row - codebook < frames)) | stop
    return np.where(labelled, rows, IGNORE)
