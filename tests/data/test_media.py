"""Recordings in MP4, Matroska and AAC files, and what strangers may put into their place."""

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from containers import write_media
from recordings import speech, write

from higgstune.data import audio, media
from higgstune.data.audio import audio_hash, read_audio, read_recording
from higgstune.data.importers import read_source
from higgstune.data.manifest import Utterance
from higgstune.data.rejection import RowError

pytestmark = pytest.mark.processes
RATE = 48_000
SHARED = Path(__file__).parents[3] / "shared" / "raw" / "containers"


@pytest.fixture(autouse=True)
def nothing_parked() -> Iterator[None]:
    media._close_parked()
    yield
    media._close_parked()


def refusal(path: Path) -> RowError:
    """The error of a file that neither way of reading accepts."""
    for read in (read_audio, read_recording):
        with pytest.raises(RowError) as refused:
            read(path)
    assert str(path) in str(refused.value)
    return refused.value


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("clip.m4a", 6.016), ("video.mp4", 6.016), ("clip.aac", 6.037), ("clip.webm", 6.0), ("clip.mkv", 6.0)],
)
def test_shared_recordings_have_their_known_length(name: str, seconds: float) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is missing")
    assert read_recording(SHARED / name).seconds == pytest.approx(seconds, abs=0.001)


@pytest.mark.parametrize("name", ["a.m4a", "a.mp4", "a.mov", "a.webm", "a.mkv", "a.aac"])
def test_every_container_is_read_by_its_content(tmp_path: Path, name: str) -> None:
    waveform = speech(2.0, rate=RATE)
    path = write_media(tmp_path / name, waveform, picture=name == "a.mp4").rename(tmp_path / "a.wav")
    result, rate = read_audio(path)
    assert (result.dtype, rate) == (np.float32, RATE)
    assert 0 <= len(result) - len(waveform) < 2100  # up to two frames, of which AAC has one before and one behind
    shift = 1024 if name == "a.aac" else 0
    assert np.corrcoef(result[shift : shift + len(waveform)], waveform)[0, 1] > 0.95
    recording = read_recording(path)
    assert (recording.sha256, recording.samples) == (audio_hash(result, rate), len(result))


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mkv", "flac"), ("a.mov", "alac"), ("a.mov", "pcm_s16le"), ("a.mkv", "pcm_s24le")]
)
def test_lossless_samples_hash_like_those_of_a_wav(tmp_path: Path, name: str, codec: str) -> None:
    stereo = np.stack([speech(1.0, seed, rate=RATE) for seed in (0, 1)], axis=1)
    path = write_media(tmp_path / name, stereo, codec=codec)
    wav = write(tmp_path / "a.wav", (stereo * 32767).round().astype(np.int16), RATE)
    assert read_recording(path).sha256 == read_recording(wav).sha256


@pytest.mark.parametrize("name", ["a.m4a", "a.webm", "a.mkv", "a.aac"])
def test_parts_are_slices_of_the_whole(tmp_path: Path, name: str) -> None:
    """Sample for sample, in order, back again and beyond a block, whether or not the last decoder continues."""
    path = write_media(tmp_path / name, speech(6.0, rate=RATE))
    whole, _ = read_audio(path)
    for start, end in ((0.0, 0.5), (0.5, 2.25), (2.5, 4.75), (1.0, 1.5), (None, 0.25), (5.0, None), (0.1, 5.9)):
        part, _ = read_audio(path, start, end)
        first, last = round((start or 0) * RATE), None if end is None else round(end * RATE)
        assert np.array_equal(part, whole[first:last]), (start, end)
    with pytest.raises(RowError, match="has no sample 336000") as refused:
        read_audio(path, 7.0, 8.0)
    assert refused.value.reason == "segment_outside"


