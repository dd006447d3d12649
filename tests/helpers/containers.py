"""Recordings in containers that PyAV writes: as phones, cameras and browsers make them, and as strangers might."""

from pathlib import Path
from typing import Any

import av
import numpy as np

CODECS = {".aac": ("adts", "aac"), ".webm": ("webm", "libopus"), ".mkv": ("matroska", "flac"), ".mov": ("mov", "alac")}


def write_media(
    path: Path,
    waveform: np.ndarray | None = None,
    *,
    codec: str | None = None,
    rate: int = 48_000,
    picture: bool = False,
    **options: str,
) -> Path:
    """Write [samples] or [samples, channels] of float32 in the container of the path's suffix; None writes no sound."""
    format, default = CODECS.get(path.suffix, ("mp4", "aac"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=format, options=options) as container:
        video: Any = container.add_stream("mpeg4", rate=25) if picture else None
        if video is not None:
            video.width = video.height = 64
            video.pix_fmt = "yuv420p"
        if waveform is not None:
            channels = np.atleast_2d(waveform.T)
            audio: Any = container.add_stream(codec or default, rate=rate)
            audio.layout = "stereo" if len(channels) == 2 else "mono"
            _encode(container, audio, channels)
        for _ in range(25 * picture):
            container.mux(video.encode(av.VideoFrame(64, 64, "yuv420p")))
        if video is not None:
            container.mux(video.encode(None))
    return path


def _encode(container: Any, stream: Any, channels: np.ndarray) -> None:
    """The waveform as 16-bit samples, converted to what the codec wants."""
    stream.open()
    resampler = av.AudioResampler(stream.format, stream.layout, stream.rate, stream.frame_size or 1024)
    packed = (np.clip(channels, -1, 1) * 32767).round().astype(np.int16)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(packed.T).reshape(1, -1), "s16", stream.layout.name)
    frame.sample_rate, frame.pts = stream.rate, 0
    for part in (*resampler.resample(frame), *resampler.resample(None)):
        container.mux(stream.encode(part))
    container.mux(stream.encode(None))
