"""Every error that Higgstune raises on purpose.

    HiggstuneError
    ├── InputError            the user's input is wrong                     (exit code 2)
    │   ├── ConfigError       a recipe or an option
    │   ├── DataError         a manifest, a recording, a code store
    │   └── CheckpointError   a checkpoint, an adapter, a tokenizer, a codec
    └── WorkError             the input was fine and the work failed        (exit code 1)
        ├── TrainingError     a run that must not go on
        └── VerificationError what was saved is not what was trained

A message says what is wrong, where, and what to do.
"""


class HiggstuneError(Exception):
    """Base of all errors of this package."""


class InputError(HiggstuneError, ValueError):
    """The user's input is wrong."""


class ConfigError(InputError):
    """A recipe or an option is wrong."""


class DataError(InputError):
    """A manifest, a recording or a code store is wrong."""


class CheckpointError(InputError):
    """A checkpoint, an adapter, a tokenizer or a codec is missing, broken or of the wrong kind."""


class WorkError(HiggstuneError, RuntimeError):
    """The input was fine and the work failed."""


class TrainingError(WorkError):
    """A training run must not go on."""


class VerificationError(WorkError):
    """What was saved is not what was trained."""
