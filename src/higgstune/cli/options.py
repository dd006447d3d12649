"""Options that several verbs have, their groups in `--help`, and the checks of their values."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from higgstune.environment import check_device_name
from higgstune.hub import check_name, local_folder
from higgstune.inputs import BaseSpec, Quantize, find_adapter

TEXTS, VOICE, SAMPLING, JUDGES = "Texts", "Voice", "Sampling", "Judges"
MODEL, DEVICE, PLAN = "Model", "Device", "Plan a run"


class Verb(TyperCommand):
    """A command whose help names no type of a flag: the column takes the room of the explanations."""

    def get_params(self, ctx: typer.Context) -> list[Any]:  # type: ignore[override]
        """The options and arguments, with `--help`."""
        found = list(super().get_params(ctx))
        for parameter in found:
            if getattr(parameter, "is_flag", False) and parameter.metavar is None:
                parameter.metavar = ""
        return found


def path(text: str) -> Path:
    """A path that a command names. Raises typer.BadParameter for one that is empty, or that no file can have."""
    if not text:
        raise typer.BadParameter("it is empty: name a file or a folder (`.` is the current one)")
    try:
        Path(text).exists()
    except OSError as error:  # such as a name that is too long
        raise typer.BadParameter(f"{text} cannot be read: {error.strerror}") from error
    return Path(text)


def within(low: float, high: float | None = None, *, above: bool = False, below: bool = False) -> Callable[[Any], Any]:
    """A check of a number: at least `low` (with `above`, more than it) and at most `high` (with `below`, less).

    typer's own `min` and `max` print the range into `--help`, where it takes the room of the explanation.
    """
    lower = f"above {low}" if above else f"at least {low}"
    expected = lower if high is None else f"{lower} and {'below' if below else 'at most'} {high}"

    def check(value: Any) -> Any:
        if value is None:
            return None
        inside = value >= low and (high is None or value <= high)  # false for nan
        if not inside or (above and value == low) or (below and value == high):
            raise typer.BadParameter(f"it must be {expected}, not {value}")
        return value

    return check


def _device(value: str | None) -> str | None:
    check_device_name(value)
    return value


def check_model(name: str) -> None:
    """Raise CheckpointError for a checkpoint that cannot exist, or that on this disk no family loads."""
    if local_folder(name, what="checkpoint") is not None:
        from higgstune.families import check_checkpoint  # imports pydantic, in 0.2 s

        check_checkpoint(name)


def base_spec(
    model: str | None = None,
    *,
    revision: str | None = None,
    codec: str | None = None,
    device: str = "auto",
    quantize: Quantize | None = None,
) -> BaseSpec:
    """The base that a command's options name. Raises CheckpointError for a name that cannot exist."""
    if model is not None:
        check_model(model)
    if codec is not None:
        check_name(codec, what="codec")
    return BaseSpec(model, revision, codec, device=None if device == "auto" else device, quantize=quantize)


def named_adapter(run: Path, base: BaseSpec) -> Path:
    """The adapter of a run, after what its small files can show. Raises CheckpointError."""
    folder = find_adapter(run)
    from higgstune.model.adapter_folder import adapter_card, recorded_base  # imports pydantic, in 0.2 s

    recorded_base(base, folder, adapter_card(folder))
    return folder


JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
RunArgument = Annotated[
    Path, typer.Argument(parser=path, metavar="RUN", help="Folder of a run (its last finished stage) or of an adapter.")
]
# Model
BaseOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Base, if not where the adapter says.", rich_help_panel=MODEL)
]
RevisionOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Commit, tag or branch of the base at the hub.", rich_help_panel=MODEL),
]
CodecOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Codec, if not where the adapter says.", rich_help_panel=MODEL)
]
WhisperOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Whisper checkpoint, if not where the adapter says.", rich_help_panel=MODEL),
]

# Device
DeviceOption = Annotated[
    str, typer.Option(metavar="NAME", callback=_device, help="auto, cpu, cuda or cuda:N.", rich_help_panel=DEVICE)
]
PlannedDeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        callback=_device,
        help="Plan for cpu or cuda, whether or not it is present.",
        rich_help_panel=PLAN,
    ),
]
QuantizeOption = Annotated[
    Quantize | None,
    typer.Option(metavar="4bit", help="Load the base in 4 bits, for a small GPU.", rich_help_panel=DEVICE),
]

# Texts
SetOption = Annotated[
    str,
    typer.Option(
        "--set",
        metavar="SET",
        help="validation (rows of the store), a .txt file with a sentence a line, a meta.lst, or built-in sentences: "
        "en, de, zh, ar, vi, es, or tags.",
        rich_help_panel=TEXTS,
    ),
]
RowsOption = Annotated[
    Path | None,
    typer.Option(
        parser=path,
        metavar="FOLDER",
        help="Code store of rows and voices; default: that of training.",
        rich_help_panel=TEXTS,
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        metavar="N", callback=within(1), help="At most N texts of a set (of rows, 100).", rich_help_panel=TEXTS
    ),
]
LanguageOption = Annotated[
    str | None,
    typer.Option(
        metavar="CODE",
        help="Language of sentences without one, such as en; default: the store's, if it has only one.",
        rich_help_panel=TEXTS,
    ),
]

# Judges
AsrOption = Annotated[
    str | None,
    typer.Option(
        metavar="JUDGE", help="Transcribes: a Whisper by name or folder, or a command.", rich_help_panel=JUDGES
    ),
]
SpeakerOption = Annotated[
    str | None,
    typer.Option(
        metavar="JUDGE",
        help="Compares voices: WavLM, CAM++ (.pt), or a command; auto: WavLM-SV if it is on disk.",
        rich_help_panel=JUDGES,
    ),
]
QualityOption = Annotated[
    str | None,
    typer.Option(metavar="JUDGE", help="Rates naturalness: distillmos, or a command.", rich_help_panel=JUDGES),
]

# Sampling
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        metavar="T",
        callback=within(0, 100),
        help="Lower is steadier and duller; 0 is greedy. Default: as the adapter or its base recommends.",
        rich_help_panel=SAMPLING,
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        callback=within(0, 2**62),
        help="Draws the codes: the same seed repeats the same speech.",
        rich_help_panel=SAMPLING,
    ),
]
