"""The delay pattern and labels of Higgs TTS 3, for any number of frames and codebooks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from higgstune.errors import DataError
from higgstune.families.higgs_tts_3.delay import delay, labels_of, undelay
from higgstune.kernels import IGNORE


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 2**32 - 1))
def test_the_inverse_gives_the_codes_and_every_count_is_fixed(frames: int, codebooks: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1024, (frames, codebooks)).astype(np.uint16)
    rows = delay(codes)
    np.testing.assert_array_equal(undelay(rows), codes)
    edge = codebooks * (codebooks - 1) // 2
    assert (rows == 1024).sum() == (rows == 1025).sum() == edge
    labels = {entries: labels_of(rows, entries) for entries in ("codes", "codes_and_stop", "codes_and_eoc")}
    counts = {entries: int((found != IGNORE).sum()) for entries, found in labels.items()}
    stops = int(codebooks > 1)  # with one codebook there is no row after the last code
    assert counts == {"codes": codes.size, "codes_and_stop": codes.size + stops, "codes_and_eoc": codes.size + edge}
    for found in labels.values():
        assert set(np.unique(found[found != rows])) <= {IGNORE}
        assert 1024 not in found


@pytest.mark.parametrize(
    "codes", [np.zeros((0, 8), int), np.zeros((3, 8)), np.full((3, 8), 1024), np.full((3, 8), -1), np.zeros(8, int)]
)
def test_other_values_than_codes_are_refused(codes: np.ndarray) -> None:
    with pytest.raises(DataError, match="codes must"):
        delay(codes)
