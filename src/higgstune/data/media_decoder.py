"""Decodes the first audio stream of the file on stdin with PyAV: the process that `media.MediaFile` starts.

    python -P media_decoder.py FORMAT MEGABYTES <FILE >MESSAGES

It imports nothing of Higgstune, so that it starts in 0.1 s. A message is a letter, the length of what follows in four
bytes, and that:

    h  {"rate": Hz, "channels": n, "claimed": samples of each channel by the header, 0 where it does not say}
    s  samples, float32, channels interleaved
    e  {"reason": of a RowError, "message": a clause with the file as its subject, "convert": whether ffmpeg may help}
    .  the end
"""

import json
import os
import struct
import sys
from collections.abc import Iterator
from itertools import chain
from types import TracebackType
from typing import Any, BinaryIO

_CODECS = {"aac", "alac", "flac", "mp3", "mp3float", "opus", "vorbis"}  # decoders of libavcodec; and pcm_*
_BLOCK = 1 << 18  # bytes of samples in a message, or one frame more
_OPEN_LENGTH = -1  # of an element that was written as a stream


class _Refused(Exception):
    """A file that is not decoded: reason, message and convert, as in the message `e`."""


def main(format: str, megabytes: int) -> None:
    """Decode stdin as this format of libavformat, in so much address space (on Linux)."""
    sys.excepthook = _report
    import av
    import av.subtitles.stream  # which PyAV imports late, when no file may be opened any longer

    if sys.platform == "linux":
        _limit(megabytes << 20)
    codecs = {*_CODECS, *(name for name in av.codecs_available if name.startswith("pcm_"))}
    # `codec_whitelist` holds while libavformat probes the streams, which decodes a little of each, pictures included;
    # not for what PyAV decodes. No protocol is named "none", so that nothing else can be opened by a URL in the file.
    options = {"codec_whitelist": ",".join(sorted(codecs)), "protocol_whitelist": "none"}
    file = open(0, "rb", closefd=False)  # noqa: SIM115
    if format == "matroska":
        _check_segment(file)
    with av.open(file, format=format, options=options, metadata_errors="ignore") as container:
        if not container.streams.audio:
            raise _Refused("unreadable_audio", "has no audio stream, or is cut off before it", False)
        stream = container.streams.audio[0]
        codec = stream.codec_context
        if codec is None or codec.name not in codecs:
            name = "a codec that is not known" if codec is None else f"the codec {codec.name}"
            raise _Refused("unsupported_format", f"holds sound in {name}, which is not read", True)
        codec.thread_count = 1
        frames = _frames(container, stream)
        first = next(frames, None)
        if first is None:
            raise _Refused("unreadable_audio", "holds no sound that can be decoded", False)
        shape = first.sample_rate, first.layout.name, first.layout.nb_channels, first.format.name
        _send(b"h", rate=shape[0], channels=shape[2], claimed=_claimed(stream, format, shape[0]))
        resampler = av.AudioResampler(format="flt", layout=first.layout)  # other numbers of the same samples
        samples = bytearray()
        for frame in chain([first], frames):
            if (frame.sample_rate, frame.layout.name, frame.layout.nb_channels, frame.format.name) != shape:
                raise _Refused("unreadable_audio", "changes its rate or its channels on the way", True)
            for part in resampler.resample(frame):
                samples += memoryview(part.planes[0])[: part.samples * shape[2] * 4]
            if len(samples) >= _BLOCK:
                _write(b"s", samples)
                samples.clear()
        if samples:
            _write(b"s", samples)
    _write(b".")


def _limit(memory: int) -> None:
    """From here on: so many bytes of address space, no other open file, nothing written but what is open, no core."""
    import resource

    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise _Refused("unreadable_audio", "is cut off or damaged: a packet of its sound is not whole", False)
        yield from packet.decode()


def _claimed(stream: Any, format: str, rate: int) -> int:
    """The samples that the header of an MP4 promises: Matroska has a length for all streams, ADTS an estimate."""
    return max(0, round((stream.duration or 0) * stream.time_base * rate)) if format == "mov" else 0


def _check_segment(file: BinaryIO) -> None:
    """Refuse a Matroska file that is shorter than its Segment, which libavformat reads as far as it reaches."""
    file.seek(4)
    file.seek(_number(file), os.SEEK_CUR)
    if file.read(4) == b"\x18\x53\x80\x67":
        length = _number(file)
        end, size = file.tell() + length, file.seek(0, os.SEEK_END)
        if length != _OPEN_LENGTH and end > size:
            raise _Refused("unreadable_audio", f"is cut off after {size} of {end} bytes", False)
    file.seek(0)


def _number(file: BinaryIO) -> int:
    """The next number of EBML: the zeros at the beginning of its first byte say how many bytes follow."""
    first = file.read(1) or b"\1"
    more = 8 - first[0].bit_length()
    value = int.from_bytes(first + file.read(more), "big") & ((1 << 7 * (more + 1)) - 1)
    return value if value != (1 << 7 * (more + 1)) - 1 else _OPEN_LENGTH


def _report(kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """Send what ends this process."""
    if isinstance(error, _Refused):
        reason, message, convert = error.args
    elif isinstance(error, MemoryError):
        reason, message, convert = "unreadable_audio", "takes too much memory to decode", False
    elif isinstance(error, ImportError):
        reason, message, convert = "unsupported_format", f"cannot be decoded, as PyAV does not load ({error})", True
    else:
        text = getattr(error, "strerror", None) or f"{kind.__name__}: {error}"
        reason, message, convert = "unreadable_audio", f"is cut off or damaged: {text}", False
    _send(b"e", reason=reason, message=message, convert=convert)


def _send(letter: bytes, **values: object) -> None:
    _write(letter, json.dumps(values).encode())


def _write(letter: bytes, content: bytes | bytearray = b"") -> None:
    sys.stdout.buffer.write(struct.pack("<cI", letter, len(content)))
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
