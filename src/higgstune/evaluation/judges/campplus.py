"""CAM++, a speaker model: Wang et al., "CAM++: A Fast and Efficient Network for Speaker Verification Using
Context-Aware Masking" (arXiv:2303.00332), in the sizes of 3D-Speaker's `campplus_cn_en_common.pt`.

The network is written here, with that file's names of parameters; the features are Kaldi's, by kaldi-native-fbank
(extra `collect`). The embedding goes through a last ReLU, which 3D-Speaker's own code leaves out: so do the programs
by which `SAME_SPEAKER` was measured. Cosines are higher with it.
"""

import importlib
from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, normalize, relu

from higgstune.checkpoint_files import malformed_errors
from higgstune.errors import CheckpointError, ConfigError
from higgstune.evaluation.judges.base import RATE, Voices, model_name

_BINS = 80  # mel bins of 25 ms, every 10 ms
_FULL_SCALE = 32_768  # Kaldi's samples are 16-bit integers
_HEAD = 32  # channels of the convolutions over time and frequency
_WIDTH, _GROWTH, _BOTTLENECK = 128, 32, 128  # channels: before the blocks, more with each layer, inside a layer
_BLOCKS = ((12, 1), (24, 2), (16, 2))  # layers, dilation
_SEGMENT = 100  # frames (2 s) of local context
_DIM = 192


class CamPlus(Voices):
    """Embeds voices by the CAM++ of a file."""

    model = "campplus"

    def __init__(self, file: str | Path, *, device: str = "cpu") -> None:
        """Raises ConfigError if the extra is not installed, CheckpointError for a file with anything else."""
        super().__init__()
        path = Path(file).expanduser()
        try:
            self._kaldi = importlib.import_module("kaldi_native_fbank")
        except ImportError as error:
            raise ConfigError(f"{path.name} needs kaldi-native-fbank: pip install 'higgstune[collect]'") from error
        self._device = torch.device(device)
        self._network = _load(path).to(self._device)
        self.name = model_name("kaldi-native-fbank", path.stem, [path])

    @torch.inference_mode()
    def embed(self, waveform: np.ndarray) -> np.ndarray:
        """[samples] float32 mono at 16 kHz, 0.1 s or more -> [192] float32 of length 1."""
        features = torch.from_numpy(self._features(waveform)).to(self._device)
        embedding: np.ndarray = normalize(self._network(features[None])[0], dim=0).cpu().numpy()
        return embedding

    def _features(self, waveform: np.ndarray) -> np.ndarray:
        """[frames, 80] float32: log mel energies, less their means over time, which takes the microphone's colour."""
        options = self._kaldi.FbankOptions()
        options.frame_opts.dither = 0
        options.frame_opts.samp_freq = RATE
        options.mel_opts.num_bins = _BINS
        bank = self._kaldi.OnlineFbank(options)
        bank.accept_waveform(RATE, waveform * np.float32(_FULL_SCALE))
        bank.input_finished()
        frames = np.stack([bank.get_frame(index) for index in range(bank.num_frames_ready)])
        return np.asarray(frames - frames.mean(0), np.float32)


