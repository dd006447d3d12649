"""A stand-in for the one torchaudio function that the Higgs codec of transformers calls.

`transformers.models.higgs_audio_v2_tokenizer` imports torchaudio for `functional.resample`, and
torchaudio does not load beside current builds of torch. `install()` puts a module with that one function
in its place, where the real one cannot be imported. Nothing else mistakes it for torchaudio: transformers
looks for torchaudio before, and remembers that it is missing; the stand-in has no distribution and no
version, and other names raise. So `transformers.HiggsAudioV2TokenizerModel` stays the placeholder that it
is without torchaudio: take the class from `higgstune.codec.higgs`.
"""

import importlib
import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

_NAME = "torchaudio"
_ZEROS = 6  # lowpass_filter_width: zero crossings of the sinc on each side
_ROLLOFF = 0.99  # cut-off as a part of the lower Nyquist frequency


def install() -> None:
    """Make `import torchaudio` import the real one if it loads, else the stand-in. May be called repeatedly."""
    if sys.modules.get(_NAME) is None and not _real_one_loads():
        _hide_from_transformers()
        functional = _StandIn(f"{_NAME}.functional", resample=resample)
        sys.modules |= {_NAME: _StandIn(_NAME, functional=functional), functional.__name__: functional}


def resample(waveform: torch.Tensor, orig_freq: int, new_freq: int) -> torch.Tensor:
    """[..., samples] at `orig_freq` Hz -> [..., ceil(samples * new_freq / orig_freq)], Hann-windowed sinc.

    Equals torchaudio 2.11's `functional.resample` with its default options. Any floating dtype, any device.
    Raises ValueError for rates that are not positive integers and TypeError for integer samples.
    """
    if min(orig_freq, new_freq) <= 0 or int(orig_freq) != orig_freq or int(new_freq) != new_freq:
        raise ValueError(f"sample rates must be positive whole numbers of Hz, not {orig_freq} and {new_freq}")
    if not waveform.is_floating_point():
        raise TypeError(f"resample needs floating-point samples, not {waveform.dtype}")
    if orig_freq == new_freq:
        return waveform
    divisor = math.gcd(int(orig_freq), int(new_freq))
    old, new = int(orig_freq) // divisor, int(new_freq) // divisor
    filters, width = _filters(old, new, torch.promote_types(waveform.dtype, torch.float32))
    flat = waveform.reshape(-1, 1, waveform.shape[-1])
    padded = torch.nn.functional.pad(flat, (width, width + old))
    phases = torch.nn.functional.conv1d(padded, filters.to(waveform), stride=old)  # [clips, new, blocks]
    length = math.ceil(new * waveform.shape[-1] / old)
    return phases.transpose(1, 2).reshape(len(flat), -1)[:, :length].reshape(*waveform.shape[:-1], length)


def _filters(old: int, new: int, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """One windowed sinc for each of the `new` phases: [new, 1, taps], and the taps before the centre."""
    cutoff = min(old, new) * _ROLLOFF
    width = math.ceil(_ZEROS * old / cutoff)
    taps = torch.arange(-width, width + old, dtype=dtype) / old
    phases = torch.arange(0, -new, -1, dtype=dtype) / new
    time = ((phases[:, None] + taps) * cutoff).clamp(-_ZEROS, _ZEROS)
    window = torch.cos(time * math.pi / _ZEROS / 2) ** 2
    return (torch.sinc(time) * window * cutoff / old)[:, None], width


class _StandIn(ModuleType):
    def __init__(self, name: str, **members: object) -> None:
        super().__init__(name, doc="Higgstune's stand-in for torchaudio.")
        self.__spec__ = ModuleSpec(name, loader=None, origin=__name__)  # without one find_spec raises
        self.__dict__.update(members)

    def __getattr__(self, attribute: str) -> object:
        raise AttributeError(
            f"{self.__name__}.{attribute} does not exist: torchaudio could not be imported, and Higgstune's "
            f"stand-in has only functional.resample. Install a torchaudio for torch {torch.__version__}."
        )


def _real_one_loads() -> bool:
    try:
        importlib.import_module(_NAME)
    except (ImportError, OSError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == _NAME]:
            del sys.modules[name]  # what a failed import left behind
        return False
    return True


def _hide_from_transformers() -> None:
    """Let transformers find, and remember, that torchaudio is missing: it would import kaldi features."""
    sys.modules[_NAME] = None  # type: ignore[assignment]  # marks a module as missing for the import system
    # Imported only now: transformers looks for torchaudio when it is imported itself.
    from transformers.utils import is_torchaudio_available

    is_torchaudio_available()
