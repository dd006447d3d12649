"""Sampling settings, which a base or an adapter may bring. `families.rows` draws with them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from higgstune.checkpoint_files import read_json
from higgstune.errors import CheckpointError, ConfigError

MAX_TEMPERATURE = 100.0  # all codes are equally likely long before
_GREEDY = 1e-4  # below this, scores divided by the temperature would overflow
GENERATION_CONFIG = "generation_config.json"
# The fields by their names in transformers' file, and for repetitions by Boson's.
_FIELDS = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p",
    "ras_win_len": "repeat_window", "ras_win_max_num_repeat": "max_repeats",
}  # fmt: skip
GENERATION_NAMES = ("do_sample", *_FIELDS)


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn; the defaults are those recommended for the released model.

    >>> Sampling(temperature=0.7).top_k
    50
    """

    temperature: float = 1.0  # 0: greedy
    top_k: int = 50  # 0: off
    top_p: float = 0.95  # 1: off
    repeat_window: int = 7  # rows to look back; 0 switches repetition-aware sampling off
    max_repeats: int = 2  # a code that its codebook's window holds this often is redrawn

    def __post_init__(self) -> None:
        """Raises ConfigError for a value out of range."""
        for name, value, holds in (
            ("temperature", self.temperature, 0 <= self.temperature <= MAX_TEMPERATURE),
            ("top_k", self.top_k, self.top_k >= 0),
            ("top_p", self.top_p, 0 < self.top_p <= 1),
            ("repeat_window", self.repeat_window, self.repeat_window >= 0),
            ("max_repeats", self.max_repeats, self.max_repeats >= 1),
        ):
            if not holds:
                raise ConfigError(f"{name} cannot be {value}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest code is taken, as of no temperature at all."""
        return self.temperature < _GREEDY

    def with_(
        self, *, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None
    ) -> "Sampling":
        """The settings with those that are given in place of its own. Raises ConfigError."""
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def generation_config(self) -> dict[str, Any]:
        """The settings by their names in `generation_config.json`; see `base_sampling`."""
        values = {theirs: getattr(self, ours) for theirs, ours in _FIELDS.items()}
        values["ras_win_len"] = values["ras_win_len"] or None
        if self.greedy:  # transformers refuses a temperature of 0
            del values["temperature"]
        return {"do_sample": not self.greedy, **values}


def base_sampling(folder: Path | None) -> Sampling:
    """The settings that a base recommends: `generation_config.json` in its folder; ours where it says nothing.

    `do_sample: false` is greedy, and `ras_win_len: null` switches repetition-aware sampling off, as in Boson's code.
    Raises CheckpointError for values out of range.
    """
    if folder is None or not (path := folder / GENERATION_CONFIG).exists():
        return Sampling()
    return read_sampling(read_json(path, ""), path)


def read_sampling(values: Mapping[str, Any], path: Path) -> Sampling:
    """Settings by the names of `generation_config.json`. Raises CheckpointError, naming `path`."""
    found = {ours: values[theirs] for theirs, ours in _FIELDS.items() if values.get(theirs) is not None}
    if "ras_win_len" in values and values["ras_win_len"] is None:
        found["repeat_window"] = 0
    if values.get("do_sample") is False:
        found["temperature"] = 0.0
    for name, value in found.items():
        whole = name not in ("temperature", "top_p")
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise CheckpointError(f"{path}: {name} must be a {'whole ' if whole else ''}number, not {value!r}")
    try:
        return Sampling(**found)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
