"""The settings of `collect`: what an utterance is, and what is refused or flagged."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from higgstune.config.yaml import MAX_BYTES, parse_yaml
from higgstune.data.origin import ORIGIN
from higgstune.data.rejection import did_you_mean
from higgstune.errors import ConfigError


class CollectRecipe(BaseModel):
    """All settings with their defaults. The first ones cut; the others only choose among utterances that are cut."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    speech_threshold: float = Field(0.5, gt=0.15, lt=1, description="probability above which there is speech")
    min_pause: float = Field(0.1, ge=0.05, le=2, description="seconds that part two regions of speech")
    min_speech: float = Field(0.25, ge=0, le=2, description="seconds; a shorter sound is not speech")
    shortest: float = Field(3.0, gt=0, description="seconds of an utterance, where its neighbours allow it")
    longest: float = Field(15.0, gt=0, le=30, description="seconds of an utterance, unless it has no pause")
    speaker_distance: float = Field(
        0.40, gt=0, lt=2, description="cosine distance that parts two speakers; low values split rather than mix"
    )
    sample_rate: int = Field(24_000, ge=8_000, le=192_000, description="Hz of the clips")
    loudness: float = Field(-23.0, ge=-60, le=-10, description="LUFS of a speaker in a recording")
    true_peak: float = Field(-1.0, ge=-30, le=0, description="dBTP that no clip may pass; the gain is lowered for it")
    level: Literal["recording", "utterance"] = Field(
        "recording", description="one gain for a speaker in a recording, or for each utterance"
    )
    min_seconds: float = Field(1.0, ge=0.32, description="refuse a shorter utterance")
    max_seconds: float = Field(30.0, gt=0, le=30, description="refuse a longer one")
    min_snr: float = Field(10.0, description="dB; refuse below")
    low_snr: float = Field(20.0, description="dB; flag below")
    max_clipped: float = Field(0.001, ge=0, le=1, description="share of samples; refuse above")
    max_difference: float = Field(0.4, ge=0, description="character errors of given and recognised text; refuse above")
    high_difference: float = Field(0.1, ge=0, description="the same; flag above")
    low_logprob: float = Field(-0.5, le=0, description="mean log-probability of recognised words; flag below")
    rate_deviations: float = Field(
        3.0, gt=0, description="refuse a speech rate so many median deviations away from that of the language"
    )
    high_hum: float = Field(12.0, description="dB that mains hum stands out; flag above")
    validation: float = Field(0.05, ge=0, lt=1, description="share of the speech that is kept for validation")
    source: str | None = Field(None, min_length=1, description="where the recordings come from; into manifest and card")
    licence: str | None = Field(None, min_length=1, description="of the recordings; into manifest and card")
    consent: str | None = Field(None, min_length=1, description="who consented, to what, and when; the same")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shortest >= self.longest:
            raise ValueError(f"shortest ({self.shortest:g} s) must be below longest ({self.longest:g} s)")
        if self.min_seconds >= self.max_seconds:
            raise ValueError(f"min_seconds ({self.min_seconds:g} s) must be below max_seconds ({self.max_seconds:g} s)")
        return self

    @property
    def cutting(self) -> dict[str, float]:
        """What the utterances of a recording depend on: a change of anything else cuts and recognises nothing anew."""
        names = ("speech_threshold", "min_pause", "min_speech", "shortest", "longest", "speaker_distance")
        return {name: getattr(self, name) for name in names}

    @property
    def origin(self) -> dict[str, str]:
        """Source, licence and consent, as far as they are stated."""
        return {name: text for name in ORIGIN if (text := getattr(self, name)) is not None}


def load_collect_recipe(path: Path | None) -> CollectRecipe:
    """The settings of a YAML file, defaults for what it does not name. Raises ConfigError for a wrong one."""
    if path is None:
        return CollectRecipe.model_validate({})
    try:
        with open(path, "rb") as file:
            tree = parse_yaml(file.read(MAX_BYTES + 1), where=f"the recipe {path}")
    except OSError as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error.strerror}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"the recipe {path} must be a mapping such as `longest: 12`")
    for key in tree:
        if key not in CollectRecipe.model_fields:
            raise ConfigError(f"{path}: {key}: unknown key; {did_you_mean(str(key), CollectRecipe.model_fields)}")
    try:
        return CollectRecipe.model_validate(tree)
    except ValidationError as error:
        faults = [
            (".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")) for item in error.errors()
        ]
        lines = [f"  {key}: {message}" if key else f"  {message}" for key, message in faults]
        raise ConfigError(f"{path}:\n" + "\n".join(lines)) from error
