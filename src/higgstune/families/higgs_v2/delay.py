"""The delay pattern: codes <-> the delayed frames that the model reads and predicts.

Codebook k is delayed by k rows against codebook 0, between one stream-BOS and one stream-EOS frame:

    row       0    1    2    3    4    5       (T = 2 frames, K = 3 codebooks)
    k = 0    BOS  c00  c10  EOS  EOS  EOS
    k = 1    BOS  BOS  c01  c11  EOS  EOS
    k = 2    BOS  BOS  BOS  c02  c12  EOS

so code t of codebook k is in row t + 1 + k, and its first EOS in row T + 1 + k.
Source: boson_multimodal's HiggsAudioSampleCollator with `use_delay_pattern=True`.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from higgstune.errors import DataError
from higgstune.kernels import IGNORE


def build_frames(
    codes: ArrayLike, *, bos_id: int = 1024, eos_id: int = 1025
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Codes [T, K] of any integer type -> (audio_input_ids, audio_labels), each int64 [T + K + 1, K].

    Labels are not shifted: label row r belongs to input row r. Codes and the first EOS of each codebook are label
    entries; BOS and later EOS are `IGNORE`.

    Raises DataError if the codes are not integers, not [T >= 1, K >= 1], or outside 0 <= code < bos_id.

    >>> ids, labels = build_frames([[5, 6]])  # one frame of two codes
    >>> ids.tolist()
    [[1024, 1024], [5, 1024], [1025, 6], [1025, 1025]]
    """
    array = np.asarray(codes)
    if array.ndim != 2 or 0 in array.shape:
        raise DataError(f"codes must be [frames, codebooks] with at least one of each, got shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise DataError(f"codes must be integers, got {array.dtype}")
    if array.min() < 0 or array.max() >= bos_id:
        raise DataError(
            f"codes must lie in 0..{bos_id - 1}, got {array.min()}..{array.max()}: "
            "were they made by another codec, or do they hold BOS/EOS frames already?"
        )
    frames, codebooks = array.shape
    rows = frames + codebooks + 1
    ids = np.full((rows, codebooks), eos_id, dtype=np.int64)
    labels = np.full((rows, codebooks), IGNORE, dtype=np.int64)
    for k in range(codebooks):
        first, end = k + 1, k + 1 + frames
        ids[:first, k] = bos_id
        ids[first:end, k] = array[:, k]
        labels[first : end + 1, k] = ids[first : end + 1, k]
    return ids, labels


def codes_from_frames(rows: ArrayLike, *, eos_id: int = 1025) -> NDArray[np.int64]:
    """The inverse of `build_frames`, also for generated rows: [rows, K] -> codes [T, K].

    T is the number of frames that every codebook has: up to its first EOS, or up to the last row without one.
    """
    array = np.asarray(rows, dtype=np.int64)
    total, codebooks = array.shape
    is_eos = array == eos_id
    ends = np.where(is_eos.any(axis=0), is_eos.argmax(axis=0), total)  # [K] first row that is not a code
    frames = max(0, int((ends - 1 - np.arange(codebooks)).min()))
    take = np.arange(frames)[:, None] + 1 + np.arange(codebooks)[None, :]
    return np.take_along_axis(array, take, axis=0)
