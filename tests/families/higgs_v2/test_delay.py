"""The delay pattern and its labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from higgstune.errors import DataError
from higgstune.families.higgs_v2.delay import build_frames, codes_from_frames
from higgstune.kernels import IGNORE

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "delay_and_labels.safetensors")


@pytest.mark.parametrize("frames", [1, 3, 8, 25])
@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.int32])
def test_rows_and_labels_equal_the_reference_collator(frames: int, dtype: type) -> None:
    rows, labels = build_frames(GOLDEN[f"codes_T{frames}"].T.astype(dtype))
    np.testing.assert_array_equal(rows, GOLDEN[f"audio_input_ids_T{frames}"])
    np.testing.assert_array_equal(labels, GOLDEN[f"audio_labels_T{frames}"])
    assert rows.dtype == labels.dtype == np.int64


@given(st.integers(1, 60), st.integers(1, 16), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_the_inverse_gives_the_codes_back(frames: int, codebooks: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1024, (frames, codebooks))
    rows, labels = build_frames(codes)
    assert rows.shape == (frames + codebooks + 1, codebooks)
    np.testing.assert_array_equal(codes_from_frames(rows), codes)
    # Each codebook labels its T codes and one EOS; what is labelled is what the input says.
    assert (labels != IGNORE).sum() == codebooks * (frames + 1)
    assert (labels == 1025).sum(axis=0).tolist() == [1] * codebooks
    np.testing.assert_array_equal(labels[labels != IGNORE], rows[labels != IGNORE])


@given(st.integers(1, 40), st.integers(1, 16), st.data())
@settings(deadline=None)
def test_a_cut_off_clip_gives_the_frames_that_are_whole(frames: int, codebooks: int, data: st.DataObject) -> None:
    codes = np.random.default_rng(0).integers(0, 1024, (frames, codebooks))
    rows, _ = build_frames(codes)
    kept = data.draw(st.integers(1, len(rows)))
    whole = min(frames, max(0, kept - codebooks))
    np.testing.assert_array_equal(codes_from_frames(rows[:kept]), codes[:whole])


def test_torch_codes_are_taken_too() -> None:
    rows, _ = build_frames(torch.zeros(3, 8, dtype=torch.int32))
    assert rows.shape == (12, 8)


@pytest.mark.parametrize(
    ("codes", "names"),
    [
        (np.full((3, 8), 1024), r"0\.\.1023"),
        (np.full((3, 8), -1), r"0\.\.1023"),
        (np.zeros((3, 8)), "integers"),
        (np.zeros((3, 8), dtype=bool), "integers"),
        (np.zeros((0, 8), dtype=int), "at least one"),
        (np.zeros(8, dtype=int), "at least one"),
    ],
)
def test_arrays_that_are_not_codes_are_refused(codes: np.ndarray, names: str) -> None:
    with pytest.raises(DataError, match=names):
        build_frames(codes)