def test_the_next_part_continues_with_the_same_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    start = media.MediaFile._start

    def counted(file: media.MediaFile) -> None:
        start(file)
        started.append(file._process.pid)

    monkeypatch.setattr(media.MediaFile, "_start", counted)
    path = write_media(tmp_path / "a.m4a", speech(4.0, rate=RATE))
    for number in range(6):
        read_audio(path, number / 2, number / 2 + 0.4)
    assert len(started) == 1
    read_audio(path, 1.0, 2.0)
    assert len(started) == 2
    other = write_media(tmp_path / "new.m4a", speech(4.0, 1, rate=RATE))
    with monkeypatch.context() as fork:
        fork.setattr(media.os, "getpid", lambda: 1)
        read_audio(path, 2.0, 2.5)
        assert len(started) == 3
        assert os.waitpid(started[1], 0)[1] != signal.SIGKILL  # it ended by itself when its pipe was closed
        media._close_parked()
    other.replace(path)
    changed, _ = read_audio(path, 3.0, 3.5)
    assert len(started) == 4
    assert np.array_equal(changed, read_audio(path)[0][3 * RATE : round(3.5 * RATE)])


def test_observers_get_channels_and_the_first_stream_counts(tmp_path: Path) -> None:
    left = speech(1.0, rate=RATE)
    path = write_media(tmp_path / "a.mov", np.stack([left, 0 * left], axis=1), codec="pcm_f32le")
    blocks: list[np.ndarray] = []
    waveform, _ = read_audio(path, observe=lambda block, rate: blocks.append(block))
    assert np.concatenate(blocks).shape == (RATE, 2)
    assert waveform == pytest.approx(left / 2, abs=1e-4)


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9, 0.97])
@pytest.mark.parametrize("name", ["a.m4a", "fast.m4a", "fragments.m4a", "film.mp4", "a.webm", "film.mkv", "a.aac"])
def test_files_that_are_cut_off_are_refused(tmp_path: Path, name: str, kept: float) -> None:
    options = {
        "fast.m4a": {"movflags": "faststart"},
        "film.mp4": {"movflags": "faststart"},
        "fragments.m4a": {"movflags": "frag_keyframe+empty_moov", "frag_duration": "500000"},
    }.get(name, {})
    path = write_media(tmp_path / name, speech(4.0, rate=RATE), picture="film" in name, **options)
    whole = path.read_bytes()
    assert 4.0 <= read_recording(path).seconds < 4.05
    path.write_bytes(whole[: round(kept * len(whole))])
    assert refusal(path).reason == "unreadable_audio"


def test_a_live_recording_has_no_length_and_is_read(tmp_path: Path) -> None:
    """As a browser writes it."""
    path = write_media(tmp_path / "a.webm", speech(2.0, rate=RATE), live="1")
    assert read_recording(path).seconds == pytest.approx(2.0, abs=0.02)


def test_a_damaged_middle_is_refused(tmp_path: Path) -> None:
    path = write_media(tmp_path / "a.m4a", speech(4.0, rate=RATE))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = b"\xff" * 4000
    path.write_bytes(content)
    assert "is cut off or damaged" in str(refusal(path))


LISTS = {
    "ffconcat": "ffconcat version 1.0\nfile secret.wav\n",
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.wav\n#EXT-X-ENDLIST\n",
    "playlist": "[playlist]\nFile1=secret.wav\n",
}


@pytest.mark.parametrize("name", ["a.m4a", "a.m3u8", "a.mkv", "a.wav"])
@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_other_files_are_not_followed(tmp_path: Path, name: str, kind: str) -> None:
    write(tmp_path / "secret.wav", speech(1.0))
    (tmp_path / name).write_text(LISTS[kind])
    message = str(refusal(tmp_path / name))
    assert "a list of other files" in message
    assert f"ffmpeg -i {name} -vn a.flac" in message


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of a process are set on Linux")
@pytest.mark.parametrize(("format", "kind"), [("concat", "ffconcat"), ("hls", "HLS"), ("mov", "ffconcat")])
def test_the_decoder_itself_opens_no_other_file(tmp_path: Path, format: str, kind: str) -> None:
    """Even where the first bytes had let a list pass."""
    write(tmp_path / "secret.wav", speech(1.0))
    path = tmp_path / "a.m4a"
    path.write_text(LISTS[kind].replace("secret", str(tmp_path / "secret")))
    with pytest.raises(RowError):
        media.MediaFile(path, format, 10**9)


