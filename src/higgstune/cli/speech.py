"""The verb `speak`."""

from pathlib import Path
from typing import Annotated

import typer

from higgstune.cli.options import (
    DEVICE,
    MODEL,
    SAMPLING,
    VOICE,
    CodecOption,
    DeviceOption,
    JsonOption,
    QuantizeOption,
    RevisionOption,
    SeedOption,
    TemperatureOption,
    WhisperOption,
    within,
)
from higgstune.cli.output import Bar, announced, print_result
from higgstune.errors import ConfigError
from higgstune.hub import check_name
from higgstune.inputs import check_wav_name, find_adapter


def speak(
    text: Annotated[str | None, typer.Argument(help="What to say.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="A .wav file; with --file, a folder.")] = Path("speech.wav"),
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="Text file, one clip a line.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="An adapter, or a run.", rich_help_panel=VOICE)
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Recording of a voice to imitate.", rich_help_panel=VOICE)
    ] = None,
    reference_text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What is said in it.", rich_help_panel=VOICE)
    ] = None,
    scene: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help='Description of the scene; "" for none.', rich_help_panel=VOICE),
    ] = None,
    temperature: TemperatureOption = 1.0,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="P",
            callback=within(0, 1, above=True),
            help="Draw from the likeliest codes that make up this probability; 1 is off.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.95,
    top_k: Annotated[
        int,
        typer.Option(
            metavar="N", callback=within(0), help="Draw from the N likeliest codes; 0 is off.", rich_help_panel=SAMPLING
        ),
    ] = 50,
    seed: SeedOption = 0,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="Longest piece; default: from the text's length.", rich_help_panel=SAMPLING
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Base checkpoint; an adapter knows its own.", rich_help_panel=MODEL),
    ] = None,
    revision: RevisionOption = None,
    codec: CodecOption = None,
    whisper: WhisperOption = None,
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", callback=within(1), help="Clips spoken at a time.", rich_help_panel=DEVICE)
    ] = 8,
    as_json: JsonOption = False,
) -> None:
    """Speak a text, or each line of a file."""
    if (text is None) == (file is None):
        raise ConfigError("give either a text or --file")
    said = text if file is None else _lines(file)
    _check_names(out if file is None else None, adapter, model, codec, reference, reference_text)
    with announced("loading the model", as_json):
        from higgstune.data.messages import DEFAULT_SCENE
        from higgstune.families.sampling import Sampling
        from higgstune.generate.speak import speak as run

    assert said is not None
    with Bar() as bar:
        files = run(
            said,
            out,
            model=model,
            adapter=adapter,
            codec=codec,
            reference=reference,
            reference_text=reference_text,
            whisper=whisper,
            scene=DEFAULT_SCENE if scene is None else scene or None,
            sampling=Sampling(temperature, top_k, top_p),
            seed=seed,
            max_seconds=max_seconds,
            batch_size=batch_size,
            device=device,
            revision=revision,
            quantize=quantize,
            on_spoken=lambda done: bar("speaking", done, 1 if isinstance(said, str) else len(said)),
        )
    print_result({"files": [str(path) for path in files]}, as_json)


def _check_names(
    wav: Path | None,
    adapter: Path | None,
    model: str | None,
    codec: str | None,
    reference: Path | None,
    reference_text: str | None,
) -> None:
    """Refuse what needs no model to be refused."""
    if wav is not None:
        check_wav_name(wav)
    if adapter is None and model is None:
        raise ConfigError("name a base (--model) or an adapter (--adapter)")
    if adapter is not None:
        find_adapter(adapter)
    for name, what in ((model, "checkpoint"), (codec, "codec")):
        if name is not None:
            check_name(name, what=what)
    if reference is None and reference_text is not None:
        raise ConfigError("--reference-text needs the recording in which it is said: --reference")
    if reference is not None and not reference.is_file():
        raise ConfigError(f"--reference {reference} does not exist")


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"--file {file} cannot be read: {reason}") from error
    if not any(lines):
        raise ConfigError(f"--file {file} has no text")
    return [line for line in lines if line]
