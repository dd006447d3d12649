"""The trackers that a run reports to, by transformers' names. Nothing of their libraries is imported."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from higgstune.data.rejection import did_you_mean
from higgstune.errors import ConfigError

ADVICE = "install it, or leave the tracker out (report_to: none for no tracker)"
_LIBRARIES = {  # by tracker
    "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow", "comet_ml": "comet_ml",
    "neptune": "neptune", "swanlab": "swanlab", "clearml": "clearml", "codecarbon": "codecarbon",
    "dvclive": "dvclive", "dagshub": "dagshub", "azure_ml": "azureml", "flyte": "flytekit", "kubeflow": "kubeflow",
}  # fmt: skip


def read_trackers(value: Any) -> Any:
    """The trackers that a recipe names as in transformers: one or a list, `none`, or `all` that are installed.

    What is neither is returned as it is. Raises ValueError for an unknown name.
    """
    names = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list | tuple):
        return value
    if list(names) == ["none"]:
        return ()
    if list(names) == ["all"]:
        return tuple(name for name, library in _LIBRARIES.items() if find_spec(library) is not None)
    for name in names:
        if name in ("none", "all"):
            raise ValueError(f"{name} stands alone, not beside other trackers")
        if not isinstance(name, str) or name not in _LIBRARIES:
            raise ValueError(f"there is no tracker {name!r}; {did_you_mean(str(name), _LIBRARIES)}")
    return tuple(names)


def missing_trackers(trackers: Sequence[str]) -> list[str]:
    """What is wrong with trackers whose library is missing on this machine."""
    return [
        f"report_to names {name}, whose library {_LIBRARIES[name]} is not installed"
        for name in trackers
        if find_spec(_LIBRARIES[name]) is None
    ]


def check_installed(trackers: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose library is missing on this machine."""
    for problem in missing_trackers(trackers):
        raise ConfigError(f"{problem}: {ADVICE}")