def test_the_decoder_follows_a_list_where_nothing_forbids_it(tmp_path: Path) -> None:
    """What the test above would not notice otherwise."""
    import av

    write(tmp_path / "secret.wav", speech(1.0))
    path = tmp_path / "a.m4a"
    path.write_text(LISTS["ffconcat"])
    with av.open(str(path)) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) == 16_000


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "ac3"), ("a.mkv", "ac3"), ("a.mkv", "mp2")])
def test_other_codecs_are_not_decoded(tmp_path: Path, name: str, codec: str) -> None:
    error = refusal(write_media(tmp_path / name, speech(1.0, rate=RATE), codec=codec))
    assert error.reason == "unsupported_format"
    assert f"holds sound in the codec {codec}, which is not read: convert it: ffmpeg -i {name}" in str(error)


def test_a_film_without_sound(tmp_path: Path) -> None:
    error = refusal(write_media(tmp_path / "a.mp4", picture=True))
    assert (error.reason, "has no audio stream" in str(error)) == ("unreadable_audio", True)


def patched(path: Path, box: bytes, offset: int, value: int, size: int = 4) -> Path:
    """An MP4 with another number in its first box of this name."""
    content = bytearray(path.read_bytes())
    place = content.index(box) + 4 + offset
    content[place : place + size] = value.to_bytes(size, "big")
    path.write_bytes(content)
    return path


def test_a_huge_claimed_length_is_refused(tmp_path: Path) -> None:
    path = write_media(tmp_path / "a.mov", speech(1.0, rate=RATE), codec="pcm_s16le", use_editlist="0")
    assert read_recording(path).samples == RATE
    patched(path, b"stts", 12, 100_000)  # samples last longer
    assert "as only silence or a damaged header does" in str(refusal(patched(path, b"mdhd", 16, 0xF0000000)))


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of a process are set on Linux")
def test_an_index_that_claims_gigabytes_takes_none(tmp_path: Path) -> None:
    """Each claimed sample is 24 bytes of libavformat's index: 2.4 GB at the peak without a limit."""
    path = write_media(tmp_path / "a.m4a", speech(1.0, rate=RATE))
    patched(path, b"stsz", 4, 400)  # bytes of each of them
    patched(path, b"stsz", 8, 1 << 26)
    patched(path, b"stsc", 12, 1 << 26)  # all in the first chunk
    program = """
import resource, sys
from higgstune.data.audio import read_recording
from higgstune.data.rejection import RowError
peak = lambda who: resource.getrusage(who).ru_maxrss // 1024
before = peak(resource.RUSAGE_SELF)  # a process inherits the peak of the one that started it
try:
    read_recording(sys.argv[1])
except RowError as error:
    print(error)
print(max(peak(resource.RUSAGE_SELF), peak(resource.RUSAGE_CHILDREN)) - before)
"""
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    message, megabytes = done.stdout.splitlines()
    assert "holds no sound that can be decoded" in message
    assert int(megabytes) < 300


