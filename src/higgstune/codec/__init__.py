"""Codecs: waveform <-> codes."""

from typing import TYPE_CHECKING, Any

from higgstune.codec.base import Codec
from higgstune.codec.load import DEFAULT_CODEC, load_codec
from higgstune.codec.mel import MelCodec

if TYPE_CHECKING:
    from higgstune.codec.higgs import HiggsCodec as HiggsCodec

__all__ = ["DEFAULT_CODEC", "Codec", "HiggsCodec", "MelCodec", "load_codec"]


def __getattr__(name: str) -> Any:
    """`HiggsCodec` brings torch and transformers, so it is imported when it is asked for."""
    if name != "HiggsCodec":
        raise AttributeError(f"module 'higgstune.codec' has no attribute {name!r}")
    from higgstune.codec.higgs import HiggsCodec

    return HiggsCodec
