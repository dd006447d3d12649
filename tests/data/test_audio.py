"""Reading, checking, hashing and resampling recordings."""

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from recordings import FORMATS, RATE, speech, write

from higgstune.data.audio import audio_hash, peak_of, read_audio, read_recording, resample
from higgstune.data.rejection import RowError
from higgstune.data.splits import find_near_duplicates


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", speech(1.0))
    waveform, rate = read_audio(path)
    assert (waveform.dtype, waveform.shape, rate) == (np.float32, (RATE,), RATE)
    assert np.corrcoef(waveform, speech(1.0))[0, 1] > 0.95
    recording = read_recording(path)
    assert recording.sha256 == audio_hash(waveform, rate)
    assert (recording.samples, recording.seconds) == (RATE, 1.0)
    assert recording.peak == pytest.approx(peak_of(waveform))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_part_is_a_part_of_the_whole(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", speech(3.0))
    whole, _ = read_audio(path)
    part, _ = read_audio(path, 0.5, 1.75)
    assert len(part) == round(1.25 * RATE)
    assert np.abs(part - whole[RATE // 2 : RATE // 2 + len(part)]).max() < 0.02
    rest, _ = read_audio(path, 2.0)
    assert len(rest) == RATE


def test_channels_are_averaged(tmp_path: Path) -> None:
    left = speech(0.5)
    path = write(tmp_path / "a.wav", np.stack([left, np.zeros_like(left)], axis=1), subtype="FLOAT")
    waveform, _ = read_audio(path)
    assert waveform == pytest.approx(left / 2)


def test_equal_channels_hash_like_mono(tmp_path: Path) -> None:
    samples = (speech(0.5) * 32768).astype(np.int16)
    mono = write(tmp_path / "mono.wav", samples)
    stereo = write(tmp_path / "stereo.flac", np.stack([samples, samples], axis=1))
    assert read_recording(mono).sha256 == read_recording(stereo).sha256


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_wav_and_flac_of_the_same_samples_hash_equal(tmp_path: Path, subtype: str) -> None:
    samples = (speech(0.7) * 2**31).astype(np.int32) & ~0xFFFF
    wav = write(tmp_path / "a.wav", samples, subtype=subtype)
    flac = write(tmp_path / "a.flac", samples, subtype=subtype)
    assert read_recording(wav).sha256 == read_recording(flac).sha256


def test_the_hash_depends_on_the_rate_but_not_on_the_sign_of_zero() -> None:
    waveform = speech(0.1)
    assert audio_hash(waveform, 16_000) != audio_hash(waveform, 24_000)
    zeros = np.zeros(10, np.float32)
    assert audio_hash(np.abs(zeros), RATE) == audio_hash(zeros, RATE)


def test_negative_zero_is_zero(tmp_path: Path) -> None:
    zeros = np.zeros(RATE, np.float32)
    one, other = (
        write(tmp_path / "a.wav", zeros, subtype="FLOAT"),
        write(tmp_path / "b.wav", -zeros, subtype="FLOAT"),
    )
    assert read_recording(one).sha256 == read_recording(other).sha256


def test_near_duplicates_are_found_despite_rounding(tmp_path: Path) -> None:
    """Float samples that one library writes as WAV and FLAC differ in the last bit."""
    names = ["a.wav", "a.flac", "other.wav", "shorter.wav"]
    contents = [speech(1.0), speech(1.0), speech(1.0, seed=1), speech(0.9)]
    wav, flac, other, shorter = [
        read_recording(write(tmp_path / name, content.astype(np.float64)))
        for name, content in zip(names, contents, strict=True)
    ]
    assert wav.sha256 != flac.sha256
    assert find_near_duplicates([wav, flac, other, shorter]) == {wav.sha256: {flac.sha256}, flac.sha256: {wav.sha256}}


def test_tones_of_equal_length_are_not_near_duplicates(tmp_path: Path) -> None:
    time = np.arange(RATE) / RATE
    tones = [write(tmp_path / f"{f}.wav", 0.3 * np.sin(2 * np.pi * f * time)) for f in range(200, 260, 10)]
    assert find_near_duplicates(read_recording(tone) for tone in tones) == {}


def damaged(path: Path, kind: str) -> Path:
    """A file that is broken in one of the ways that files are."""
    if kind == "missing":
        return path
    if kind == "folder":
        path.mkdir()
        return path
    if kind in ("text", "empty", "header only"):
        content = {
            "text": b"this is not audio" * 50,
            "empty": b"",
            "header only": b"RIFF\x24\x00\x00\x00WAVEfmt ",
        }
        path.write_bytes(content[kind])
        return path
    suffix = ".flac" if "flac" in kind else ".wav"
    data = bytearray(write(path.with_suffix(suffix), speech(1.0)).read_bytes())
    if kind.startswith("half"):
        data = data[: len(data) // 2]
    elif kind == "flac with a hole":
        data[len(data) // 2 : len(data) // 2 + 40] = b"\xff" * 40
    elif kind == "flac of a thousand hours":
        data[21:26] = bytes([data[21] & 0xF0 | 0xF]) + b"\xff" * 4
    elif kind == "rate of 1 Hz":
        data[24:28] = (1).to_bytes(4, "little")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "missing_audio"),
        ("folder", "missing_audio"),
        ("text", "unreadable_audio"),
        ("empty", "unreadable_audio"),
        ("header only", "unreadable_audio"),
        ("half a wav", "unreadable_audio"),
        ("half a flac", "unreadable_audio"),
        ("flac with a hole", "unreadable_audio"),
        ("flac of a thousand hours", "unreadable_audio"),
        ("rate of 1 Hz", "unreadable_audio"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, kind: str, reason: str) -> None:
    path = damaged(tmp_path / "broken.bin", kind)
    with pytest.raises(RowError) as refused:
        read_recording(path)
    assert refused.value.reason == reason
    assert str(path) in str(refused.value)


OGG = (".ogg", ".opus")


def with_fault(content: bytes, fault: str) -> bytes:
    """An Ogg file with a fault; it is a second long or more, so that it has several pages of audio."""
    pages = [b"OggS" + page for page in content.split(b"OggS")[1:]]
    middle = len(content) // 2
    return {
        "half": content[:middle],
        "nearly whole": content[:-20],
        "last page lost": b"".join(pages[:-1]),
        "page lost": b"".join(pages[:-2] + pages[-1:]),
        "bytes lost": content[:middle] + content[middle + 3000 :],
        "zeros inside": content[:middle] + bytes(2000) + content[middle + 2000 :],
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "two files": content + content,
        "half of a page behind": content + pages[-1][:40],
    }[fault]


@pytest.mark.parametrize("suffix", OGG)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("half", "is cut off"),
        ("nearly whole", "is cut off"),
        ("last page lost", "not marked as the end"),
        ("page lost", "pages before byte [0-9]+ are missing"),
        ("bytes lost", "is damaged"),
        ("zeros inside", "is damaged"),
        ("one bit", "the checksum of its page at byte [0-9]+ is wrong"),
        ("two files", "several streams one after the other"),
        ("half of a page behind", "is cut off"),
    ],
)
def test_an_ogg_file_that_is_not_whole_is_refused(tmp_path: Path, suffix: str, fault: str, message: str) -> None:
    path = write(tmp_path / f"a{suffix}", speech(4.0))
    path.write_bytes(with_fault(path.read_bytes(), fault))
    for read in (read_recording, read_audio):
        with pytest.raises(RowError, match=message) as refused:
            read(path)
        assert refused.value.reason == "unreadable_audio"


@pytest.mark.parametrize("suffix", OGG)
def test_a_tag_behind_an_ogg_file_is_accepted(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", speech(1.0))
    path.write_bytes(path.read_bytes() + b"TAG" + bytes(125))
    assert read_recording(path).samples == RATE


@pytest.mark.parametrize("suffix", FORMATS)
def test_long_files_are_read_to_their_end(tmp_path: Path, suffix: str) -> None:
    """In several blocks, of which only the last is short."""
    path = write(tmp_path / f"a{suffix}", np.tile(speech(2.0), 20))
    assert read_recording(path).samples == len(read_audio(path)[0]) == 40 * RATE


def test_a_short_block_before_the_last_is_a_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.wav", np.tile(speech(2.0), 10))
    whole = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda file, size, **options: whole(file, size // 2, **options))
    with pytest.raises(RowError, match="parts of it are missing"):
        read_recording(path)


def mp3(path: Path, seconds: float, mode: str = "VARIABLE") -> bytes:
    """A whole MP3, with its Xing header."""
    write(path, speech(seconds), bitrate_mode=mode, compression_level=0.5)
    return path.read_bytes()


def without_xing(content: bytes) -> bytes:
    """Without its first frame, as what comes from a stream or from a tool that cuts: the Xing header is in it."""
    return content[content.index(content[:2], 4) :]


def in_wav(content: bytes, samples: int) -> bytes:
    """MP3 frames in a WAV container."""
    form = struct.pack("<HHIIHHHHIHHH", 0x55, 1, RATE, len(content) * RATE // samples, 1, 0, 12, 1, 2, 576, 1, 1393)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


@pytest.mark.parametrize("seconds", [0.5, 4.2])
@pytest.mark.parametrize("xing", [True, False])
def test_an_mp3_in_a_wav_is_read(tmp_path: Path, seconds: float, xing: bool) -> None:
    content = mp3(tmp_path / "a.mp3", seconds, "CONSTANT")
    path = tmp_path / "a.wav"
    path.write_bytes(in_wav(content if xing else without_xing(content), round(seconds * RATE)))
    assert seconds * RATE <= read_recording(path).samples <= seconds * RATE + 4 * 576


@pytest.mark.parametrize("part", [0.5, 0.9])
def test_half_of_an_mp3_in_a_wav_is_refused(tmp_path: Path, part: float) -> None:
    whole = in_wav(without_xing(mp3(tmp_path / "a.mp3", 4.0, "CONSTANT")), 4 * RATE)
    (tmp_path / "a.wav").write_bytes(whole[: round(part * len(whole))])
    with pytest.raises(RowError, match="is cut off"):
        read_recording(tmp_path / "a.wav")


@pytest.mark.parametrize("kind", ["no Xing header", "in a WAV", "two files"])
def test_an_mp3_of_which_only_a_part_would_be_read_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.mp3"
    content = mp3(path, 8.0)
    bare = without_xing(content)
    path.write_bytes({"no Xing header": bare, "in a WAV": in_wav(bare, 8 * RATE), "two files": content * 2}[kind])
    with pytest.raises(RowError, match=r"holds [0-9]+ samples, but its header leads to [0-9]+"):
        read_recording(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (bytes(4000), "holds only zeros"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"/annex/objects/SHA256E-s1--0.wav\n", "git annex get"),
        (b"\n<!DOCTYPE html><html><title>404</title></html>", "file but a web page; "),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "file but an XML file; "),
        (b'{"error": "not found"}', "file but a JSON file; "),
        (b"\0\0\0\x20moov\0\0\2\0", "a QuickTime film of the old kind; convert it: ffmpeg -i a.wav -vn a.flac"),
        (b"RIFF\x24\0\0\0AVI LIST", "an AVI video"),
        (b"G" + bytes(187) + b"G" + bytes(187), "an MPEG video"),
        (b"ADIF", "an AAC file without ADTS headers"),
        (b"FORM\0\0\1\0AIFFCOMM", "an AIFF file"),
        (b"PK\3\4\x14\0", "an archive"),
        (b"Hello there.", "it is not a wav, flac, mp3, ogg, opus, m4a, mp4, mov, webm, mkv or aac file"),
    ],
)
def test_what_lies_in_place_of_a_recording_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(RowError, match=message) as refused:
        read_recording(path)
    assert refused.value.reason == "unreadable_audio"


@pytest.mark.parametrize("name", ["a\0b.wav", "x" * 300 + ".wav", "/dev/zero"])
def test_impossible_paths_are_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(RowError) as refused:
        read_recording(tmp_path / name)
    assert refused.value.reason == "missing_audio"


def test_headerless_audio_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(range(1, 200)) * 20)
    with pytest.raises(RowError, match="cannot be read as audio"):
        read_recording(path)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 2_000_000_000])
