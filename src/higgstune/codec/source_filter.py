"""A small neural vocoder: log-mel columns -> a waveform, by a pulse train and noise that two networks filter.

    log-mel -> pitch network -> F0 and voicing -> pulse train
    log-mel, F0, voicing -> filter network -> gain and phase for the pulses, gain for noise, in each column
    pulses and noise -> STFT, times the filters -> overlap-add

Inference only, in numpy; `tools/demo/train_decoder.py` has the training. The networks see `PITCH_CONTEXT` and
`FILTER_CONTEXT` columns to either side and nothing further. Only the pulses' phase depends on all that came before.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from higgstune.errors import CheckpointError

WEIGHTS = "decoder.safetensors"
HOP, N_FFT, SAMPLE_RATE = 240, 960, 24_000  # samples, samples, Hz
BINS = N_FFT // 2 + 1
PITCH_BINS = np.geomspace(62.0, 430.0, 120).astype(np.float32)  # Hz
KERNEL, PITCH_BLOCKS, FILTER_BLOCKS = 7, 4, 5
PITCH_CONTEXT = KERNEL // 2 * (1 + PITCH_BLOCKS)  # columns
FILTER_CONTEXT = KERNEL // 2 * (1 + FILTER_BLOCKS)
CONTEXT = PITCH_CONTEXT + FILTER_CONTEXT + N_FFT // HOP  # columns that a sample depends on, but for the pulses' phase
MEL_SHIFT, MEL_SCALE = 3.0, 1.5  # the networks' input is (log-mel + 3) / 1.5
_HIGHEST_HARMONIC = 11_500.0  # Hz
_NOISE_BLOCK = 4096  # samples

Floats = NDArray[np.float32]


def network_input(mel: Floats, f0: Floats, voiced: Floats) -> Floats:
    """[T, M] scaled log-mel, F0 [T] in Hz and voicing [T] in 0..1 -> [T, M + 2]."""
    return np.concatenate([mel, voiced[:, None], np.log(f0 / 150)[:, None]], axis=1).astype(np.float32)


def turns(f0: Floats) -> NDArray[np.float64]:
    """F0 [T] in Hz, a value a column -> periods since the start, at each sample [T * HOP]."""
    return np.cumsum(np.interp(_columns(len(f0)), np.arange(len(f0)), f0) / SAMPLE_RATE)


def excitation(f0: Floats, voiced: Floats, lock: Any = None) -> Floats:
    """F0 [T] in Hz and voicing [T] in 0..1, a value a column -> pulses [T * HOP] of about unit power where voiced.

    Each pulse has all harmonics below 11.5 kHz as cosines. `lock`, one number or [T * HOP], is added to the phase.
    """
    at, columns = _columns(len(f0)), np.arange(len(f0))
    hertz = np.interp(at, columns, f0)
    phase = turns(f0) * 2 * np.pi
    if lock is not None:
        phase = phase + lock
    harmonics = np.floor(_HIGHEST_HARMONIC / hertz)
    half = np.sin(phase / 2)
    flat = np.abs(half) < 1e-4
    ratio = np.sin((harmonics + 0.5) * phase) / np.where(flat, 1, 2 * half)
    pulses = np.where(flat, harmonics, ratio - 0.5) / np.sqrt(harmonics / 2)
    return (pulses * np.interp(at, columns, voiced)).astype(np.float32)


def _columns(count: int) -> NDArray[np.float64]:
    """The place of each sample [count * HOP] among the middles of columns."""
    return (np.arange(count * HOP) + 0.5) / HOP - 0.5


def noise(samples: int, first: int = 0) -> Floats:
    """[samples] of white noise from sample `first` on; a value depends on its place alone, so a stream has the same."""
    blocks = range(first // _NOISE_BLOCK, -(-(first + samples) // _NOISE_BLOCK))
    drawn = [np.random.default_rng((7, block)).standard_normal(_NOISE_BLOCK, dtype=np.float32) for block in blocks]
    return np.concatenate([*drawn, np.zeros(0, np.float32)])[first % _NOISE_BLOCK :][:samples]


def stft(waveform: Floats) -> NDArray[np.complex64]:
    """[T * HOP] -> [T, BINS]; column t is centred on the middle of hop t."""
    from scipy import fft  # takes long to import

    margin = (N_FFT - HOP) // 2
    padded = np.pad(waveform, (margin, N_FFT - HOP - margin))
    windows = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP]
    return fft.rfft(windows * _window(), axis=-1).astype(np.complex64)


def overlap_add(spectrum: NDArray[np.complex64]) -> Floats:
    """[T, BINS] -> [T * HOP], the inverse of `stft` but for the ends."""
    from scipy import fft

    pieces = fft.irfft(spectrum, n=N_FFT, axis=-1).astype(np.float32) * _window() / 1.5
    hops = N_FFT // HOP
    total = np.zeros((len(pieces) + hops - 1, HOP), dtype=np.float32)
    for part in range(hops):
        total[part : part + len(pieces)] += pieces[:, part * HOP : (part + 1) * HOP]
    margin = (N_FFT - HOP) // 2
    return total.reshape(-1)[margin : margin + len(pieces) * HOP]


def _window() -> Floats:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)).astype(np.float32)


class SourceFilterDecoder:
    """The two networks of a folder, for `num_mels` mel bands."""

    def __init__(self, tensors: dict[str, NDArray[np.float16]]) -> None:
        """Raises KeyError for a missing tensor."""
        self._tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
        self.num_mels = self._tensors["pitch.input.weight"].shape[1]

    @classmethod
    def from_pretrained(cls, path: Path, num_mels: int) -> "SourceFilterDecoder":
        """Read `decoder.safetensors`. Raises CheckpointError."""
        try:
            decoder = cls(load_file(path))
            decoder(np.zeros((1, decoder.num_mels), dtype=np.float32))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as a decoder: {error}. Copy the codec's folder again."
            ) from error
        if decoder.num_mels != num_mels:
            raise CheckpointError(
                f"{path}: reads {decoder.num_mels} mel bands, but the codec has {num_mels}. "
                "Copy the codec's folder again."
            )
        return decoder

    def __call__(self, log_mel: Floats) -> Floats:
        """[T, num_mels] natural log of mean magnitudes -> [T * HOP] samples."""
        return self.part(log_mel, slice(0, len(log_mel)))[0]

    def part(self, log_mel: Floats, wanted: slice, first: int = 0, before: float = 0.0) -> tuple[Floats, float]:
        """The samples of the `wanted` columns of a window [T, num_mels] of a clip, which starts at column `first`, and
        the periods of the pulses up to their end. Those up to their start were `before`.
        """
        mel = ((log_mel + MEL_SHIFT) / MEL_SCALE).astype(np.float32)
        f0, voiced = self.pitch(mel)
        filters = self._network("filter", network_input(mel, f0, voiced), FILTER_BLOCKS)
        gain, phase, noise_gain = np.split(filters, 3, axis=1)
        begin, end = wanted.start * HOP, wanted.stop * HOP
        periods = np.concatenate([np.zeros(1), turns(f0)])
        missing = before - periods[begin]  # of this window, whose periods begin at 0
        spectrum = stft(excitation(f0, voiced, 2 * np.pi * missing)) * np.exp(np.minimum(gain, 7) + 1j * phase)
        spectrum = spectrum + stft(noise(len(mel) * HOP, first * HOP)) * np.exp(np.minimum(noise_gain, 7))
        return overlap_add(spectrum.astype(np.complex64))[begin:end], float(missing + periods[end]) % 1.0

    def pitch(self, mel: Floats) -> tuple[Floats, Floats]:
        """[T, num_mels] scaled log-mel -> F0 [T] in Hz, everywhere, and voicing [T], 0 or 1."""
        scores = self._network("pitch", mel, PITCH_BLOCKS)
        f0 = mean_pitch(scores[:, :-1])
        return f0, (scores[:, -1] > 0).astype(np.float32)

    def _network(self, name: str, x: Floats, blocks: int) -> Floats:
        get = self._tensors
        x = _convolve(x, get[f"{name}.input.weight"], get[f"{name}.input.bias"])
        for number in range(blocks):
            block = f"{name}.blocks.{number}"
            y = _depthwise(x, get[f"{block}.depthwise.weight"][:, 0], get[f"{block}.depthwise.bias"])
            y = _layer_norm(y, get[f"{block}.norm.weight"], get[f"{block}.norm.bias"])
            y = _gelu(y @ get[f"{block}.up.weight"].T + get[f"{block}.up.bias"])
            x = x + get[f"{block}.scale"] * (y @ get[f"{block}.down.weight"].T + get[f"{block}.down.bias"])
        x = _layer_norm(x, get[f"{name}.norm.weight"], get[f"{name}.norm.bias"])
        return x @ get[f"{name}.output.weight"].T + get[f"{name}.output.bias"]


def mean_pitch(scores: Floats) -> Floats:
    """[T, bins] -> Hz [T]: the mean of the seven bins around the likeliest one, by their probabilities."""
    best = scores.argmax(1)
    near = np.clip(best[:, None] + np.arange(-3, 4), 0, len(PITCH_BINS) - 1)
    weights = np.take_along_axis(scores, near, axis=1)
    weights = np.exp(weights - weights.max(1, keepdims=True))
    log = np.log(PITCH_BINS)[near]
    return np.exp((weights * log).sum(1) / weights.sum(1)).astype(np.float32)


def _neighbours(x: Floats) -> Floats:
    """[T, C] -> [T, C, KERNEL], zeros beyond the ends."""
    side = KERNEL // 2
    return np.lib.stride_tricks.sliding_window_view(np.pad(x, ((side, side), (0, 0))), KERNEL, axis=0)


def _convolve(x: Floats, weight: Floats, bias: Floats) -> Floats:
    """[T, C] -> [T, D]; weight [D, C, KERNEL]."""
    windows = _neighbours(x).reshape(len(x), -1)
    return windows @ weight.reshape(len(weight), -1).T + bias


def _depthwise(x: Floats, weight: Floats, bias: Floats) -> Floats:
    """[T, C] -> [T, C]; weight [C, KERNEL]."""
    return np.einsum("tck,ck->tc", _neighbours(x), weight) + bias


def _layer_norm(x: Floats, weight: Floats, bias: Floats) -> Floats:
    centred = x - x.mean(1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * weight + bias


def _gelu(x: Floats) -> Floats:
    """The tanh approximation."""
    return 0.5 * x * (1 + np.tanh(np.float32(0.7978845608) * (x + 0.044715 * x**3)))
