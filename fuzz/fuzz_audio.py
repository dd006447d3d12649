"""Fuzzes the reader of recordings, which calls libsndfile: damaged files of every format, and WAV headers that lie."""

import struct

import atheris
from common import fuzz, scratch

with atheris.instrument_imports(include=["higgstune", "soundfile"]):
    from hostile_input import audio_seeds, check_audio, rf64, wav

WORDS = ["RIFF", "RIFX", "RF64", "WAVE", "fmt ", "data", "LIST", "bext", "cue ", "smpl", "fact", "ds64", "PEAK", "fLaC"]
WORDS += ["OggS", "OpusHead", "OpusTags", "\x01vorbis", "ID3", "Xing", "LAME", "\0" * 4, "\x7f\x7f\x7f\x7f"]
NUMBERS = [0, 1, 2, 8, 16, 24, 32, 64, 1000, 4000, 8000, 48000, 65535, 0x7FFFF000, 2**31 - 1, 2**31, 2**32 - 1]
TAGS = [1, 2, 3, 6, 7, 17, 49, 85, 0xFFFE]  # PCM, ADPCM, float, A-law, mu-law, IMA, GSM, MP3, extensible
FOLDER = scratch()


def target(content: bytes) -> None:
    """The first byte says whether the rest is a file or the fields of a header; the next 16 are a part to read."""
    kind, rest = (content[0], content[17:]) if len(content) > 17 else (0, content)
    start, end = struct.unpack("<dd", content[1:17]) if len(content) > 17 and kind & 1 else (None, None)
    if kind < 192:
        check_audio(FOLDER, rest, start, end)
        return
    data = atheris.FuzzedDataProvider(rest)
    pick = lambda: data.PickValueInList(NUMBERS) if data.ConsumeBool() else data.ConsumeIntInRange(0, 2**32 - 1)  # noqa: E731
    if kind < 208:
        check_audio(
            FOLDER, rf64(data.ConsumeBytes(2000), data_size=pick() << data.ConsumeIntInRange(0, 31)), start, end
        )
        return
    made = wav(
        data.ConsumeBytes(2000),
        rate=pick(),
        channels=pick() & 0xFFFF,
        bits=pick() & 0xFFFF,
        tag=data.PickValueInList(TAGS),
        data_size=pick(),
        extra=data.ConsumeBytes(60),
    )
    check_audio(FOLDER, made, start, end)


if __name__ == "__main__":
    parts = bytes([1]) + struct.pack("<dd", 0.05, 0.2)
    files = [head + seed for seed in audio_seeds(FOLDER) for head in (bytes(17), parts)]
    fuzz(target, [*files, *(bytes([200 + n]) + bytes(range(256)) * 4 for n in range(0, 40, 8))], WORDS, FOLDER)
