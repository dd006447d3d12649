"""Mel spectra and their inversion (fast Griffin-Lim). float32 throughout, the same result every time.

Shapes: T = mel frames (one per hop), F = n_fft / 2 + 1 linear bins, M = mel bands.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import fft
from scipy.signal import get_window

_TINY = 1e-8


@dataclass(frozen=True)
class Spectrum:
    """A Hann-windowed short-time spectrum, frame t centred on the middle of hop t, and its mel bands."""

    sample_rate: int  # Hz
    n_fft: int  # samples in one window
    hop: int  # samples
    num_mels: int
    max_hz: float

    @cached_property
    def window(self) -> np.ndarray:
        """[n_fft] float32."""
        return get_window("hann", self.n_fft).astype(np.float32)

    @cached_property
    def filters(self) -> np.ndarray:
        """[F, M] triangular filters on the mel scale 2595 log10(1 + f / 700), each of unit sum."""
        top = 2595 * np.log10(1 + self.max_hz / 700)
        edges = 700 * (10 ** (np.linspace(0, top, self.num_mels + 2) / 2595) - 1)
        hertz = np.linspace(0, self.sample_rate / 2, self.n_fft // 2 + 1)[:, None]
        rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
        falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
        triangles = np.maximum(0, np.minimum(rising, falling))
        return (triangles / np.maximum(triangles.sum(0), _TINY)).astype(np.float32)

    def mel(self, waveform: np.ndarray) -> np.ndarray:
        """[T * hop] samples -> [T, M] mean magnitude in each band."""
        if len(waveform) == 0:
            return np.zeros((0, self.num_mels), dtype=np.float32)
        return np.abs(self._stft(self._pad(waveform))) @ self.filters

    def invert(self, mel: np.ndarray, iterations: int, momentum: float) -> np.ndarray:
        """[T, M] mean magnitudes -> [T * hop], by Griffin-Lim with momentum (Perraudin et al., 2013)."""
        magnitude = self._linear(mel)
        frames = len(magnitude)
        estimate = magnitude * _start_phase(magnitude.shape)
        previous = np.zeros_like(estimate)
        for _ in range(iterations):
            rebuilt = self._stft(self._istft(estimate))
            direction = rebuilt + momentum * (rebuilt - previous)
            estimate = magnitude * (direction / (np.abs(direction) + _TINY))
            previous = rebuilt
        margin = self._margin
        return self._istft(estimate)[margin : margin + frames * self.hop]

    def _linear(self, mel: np.ndarray, iterations: int = 30) -> np.ndarray:
        """[T, M] -> [T, F] non-negative magnitudes with those mel bands (multiplicative least squares)."""
        filters = self.filters
        spread = filters / np.maximum(filters.sum(1, keepdims=True), _TINY)
        magnitude = mel @ spread.T
        wanted = mel @ filters.T
        for _ in range(iterations):
            magnitude *= wanted / (magnitude @ filters @ filters.T + _TINY)
        return magnitude

    @property
    def _margin(self) -> int:
        return (self.n_fft - self.hop) // 2

    def _pad(self, waveform: np.ndarray) -> np.ndarray:
        return np.pad(waveform.astype(np.float32), (self._margin, self.n_fft - self.hop - self._margin))

    def _stft(self, padded: np.ndarray) -> np.ndarray:
        """[(T - 1) * hop + n_fft] -> [T, F] complex64."""
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.n_fft)[:: self.hop]
        return fft.rfft(windows * self.window, axis=-1)

    def _istft(self, spectrum: np.ndarray) -> np.ndarray:
        """[T, F] complex64 -> [(T - 1) * hop + n_fft], the least-squares signal of that spectrum."""
        pieces = fft.irfft(spectrum, n=self.n_fft, axis=-1) * self.window
        weight = np.broadcast_to(self.window**2, pieces.shape)
        return self._overlap_add(pieces) / np.maximum(self._overlap_add(weight), 1e-3)

    def _overlap_add(self, pieces: np.ndarray) -> np.ndarray:
        """[T, n_fft] -> [(T - 1) * hop + n_fft]: whole hops at a time, so no index arithmetic per sample."""
        hops = -(-self.n_fft // self.hop)
        pieces = np.pad(pieces, ((0, 0), (0, hops * self.hop - self.n_fft))).reshape(len(pieces), hops, self.hop)
        total = np.zeros((len(pieces) + hops - 1, self.hop), dtype=np.float32)
        for part in range(hops):
            total[part : part + len(pieces)] += pieces[:, part]
        return total.reshape(-1)[: (len(pieces) - 1) * self.hop + self.n_fft]


def _start_phase(shape: tuple[int, ...]) -> np.ndarray:
    phase = np.random.default_rng(0).uniform(0, 2 * np.pi, shape)
    return np.exp(1j * phase).astype(np.complex64)
