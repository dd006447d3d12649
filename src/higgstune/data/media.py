"""Sound in MP4, Matroska and AAC files, decoded by PyAV (extra `media`) in a process of its own.

    file, opened here -> media_decoder.py: its first audio stream -> pipe -> blocks [samples, channels]

The process gets the open file, never its path, and the format that the first bytes show, so that a list of other files
is not followed. On Linux it cannot open any other file, has little address space, and is ended when it stalls.
"""

import atexit
import json
import os
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from higgstune.data.rejection import RowError
from higgstune.data.signatures import conversion

_DECODER = Path(__file__).with_name("media_decoder.py")
_MEGABYTES = 1_000  # of address space; it starts with 120, and the index of four hours of film takes 100
_SECONDS = 60.0  # without a block: a machine that is busy starts the process in five
_SECONDS_TO_END = 5.0  # for its exit code
_MAX_MESSAGE = 1 << 26  # bytes; the longest frame of 64 channels is a quarter of it
_PARKED: "list[MediaFile]" = []  # the last one of each thread whose end was not reached


class MediaFile:
    """The first audio stream of a file, with the part of `soundfile.SoundFile` that reading needs.

    Samples are numbered as they are decoded from the beginning, since only that gives the same ones again: codecs carry
    state from frame to frame. So `seek` decodes what it skips, and starts anew to go back.
    """

    subtype = extra_info = ""

    def __init__(self, path: str | Path, format: str, max_samples: int) -> None:
        """Start to decode a file, whose `format` is that of `signatures.find_container`.

        Raises RowError without PyAV, for a file that cannot be decoded and, here or in `read`, for one with more than
        `max_samples`.
        """
        if find_spec("av") is None:
            raise RowError(
                "unsupported_format",
                f"{path} needs the extra `media` to be read: pip install 'higgstune[media]', or {conversion(path)}",
            )
        self.name, self.format = str(path), format
        self._max_samples = max_samples
        self._owner = os.getpid()
        self._start()

    def _start(self) -> None:
        self._position, self._rest, self._at_end = 0, np.empty((0, 1), np.float32), False
        try:
            with open(self.name, "rb") as file:
                self._identity = _identity(file.fileno())
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(_DECODER), self.format, str(_MEGABYTES)],
                    stdin=file,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for this process, which then ends that one
                )
        except OSError as error:
            raise RowError("unreadable_audio", f"{self.name} cannot be read: {error.strerror}") from error
        letter, content = self._receive()
        if letter != b"h":
            raise self._broken()
        header = json.loads(content)
        self.samplerate, self.channels, self.frames = header["rate"], header["channels"], header["claimed"]

    def read(self, frames: int, **_layout: object) -> np.ndarray:
        """The next [frames, channels] float32; fewer at the end. Raises RowError where it cannot be decoded."""
        parts, missing = [], frames
        while missing > 0:
            if not len(self._rest) and not self._fill():
                break
            part, self._rest = self._rest[:missing], self._rest[missing:]
            parts.append(part)
            missing -= len(part)
        block = np.concatenate(parts) if parts else np.empty((0, self.channels), np.float32)
        self._position += len(block)
        if self._position > self._max_samples:
            hours = self._position / self.samplerate / 3600
            self.close()
            raise RowError(
                "unreadable_audio",
                f"{self.name} has over {hours:.1f} h in {self._identity[2]} bytes, as only silence or a damaged file "
                "does",
            )
        return block

    def seek(self, first: int) -> int:
        """Continue with sample `first`. Raises RowError where there are fewer, or as `read`."""
        if first < self._position:
            self.close()
            self._start()
        while self._position < first:
            if not len(self.read(min(first - self._position, 1 << 16))):
                raise RowError("segment_outside", f"{self.name} has no sample {first}: it has {self._position}")
        return self._position

    def close(self) -> None:
        """End the decoder; one that a fork of this process took along is left to its owner."""
        assert self._process.stdout is not None
        self._process.stdout.close()
        if self._owner != os.getpid():
            self._process.returncode = 0  # so that Popen neither waits for it nor warns that it runs
            return
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> "MediaFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_details: object) -> None:
        """Close it; or keep it for the next part of the same file, which often begins where this one ended."""
        if kind is None and not self._at_end:
            _PARKED.append(self)
        else:
            self.close()

    def continues(self, path: str | Path) -> bool:
        """Whether it may be used further: this process has started it, and the file is still the same."""
        return self._owner == os.getpid() and self.name == str(path) and _identity(path) == self._identity

    def _fill(self) -> bool:
        """Get the next samples; False at the end."""
        if self._at_end:
            return False
        letter, content = self._receive()
        if letter == b"s" and len(content) % (4 * self.channels) == 0:
            self._rest = np.frombuffer(content, "<f4").reshape(-1, self.channels)
            return True
        if letter != b".":
            raise self._broken()
        self._at_end = True
        return False

    def _receive(self) -> tuple[bytes, bytes]:
        """The next message: its letter and its content. Raises RowError where it says what is wrong, or never comes."""
        output = self._process.stdout
        assert output is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(_SECONDS, end)
        timer.daemon = True
        timer.start()
        try:
            head = output.read(5)
            letter, length = struct.unpack("<cI", head) if len(head) == 5 else (b"", 0)
            content = output.read(length) if length <= _MAX_MESSAGE else b""
        except BaseException:  # Ctrl-C, too
            self.close()
            raise
        finally:
            timer.cancel()
        if late.is_set():
            self.close()
            raise self._undecoded(f"its decoder was silent for {_SECONDS:g} s")
        if not letter or len(content) != length:
            raise self._broken()
        if letter == b"e":
            self.close()
            error = json.loads(content)
            advice = f": {conversion(self.name)}" if error["convert"] else ""
            raise RowError(error["reason"], f"{self.name} {error['message']}{advice}")
        return letter, content

    def _broken(self) -> RowError:
        """The error for a process that ended, or answered, as it never should."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_SECONDS_TO_END)
        self.close()
        code = self._process.returncode
        return self._undecoded(f"the decoder ended with exit code {code}, as a damaged file may cause")

    def _undecoded(self, why: str) -> RowError:
        return RowError("unreadable_audio", f"{self.name} cannot be decoded: {why}; {conversion(self.name)}")


def open_media(path: str | Path, format: str, max_samples: int, *, whole: bool) -> MediaFile:
    """A file to read from its beginning or, unless `whole`, from where the last part of the same one ended.

    Raises RowError as MediaFile does.
    """
    with suppress(IndexError):  # nothing is parked
        parked = _PARKED.pop()
        if not whole and parked.continues(path):
            return parked
        parked.close()
    return MediaFile(path, format, max_samples)


@atexit.register
def _close_parked() -> None:
    while _PARKED:
        _PARKED.pop().close()


def _identity(file: str | Path | int) -> tuple[int, int, int, int]:
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
