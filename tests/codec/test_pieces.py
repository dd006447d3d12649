"""A clip decoded as its codes come, against the clip decoded as a whole."""

from typing import Any

import numpy as np
import pytest
import torch
from fake_codec import FakeCodec
from tiny_codec import tiny_codec
from tiny_runs import DEMO_CODEC

from higgstune.codec import load_codec
from higgstune.codec.base import PieceDecoder
from higgstune.codec.higgs import HiggsCodec


def higgs() -> HiggsCodec:
    """With weights under which a change stays as loud from layer to layer, so that nothing of its reach is lost."""
    model = tiny_codec()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.acoustic_decoder.parameters():
            if weight.ndim == 3:
                weight.normal_(std=(2 / weight[0].numel()) ** 0.5)
    return HiggsCodec(model, "random")


CODECS = {"higgs": higgs, "demo": lambda: load_codec(DEMO_CODEC)}


def decibels(difference: np.ndarray, whole: np.ndarray) -> float:
    return 20 * float(np.log10(np.sqrt((difference**2).mean() / (whole**2).mean()) + 1e-30))


def pushed(codec: Any, codes: np.ndarray, size: int) -> list[np.ndarray]:
    decoder = PieceDecoder(codec)
    return [decoder.push(codes[at : at + size], last=at + size >= len(codes)) for at in range(0, len(codes), size)]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("size", [1, 7, 25, 400])
def test_parts_are_the_whole_clip(name: str, size: int) -> None:
    codec: Any = CODECS[name]()
    codes = np.random.default_rng(0).integers(0, codec.codebook_size, (60, 8))
    whole = codec.decode(codes)
    parts = pushed(codec, codes, size)
    assert len(np.concatenate(parts)) == len(whole)
    assert decibels(np.concatenate(parts) - whole, whole) < -80
    for index, part in enumerate(parts[:-1], 1):  # each as early as its context allows
        sure = max(0, index * size - codec.context) - max(0, (index - 1) * size - codec.context)
        assert len(part) == sure * codec.frame_samples
    codec.context = 0  # not enough
    assert decibels(np.concatenate(pushed(codec, codes, 7)) - whole, whole) > -80


def test_a_codec_without_a_context_gives_all_at_the_end() -> None:
    codec, codes = FakeCodec(), np.random.default_rng(0).integers(0, 1024, (30, 8))
    first, *_, last = pushed(codec, codes, 10)
    assert len(first) == 0
    np.testing.assert_array_equal(last, codec.decode(codes))
    assert load_codec(DEMO_CODEC).context == HiggsCodec(tiny_codec(), "tiny").context == 10