def _load(path: Path) -> nn.Module:
    what = f"the speaker judge {path}"
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)  # tensors alone: it runs no code
    except malformed_errors(UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{what} cannot be loaded: {error}") from error
    with torch.device("meta"):
        network = _Network()
    expected = {name: value.shape for name, value in network.state_dict().items()}
    found = (
        {name: getattr(value, "shape", None) for name, value in weights.items()} if isinstance(weights, dict) else {}
    )
    if differing := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        raise CheckpointError(
            f"{what} is not CAM++ with {len(expected)} tensors: {len(differing)} are missing, unknown or of another "
            f"shape, such as {differing[0]}; give the file campplus_cn_en_common.pt of 3D-Speaker"
        )
    network.load_state_dict(weights, assign=True)
    return network.float().eval()


class _Network(nn.Module):
    """[batch, frames, 80] -> [batch, 192]."""

    def __init__(self) -> None:
        super().__init__()
        self.head = _Head()
        parts: dict[str, nn.Module] = {
            "tdnn": _Named(
                linear=nn.Conv1d(_HEAD * _BINS // 8, _WIDTH, 5, stride=2, padding=2, bias=False),
                nonlinear=_norm_relu(_WIDTH),
            )
        }
        width = _WIDTH
        for number, (layers, dilation) in enumerate(_BLOCKS, start=1):
            parts[f"block{number}"] = _Named(
                **{f"tdnnd{n + 1}": _DenseLayer(width + n * _GROWTH, dilation) for n in range(layers)}
            )
            width += layers * _GROWTH
            parts[f"transit{number}"] = _Named(
                nonlinear=_norm_relu(width), linear=nn.Conv1d(width, width // 2, 1, bias=False)
            )
            width //= 2
        parts["out_nonlinear"] = _norm_relu(width)
        parts["stats"] = _Statistics()
        parts["dense"] = _Named(
            linear=nn.Conv1d(2 * width, _DIM, 1, bias=False), nonlinear=_norm_relu(_DIM, affine=False)
        )
        self.xvector = _Named(**parts)

    def forward(self, features: Tensor) -> Tensor:
        embedding: Tensor = self.xvector(self.head(features.mT))
        return embedding[..., 0]


class _Named(nn.Sequential):
    """Modules one after the other, with names."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__(OrderedDict(modules))


def _norm_relu(channels: int, *, affine: bool = True) -> nn.Module:
    return _Named(batchnorm=nn.BatchNorm1d(channels, affine=affine), relu=nn.ReLU())


class _Head(nn.Module):
    """Convolutions over frequency and time: [batch, 80, frames] -> [batch, 32 * 10, frames]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, _HEAD, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_HEAD)
        self.layer1 = nn.Sequential(_Residual(halves=True), _Residual())
        self.layer2 = nn.Sequential(_Residual(halves=True), _Residual())
        self.conv2 = nn.Conv2d(_HEAD, _HEAD, 3, stride=(2, 1), padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(_HEAD)

    def forward(self, bins: Tensor) -> Tensor:
        x_bcft = relu(self.bn1(self.conv1(bins[:, None])))
        x_bcft = self.layer2(self.layer1(x_bcft))
        return relu(self.bn2(self.conv2(x_bcft))).flatten(1, 2)


class _Residual(nn.Module):
    """Two convolutions beside a shortcut; `halves` the frequencies."""

    def __init__(self, *, halves: bool = False) -> None:
        super().__init__()
        stride = (2, 1) if halves else (1, 1)
        self.conv1 = nn.Conv2d(_HEAD, _HEAD, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_HEAD)
        self.conv2 = nn.Conv2d(_HEAD, _HEAD, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(_HEAD)
        shortcut = [nn.Conv2d(_HEAD, _HEAD, 1, stride=stride, bias=False), nn.BatchNorm2d(_HEAD)] if halves else []
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x_bcft: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(relu(self.bn1(self.conv1(x_bcft)))))
        return relu(inner + self.shortcut(x_bcft))


class _DenseLayer(nn.Module):
    """Appends 32 channels to those that it gets: [batch, channels, frames] -> [batch, channels + 32, frames]."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.nonlinear1 = _norm_relu(channels)
        self.linear1 = nn.Conv1d(channels, _BOTTLENECK, 1, bias=False)
        self.nonlinear2 = _norm_relu(_BOTTLENECK)
        self.cam_layer = _Masked(dilation)

    def forward(self, x_bct: Tensor) -> Tensor:
        return torch.cat([x_bct, self.cam_layer(self.nonlinear2(self.linear1(self.nonlinear1(x_bct))))], dim=1)


class _Masked(nn.Module):
    """A convolution, masked by the context: the mean of the whole clip plus that of the frame's segment of 2 s."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.linear_local = nn.Conv1d(_BOTTLENECK, _GROWTH, 3, padding=dilation, dilation=dilation, bias=False)
        self.linear1 = nn.Conv1d(_BOTTLENECK, _BOTTLENECK // 2, 1)
        self.linear2 = nn.Conv1d(_BOTTLENECK // 2, _GROWTH, 1)

    def forward(self, x_bct: Tensor) -> Tensor:
        # One mask a segment: computed before it is repeated for each frame, as all of its frames have the same.
        segments = avg_pool1d(x_bct, _SEGMENT, _SEGMENT, ceil_mode=True)
        mask = self.linear2(relu(self.linear1(segments + x_bct.mean(-1, keepdim=True)))).sigmoid()
        return self.linear_local(x_bct) * mask.repeat_interleave(_SEGMENT, dim=-1)[..., : x_bct.shape[-1]]


class _Statistics(nn.Module):
    """Mean and standard deviation over time: [batch, channels, frames] -> [batch, 2 * channels, 1]."""

    def forward(self, x_bct: Tensor) -> Tensor:
        return torch.cat([x_bct.mean(-1), x_bct.std(-1)], dim=-1)[..., None]
