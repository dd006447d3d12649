"""Ogg, the container of Vorbis and Opus: whether a file has all of its pages.

No header has the length, so a decoder takes what is left of a damaged file for the whole. But each page has a checksum
and a number, and the last one of a stream is marked (RFC 3533).
"""

import struct
import zlib
from typing import BinaryIO

_HEADER = struct.Struct("<4sBBqIIIB")  # magic, version, flags, position, stream, page number, checksum, segments
_BEGINS, _ENDS = 2, 4  # flags
_CHECKSUM = slice(22, 26)  # its place in a page
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_MAX_TAIL = 1 << 16  # bytes of a tag behind the last page


def find_damage(file: BinaryIO) -> str | None:
    """What is wrong with an Ogg file, open at its first byte, as a clause; None where it is whole.

    Of streams one after the other libsndfile reads only the first, so that the others count as lost.
    """
    at, begun = 0, False
    expected: dict[int, int] = {}  # the next page of each stream that has not ended
    while head := file.read(_HEADER.size):
        if not head.startswith(b"OggS") or len(head) < _HEADER.size:
            is_whole = begun and not expected and _is_tag(head, file)
            return None if is_whole else f"is damaged at byte {at}: no page begins there"
        *_, flags, _, stream, number, checksum, segments = _HEADER.unpack(head)
        sizes = file.read(segments)
        body = file.read(sum(sizes))
        if len(sizes) < segments or len(body) < sum(sizes):
            return f"is cut off: its last page, at byte {at}, is not whole"
        page = bytearray(head + sizes + body)
        page[_CHECKSUM] = bytes(4)
        if _crc(page) != checksum:
            return f"is damaged: the checksum of its page at byte {at} is wrong"
        if flags & _BEGINS:
            if begun:
                return f"holds several streams one after the other, the second from byte {at}; only the first is read"
            expected[stream] = number
        begun = begun or not flags & _BEGINS  # pages of streams side by side begin together
        if number != expected.get(stream):
            return f"is damaged: pages before byte {at} are missing"
        expected[stream] = number + 1
        if flags & _ENDS:
            del expected[stream]
        at += len(page)
    return "is cut off: its last page is not marked as the end" if expected else None


def _is_tag(head: bytes, file: BinaryIO) -> bool:
    rest = head + file.read(_MAX_TAIL)
    return len(rest) < _MAX_TAIL and b"OggS" not in rest


def _crc(page: bytearray) -> int:
    """The CRC-32 of Ogg: that of zlib with the bits of every byte and of the result mirrored, and without inversion."""
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