def test_a_wav_written_into_a_pipe_is_read(tmp_path: Path, size: int) -> None:
    """Programs leave a placeholder in the header when they cannot go back to it."""
    path = write(tmp_path / "a.wav", speech(1.0))
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = size.to_bytes(4, "little")
    path.write_bytes(data)
    assert read_recording(path).samples == RATE
    data[40:44] = b"\0" * 4
    path.write_bytes(data)
    with pytest.raises(RowError, match="says that it is empty, though more follows"):
        read_recording(path)


def test_long_audio_is_not_read_into_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", np.zeros(RATE * 120, np.float32))
    with pytest.raises(RowError, match="longer than 30 s"):
        read_audio(path, max_seconds=30.0)
    with pytest.raises(RowError, match="the limit is 30 s"):
        read_audio(path, 10.0, 80.0, max_seconds=30.0)


@pytest.mark.parametrize(("start", "end"), [(5.0, 6.0), (0.5, 0.5)])
def test_parts_outside_are_refused(tmp_path: Path, start: float, end: float) -> None:
    with pytest.raises(RowError) as refused:
        read_audio(write(tmp_path / "a.wav", speech(1.0)), start, end)
    assert refused.value.reason == "segment_outside"


def test_samples_that_are_not_finite_show_in_the_peak(tmp_path: Path) -> None:
    waveform = np.stack([speech(0.5)] * 2, axis=1)
    waveform[100, 0], waveform[200] = np.nan, [np.inf, -np.inf]
    recording = read_recording(write(tmp_path / "a.wav", waveform, subtype="FLOAT"))
    assert np.isnan(recording.peak)
    assert np.isfinite(recording.sketch).all()


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_a_tone(rate: int) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)
    result = resample(tone, rate, 24_000)
    expected = np.sin(2 * np.pi * 440 * np.arange(24_000) / 24_000)
    assert (result.dtype, len(result)) == (np.float32, 24_000)
    assert np.abs(result - expected)[1_000:-1_000].max() < 1e-3


def test_the_same_rate_is_left_alone() -> None:
    waveform = speech(0.2)
    assert np.array_equal(resample(waveform, RATE, RATE), waveform)