def test_hours_of_compressed_silence_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matroska does not say how many samples it has, so they are counted."""
    path = write_media(tmp_path / "a.mkv", np.zeros(RATE * 60, np.float32))
    assert read_recording(path).seconds == 60
    monkeypatch.setattr(audio, "_MAX_IN_MEMORY", RATE * 30)  # as if that were the hours
    assert "as only silence or a damaged" in str(refusal(path))
    assert read_recording(write_media(tmp_path / "b.mkv", speech(60.0, rate=RATE))).seconds == 60


def fake_decoder(path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    path.write_text("import os, sys, time, struct, json\nout = sys.stdout.buffer\n" + body)
    monkeypatch.setattr(media, "_DECODER", path)


HEADER = """
head = json.dumps({"rate": 48000, "channels": 1, "claimed": 0}).encode()
out.write(struct.pack("<cI", b"h", len(head)) + head)
out.flush()
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("time.sleep(60)", "its decoder was silent for 2 s; convert it: ffmpeg -i a.m4a -vn a.flac"),
        (HEADER + "time.sleep(60)", "its decoder was silent for 2 s"),
        ("os.abort()", "exit code -6"),
        (HEADER + "os.abort()", "exit code -6"),
        (HEADER + "out.write(struct.pack('<cI', b's', 1 << 31)); out.flush(); time.sleep(60)", "the decoder ended"),
        (HEADER + "out.write(struct.pack('<cI', b's', 3) + bytes(3)); out.flush(); time.sleep(60)", "decoder ended"),
        ("raise SystemExit(3)", "exit code 3"),
    ],
)
def test_a_decoder_that_hangs_or_crashes_refuses_its_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    path = write_media(tmp_path / "a.m4a", speech(1.0, rate=RATE))
    with monkeypatch.context() as patch:
        fake_decoder(tmp_path / "decoder.py", patch, body)
        patch.setattr(media, "_SECONDS", 2.0 if "silent" in message else 60.0)
        patch.setattr(media, "_SECONDS_TO_END", 0.5)
        begun = time.monotonic()
        with pytest.raises(RowError, match=message) as refused:
            read_recording(path)
        assert time.monotonic() - begun < 50
    assert refused.value.reason == "unreadable_audio"
    assert read_recording(path).rate == RATE


def test_without_the_extra_both_ways_out_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_media(tmp_path / "it's a.m4a", speech(1.0, rate=RATE))
    monkeypatch.setattr(media, "find_spec", lambda name: None)
    error = refusal(path)
    assert error.reason == "unsupported_format"
    assert "pip install 'higgstune[media]'" in str(error)
    assert """ffmpeg -i 'it'"'"'s a.m4a' -vn 'it'"'"'s a.flac'""" in str(error)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.wma", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(99)),
        ("a.ac3", b"\x0b\x77" + bytes(99)),
        ("-a.avi", b"RIFF" + struct.pack("<I", 99) + b"AVI LIST" + bytes(99)),
        ("a.flac", b"\x0b\x77" + bytes(99)),
    ],
)
def test_other_formats_are_refused_with_the_command_that_converts_them(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    typed = {
        "-a.avi": "ffmpeg -i ./-a.avi -vn ./-a.flac",
        "a.flac": "ffmpeg -i a.flac -vn converted-a.flac",
    }.get(name, f"ffmpeg -i {name} -vn a.flac")
    assert typed in str(refusal(tmp_path / name))
    (tmp_path / f"{Path(name).stem}.txt").write_text("Hello there.")
    (row,) = read_source(tmp_path)
    if name != "a.flac":
        assert isinstance(row.content, RowError)
        assert (row.content.reason, typed in str(row.content)) == ("unsupported_format", True)


def test_a_folder_uses_what_was_converted(tmp_path: Path) -> None:
    """And not the original beside it, which would be the same clip twice."""
    write_media(tmp_path / "1.m4a", speech(1.0, rate=RATE))
    write(tmp_path / "1.flac", speech(1.0))
    write_media(tmp_path / "2.MP4", speech(1.0, 1, rate=RATE), picture=True)
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text(f"Sentence {name}")
    source = read_source(tmp_path)
    assert [row.content.audio for row in source if isinstance(row.content, Utterance)] == ["1.flac", "2.MP4"]
    assert "files whose sound lies beside them in a plain format, which is used: 1" in list(source.notes())
    (tmp_path / "metadata.csv").write_text("1|Sentence one is here.\n2|Sentence two is here.\n")
    table = read_source(tmp_path / "metadata.csv")
    assert [row.content.audio for row in table if isinstance(row.content, Utterance)] == ["1.flac", "2.MP4"]
