"""The verb `export`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from higgstune.cli.endings import print_exported
from higgstune.cli.options import (
    MODEL,
    BaseOption,
    CodecOption,
    DeviceOption,
    JsonOption,
    RevisionOption,
    RunArgument,
    base_spec,
    named_adapter,
    path,
)
from higgstune.cli.output import Bar, announced, print_result
from higgstune.exporting.options import check_options
from higgstune.files import check_new
from higgstune.hub import check_name
from higgstune.inputs import check_store


def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option(parser=path, metavar="FOLDER", help="New folder to write.")],
    format: Annotated[
        Literal["native", "extended", "boson", "peft"] | None,
        typer.Option(
            metavar="FORMAT",
            help="native: merged, for transformers and vLLM-Omni; extended: merged, with audio attention and Whisper, "
            "for Higgstune; boson: merged, for the original engine; peft: the adapter alone. Default: native, or "
            "extended where native would lose modules.",
        ),
    ] = None,
    drop_modules: Annotated[
        bool,
        typer.Option("--drop-modules", help="Write native without the modules that it would lose; the card says so."),
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(metavar="DTYPE", help="float32 or bfloat16, of merged weights; default: the base's."),
    ] = None,
    base_bits: Annotated[
        int | None,
        typer.Option(metavar="4|8", help="The card says how to load it in 4 or 8 bits (native, peft)."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FOLDER", help="Code store to compare on; default: that of training."),
    ] = None,
    model: BaseOption = None,
    revision: RevisionOption = None,
    codec: CodecOption = None,
    whisper: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whisper checkpoint for boson, if it has moved.", rich_help_panel=MODEL),
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write a run as one folder that others can load, with a model card, and verify it."""
    check_options(format, drop_modules=drop_modules, dtype=dtype, base_bits=base_bits, whisper=whisper)
    check_new(out)
    base = base_spec(model, revision=revision, codec=codec, device=device)
    named_adapter(run, base)
    if whisper is not None:
        check_name(whisper, what="Whisper checkpoint")
    if data is not None:
        check_store(data)
    with announced("loading the model", as_json):
        from higgstune.exporting.export import export as write

    with Bar() as bar:
        result = write(
            run,
            out,
            format=format,
            drop_modules=drop_modules,
            dtype=dtype,
            base_bits=base_bits,
            whisper=whisper,
            data=data,
            base=base,
            progress=bar,
        )
    if as_json:
        print_result(dataclasses.asdict(result), as_json)
    else:
        print_exported(result)
