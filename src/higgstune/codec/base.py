"""The interface of a codec, waveform -> codes -> waveform, checks of both, and the type of Whisper features."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from higgstune.errors import DataError


class Codec(Protocol):
    """An audio tokenizer. All of today's have 24 kHz mono, 25 frames a second and 8 codebooks of 1024 codes."""

    sample_rate: int  # Hz
    frame_rate: float  # frames per second
    num_codebooks: int
    codebook_size: int  # codes in one codebook, without stream BOS and EOS
    revision: str  # names the weights: equal revisions give equal codes
    reference_seconds: float  # the shortest reference; a shorter one is filled up with silence

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """[samples] float32 in [-1, 1] at `sample_rate` -> [frames, num_codebooks] uint16."""
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """[frames, num_codebooks] of any integer type -> [samples] float32 at `sample_rate`."""
        ...


@runtime_checkable
class StreamingCodec(Codec, Protocol):
    """A codec that decodes a clip in parts."""

    context: int | None  # frames on either side that a frame's samples depend on; None: on all frames of a clip

    def decode_part(self, codes: np.ndarray, wanted: slice, *, first: int, state: Any) -> tuple[np.ndarray, Any]:
        """The samples of the `wanted` frames of a window of a clip that starts at frame `first`. `state` is what the
        part before gave back, None at the start.
        """
        ...


class PieceDecoder:
    """Decodes a clip as its codes come, to the samples that `Codec.decode` gives for the whole clip, but for rounding.

    A frame is decoded together with the codec's context on either side, so it comes `context` frames late. With a codec
    that has none, everything comes at the end.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.context = codec.context if isinstance(codec, StreamingCodec) else None
        self._codes = np.zeros((0, codec.num_codebooks), dtype=np.int64)
        self._given = 0  # frames
        self._state: Any = None  # of the codec

    def push(self, codes: np.ndarray, *, last: bool = False) -> np.ndarray:
        """The codes [frames, num_codebooks] that come next -> the samples that are sure by now, float32."""
        self._codes = np.concatenate([self._codes, codes])
        total = len(self._codes)
        if not isinstance(self._codec, StreamingCodec) or self.context is None:
            return self._codec.decode(self._codes) if last else np.zeros(0, dtype=np.float32)
        end = total if last else max(self._given, total - self.context)
        first = max(0, self._given - self.context)
        wanted = slice(self._given - first, end - first)
        if wanted.start == wanted.stop:
            return np.zeros(0, dtype=np.float32)
        samples, self._state = self._codec.decode_part(
            self._codes[first : min(total, end + self.context)], wanted, first=first, state=self._state
        )
        self._given = end
        return samples


def whole_frames(waveform: np.ndarray, frame_samples: int) -> np.ndarray:
    """[samples] -> float32, padded with silence to a whole frame. Raises DataError for anything but mono floats."""
    if waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
        raise DataError(
            f"a codec takes a mono waveform, [samples] of floats in [-1, 1], not {waveform.dtype} of shape "
            f"{waveform.shape}: mix the channels, scale integers"
        )
    return np.pad(waveform.astype(np.float32), (0, -len(waveform) % frame_samples))


def encode_reference(codec: Codec, waveform: np.ndarray) -> np.ndarray:
    """The codes of a voice's recording: `codec.encode`, with silence after a recording that is too short."""
    missing = round(codec.reference_seconds * codec.sample_rate) - len(waveform)
    return codec.encode(np.pad(waveform, (0, missing)) if missing > 0 else waveform)


def checked_codes(codes: np.ndarray, num_codebooks: int, codebook_size: int) -> np.ndarray:
    """[frames, num_codebooks] as int64. Raises DataError for another shape, and for codes that no codebook has."""
    if codes.ndim != 2 or codes.shape[1] != num_codebooks or not np.issubdtype(codes.dtype, np.integer):
        raise DataError(
            f"a codec takes codes [frames, {num_codebooks}] of integers, not {codes.dtype} of {codes.shape}"
        )
    if codes.size and (codes.min() < 0 or codes.max() >= codebook_size):
        raise DataError(
            f"codes are 0 to {codebook_size - 1}, but these are {codes.min()} to {codes.max()}: remove stream BOS "
            "and EOS before decoding"
        )
    return codes.astype(np.int64)


@dataclass(frozen=True)
class WhisperFeatures:
    """The output of a Whisper encoder for a clip: `features` [positions, d_model] float16, and positions by chunk."""

    features: NDArray[np.float16]
    chunks: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises DataError unless there are as many features as positions."""
        if len(self.features) != sum(self.chunks):
            raise DataError(f"{len(self.features)} Whisper features for chunks of {self.chunks} positions")
