"""MPEG audio (MP3): how much of it a file holds.

Only a Xing header has the length of an MP3. Without one, libsndfile guesses it from the first frame, and reads no
further: of a file with a variable bit rate that can be a third. Of files that were joined end to end, the header has
only the length of the first.
"""

from functools import lru_cache
from typing import BinaryIO, NamedTuple

MAX_PADDING = 4 * 1152  # samples that an encoder adds in front and behind, and the frame of a Xing header
_CHUNK = 1 << 24  # bytes that are read at a time
_LAYER_1 = (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448)
_KILOBITS = {  # by version (1 or 2) and layer
    (1, 1): _LAYER_1,
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # Hz, by version bits


class _Frame(NamedTuple):
    bytes: int
    samples: int
    rate: int  # Hz


def count_samples(file: BinaryIO) -> int:
    """The samples of all frames in a file, in each channel; what lies between frames, such as tags, is passed over."""
    return sum(_count(chunk) for chunk in iter(lambda: file.read(_CHUNK), b""))


def _count(content: bytes) -> int:
    samples, at = 0, content.find(b"\xff")
    while 0 <= at <= len(content) - 4:
        frame = _frame(content[at : at + 4])
        end = at if frame is None else at + frame.bytes
        following = _frame(content[end : end + 4])
        if frame is not None and (end >= len(content) or (following is not None and following.rate == frame.rate)):
            samples += frame.samples
            at = end
        else:  # a pair of bytes like those of a header, as any data has them
            at = content.find(b"\xff", at + 1)
    return samples


@lru_cache(1 << 12)
def _frame(header: bytes) -> _Frame | None:
    """The frame that begins with these four bytes; None where none does."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    bit_rate, rate, padding = header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
    if version == 1 or layer == 4 or bit_rate in (0, 15) or rate == 3:
        return None
    generation = 1 if version == 3 else 2
    samples = {1: 384, 2: 1152, 3: 1152 if generation == 1 else 576}[layer]
    slot = 4 if layer == 1 else 1
    hertz = _RATES[version][rate]
    size = (samples // 8 // slot * _KILOBITS[generation, layer][bit_rate] * 1000 // hertz + padding) * slot
    return _Frame(size, samples, hertz)
