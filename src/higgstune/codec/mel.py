"""A codec that is fitted in a minute: log-mel, PCA, residual k-means; decoded by a small network or by Griffin-Lim.

    waveform -> Spectrum.mel -> log -> PCA -> residual vector quantisation -> codes
    codes -> PCA inverse -> SourceFilterDecoder, or exp -> Spectrum.invert -> waveform

It has the geometry of the Higgs codec (24 kHz, 25 frames a second, 8 codebooks of 1024), so the whole path from a
recording to a voice runs anywhere. A folder with `decoder.safetensors` decodes by that network; a codec that was only
fitted decodes by Griffin-Lim, which is intelligible and sounds rough.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from higgstune.codec import source_filter
from higgstune.codec.base import checked_codes, whole_frames
from higgstune.codec.source_filter import SourceFilterDecoder
from higgstune.errors import CheckpointError, DataError

MODEL_TYPE = "higgstune_mel_codec"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_TINY = 1e-8
_MAX_FFT = 1 << 14  # samples: windows and filters of this size must fit into memory


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
        """[n_fft] float32, the periodic Hann window, bit for bit that of scipy.signal, which takes long to import."""
        return (0.5 + 0.5 * np.cos(np.linspace(-np.pi, np.pi, self.n_fft + 1)[:-1])).astype(np.float32)

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
        from scipy import fft  # takes long to import

        windows = np.lib.stride_tricks.sliding_window_view(padded, self.n_fft)[:: self.hop]
        return fft.rfft(windows * self.window, axis=-1)

    def _istft(self, spectrum: np.ndarray) -> np.ndarray:
        """[T, F] complex64 -> [(T - 1) * hop + n_fft], the least-squares signal of that spectrum."""
        from scipy import fft

        pieces = fft.irfft(spectrum, n=self.n_fft, axis=-1) * self.window
        weight = np.broadcast_to(self.window**2, pieces.shape)
        return self._overlap_add(pieces) / np.maximum(self._overlap_add(weight), 1e-3)

    def _overlap_add(self, pieces: np.ndarray) -> np.ndarray:
        """[T, n_fft] -> [(T - 1) * hop + n_fft]: whole hops at a time, without index arithmetic per sample."""
        hops = -(-self.n_fft // self.hop)
        pieces = np.pad(pieces, ((0, 0), (0, hops * self.hop - self.n_fft))).reshape(len(pieces), hops, self.hop)
        total = np.zeros((len(pieces) + hops - 1, self.hop), dtype=np.float32)
        for part in range(hops):
            total[part : part + len(pieces)] += pieces[:, part]
        return total.reshape(-1)[: (len(pieces) - 1) * self.hop + self.n_fft]


@dataclass(frozen=True)
class MelCodecConfig:
    """All settings of the codec; the fitted tensors are apart."""

    sample_rate: int = 24_000  # Hz
    n_fft: int = 1024  # samples
    hop: int = 240  # samples
    num_mels: int = 80
    max_hz: float = 8000.0
    floor: float = 0.01  # mean magnitude in a mel band that counts as silence
    mels_per_frame: int = 4
    components: int = 64  # PCA
    num_codebooks: int = 8
    codebook_size: int = 1024
    iterations: int = 32  # Griffin-Lim
    momentum: float = 0.99


class MelCodec:
    """Implements `Codec`: frames of `mels_per_frame` log-mel columns, PCA, residual vector quantisation."""

    def __init__(
        self, config: MelCodecConfig, tensors: dict[str, np.ndarray], decoder: SourceFilterDecoder | None = None
    ) -> None:
        """`tensors`: mean [values], basis [components, values], codebooks [codebooks, codes, components].

        The values of a frame are those of its `mels_per_frame` columns, one after the other. Without a `decoder`,
        Griffin-Lim decodes.
        """
        self.config = config
        self.decoder = decoder
        # As they will be stored: float16, so that a codec just fitted and the same one read back give equal codes; in C
        # order, because safetensors ignores strides.
        self._stored = {name: tensor.astype(np.float16, order="C") for name, tensor in tensors.items()}
        self._mean, self._basis, self._codebooks = (
            self._stored[name].astype(np.float32) for name in ("mean", "basis", "codebooks")
        )
        self._spectrum = Spectrum(config.sample_rate, config.n_fft, config.hop, config.num_mels, config.max_hz)
        self.sample_rate = config.sample_rate
        self.reference_seconds = 0.0
        self.context = None if decoder is None else -(-source_filter.CONTEXT // config.mels_per_frame)
        self.frame_rate = config.sample_rate / self.frame_samples
        self.num_codebooks = config.num_codebooks
        self.codebook_size = config.codebook_size
        self.revision = self._digest()

    @property
    def frame_samples(self) -> int:
        """Samples in one code frame."""
        return self.config.hop * self.config.mels_per_frame

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """[samples] float32 at `sample_rate` -> [ceil(samples / frame_samples), num_codebooks] uint16.

        The last frame is padded with silence. Raises DataError for anything but a mono waveform of floats.
        """
        residual = (self.features(waveform) - self._mean) @ self._basis.T
        codes = []
        for codebook in self._codebooks:
            nearest = (0.5 * (codebook**2).sum(1) - residual @ codebook.T).argmin(1)
            residual = residual - codebook[nearest]
            codes.append(nearest)
        return np.stack(codes, axis=1).astype(np.uint16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """[frames, num_codebooks] of any integer type -> [frames * frame_samples] float32 in [-1, 1].

        Raises DataError for other shapes, and for codes that no codebook has, such as stream BOS and EOS.
        """
        log_mel = self.log_mel(codes)
        if len(log_mel) == 0:
            return np.zeros(0, dtype=np.float32)
        if self.decoder is not None:
            return np.clip(self.decoder(log_mel), -1, 1)
        mel = np.maximum(np.exp(log_mel) - self.config.floor, 0)
        return np.clip(self._spectrum.invert(mel, self.config.iterations, self.config.momentum), -1, 1)

    def decode_part(
        self, codes: np.ndarray, wanted: slice, *, first: int, state: float | None
    ) -> tuple[np.ndarray, float]:
        """See `StreamingCodec`; the state is where the pulses of the voice are in their period."""
        assert self.decoder is not None
        columns = self.config.mels_per_frame
        samples, after = self.decoder.part(
            self.log_mel(codes), slice(wanted.start * columns, wanted.stop * columns), first * columns, state or 0.0
        )
        return np.clip(samples, -1, 1), after

    def log_mel(self, codes: np.ndarray) -> np.ndarray:
        """[frames, num_codebooks] -> [frames * mels_per_frame, num_mels], natural log. Raises DataError as `decode`."""
        checked = checked_codes(codes, self.num_codebooks, self.codebook_size)
        vectors = np.sum([codebook[checked[:, k]] for k, codebook in enumerate(self._codebooks)], axis=0)
        return (vectors @ self._basis + self._mean).reshape(-1, self.config.num_mels)

    def features(self, waveform: np.ndarray) -> np.ndarray:
        """[samples] -> [frames, values] log magnitudes. Raises DataError."""
        filled = whole_frames(waveform, self.frame_samples)
        mel = self._spectrum.mel(filled)
        return np.log(mel + self.config.floor).reshape(-1, self._mean.size)

    @classmethod
    def fit(cls, waveforms: Sequence[np.ndarray], seed: int = 0, config: MelCodecConfig | None = None) -> "MelCodec":
        """Fit to [samples] float32 waveforms at `config.sample_rate`, some minutes of speech in all.

        Needs scikit-learn. Raises DataError for less speech than `codebook_size` frames.
        """
        config = config or MelCodecConfig()
        values = config.mels_per_frame * config.num_mels
        blank = {
            "mean": np.zeros(values),
            "basis": np.zeros((config.components, values)),
            "codebooks": np.zeros((config.num_codebooks, config.codebook_size, config.components)),
        }
        analysis = cls(config, blank)
        return cls(config, _fit_tensors([analysis.features(w) for w in waveforms], config, seed))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, without a decoder, into `folder`, which is created if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"model_type": MODEL_TYPE, **asdict(self.config)}, indent=2)
        (folder / CONFIG).write_text(text + "\n")
        save_file(self._stored, folder / WEIGHTS)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MelCodec":
        """Read a folder that `save_pretrained` wrote. Raises CheckpointError."""
        folder = Path(folder)
        config = _read_config(folder / CONFIG)
        weights = folder / source_filter.WEIGHTS
        decoder = SourceFilterDecoder.from_pretrained(weights, config.num_mels) if weights.exists() else None
        return cls(config, _read_tensors(folder / WEIGHTS, config), decoder)

    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name in sorted(self._stored):
            digest.update(self._stored[name].tobytes())
        return digest.hexdigest()[:16]


_CONFIG = TypeAdapter(MelCodecConfig)


def _read_config(path: Path) -> MelCodecConfig:
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict) or values.pop("model_type", None) != MODEL_TYPE:
            raise CheckpointError(f'{path}: not a fitted codec (expected "model_type": "{MODEL_TYPE}")')
        config = MelCodecConfig(**values)
        _CONFIG.validate_json(json.dumps(asdict(config)), strict=True)
        if not (0 < config.num_mels <= config.n_fft <= _MAX_FFT and 0 < config.hop <= config.n_fft):
            raise ValueError(f"num_mels {config.num_mels}, hop {config.hop} and n_fft {config.n_fft} do not fit")
        return config
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a fitted codec's configuration: {error}. Copy the folder again."
        ) from error


def _read_tensors(path: Path, config: MelCodecConfig) -> dict[str, np.ndarray]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}. Copy the codec's folder again.") from error
    values = config.mels_per_frame * config.num_mels
    expected = {
        "mean": (values,),
        "basis": (config.components, values),
        "codebooks": (config.num_codebooks, config.codebook_size, config.components),
    }
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        raise CheckpointError(f"{path}: holds {found}, but {CONFIG} requires {expected}. Copy the folder again.")
    return tensors


def _fit_tensors(features: Sequence[np.ndarray], config: MelCodecConfig, seed: int) -> dict[str, np.ndarray]:
    """[frames, values] of each waveform -> the tensors of `MelCodec`. Raises DataError for too little speech."""
    from sklearn.cluster import MiniBatchKMeans  # an optional dependency, which only fitting needs
    from sklearn.decomposition import PCA

    frames = np.concatenate(features)
    if len(frames) < config.codebook_size:
        raise DataError(
            f"{len(frames)} frames are too few to fit codebooks of {config.codebook_size}: give more speech"
        )
    pca = PCA(config.components, random_state=seed).fit(frames)
    residual = np.ascontiguousarray(pca.transform(frames), dtype=np.float32)
    codebooks = []
    for _ in range(config.num_codebooks):
        clusters = MiniBatchKMeans(
            config.codebook_size,
            batch_size=8192,
            n_init=1,
            max_iter=30,
            random_state=seed,
            reassignment_ratio=0,
        ).fit(residual)
        codebooks.append(clusters.cluster_centers_)
        residual = residual - clusters.cluster_centers_[clusters.labels_]
    return {"mean": pca.mean_, "basis": pca.components_, "codebooks": np.stack(codebooks)}


def _start_phase(shape: tuple[int, ...]) -> np.ndarray:
    phase = np.random.default_rng(0).uniform(0, 2 * np.pi, shape)
    return np.exp(1j * phase).astype(np.complex64)
