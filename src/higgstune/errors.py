"""Every error that Higgstune raises on purpose.

    HiggstuneError
    ├── InputError            the user's input is wrong                     (exit code 2)
    │   ├── ConfigError       a recipe or an option
    │   ├── DataError         a manifest, a recording, a code store
    │   └── CheckpointError   a checkpoint, an adapter, a tokenizer, a codec
    └── WorkError             the input was fine and the work failed        (exit code 1)
        ├── Interrupted       a signal ended it                         (exit code 128 + the signal)
        ├── TrainingError     a run that must stop
        └── VerificationError what was saved is not what was trained

A message says what is wrong, where, and what to do. A run whose adapter is not usable raises none: `train` returns it,
and the command exits with 3, which means "do not restart".
"""

import os
import signal

_NOT_USABLE = 3


def not_usable_code() -> int:
    """The exit code of a run that is not usable: 0 under torchrun, whose agents restart all that exit otherwise."""
    return 0 if any(name.startswith("TORCHELASTIC_") for name in os.environ) else _NOT_USABLE


class HiggstuneError(Exception):
    """Base of all errors of this package."""

    exit_code = 1  # of a command that ends with it


class InputError(HiggstuneError, ValueError):
    """The user's input is wrong."""

    exit_code = 2


class ConfigError(InputError):
    """A recipe or an option is wrong."""


class DataError(InputError):
    """A manifest, a recording or a code store is wrong."""


class CheckpointError(InputError):
    """A checkpoint, an adapter, a tokenizer or a codec is missing, broken or of the wrong kind."""


class WorkError(HiggstuneError, RuntimeError):
    """The input was fine and the work failed."""


class Interrupted(WorkError):
    """A signal ended the work; everything needed to resume it is kept."""

    def __init__(self, number: int, message: str = "nothing is lost") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}: {message}")
        self.number = number
        self.exit_code = 128 + number  # as in shells


class TrainingError(WorkError):
    """A training run must stop."""


class VerificationError(WorkError):
    """What was saved is not what was trained."""
