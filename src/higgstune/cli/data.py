"""The verb `prepare`: from recordings to a code store."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from higgstune.cli.collect import RAW, SpeakerModelOption, TextAsrOption, collect_for
from higgstune.cli.endings import print_prepared
from higgstune.cli.inspect import STORED, LimitOption, check_limits
from higgstune.cli.options import DeviceOption, JsonOption, check_model, path, within
from higgstune.cli.output import Bar, announced, errors, print_result
from higgstune.errors import DataError
from higgstune.hub import check_name
from higgstune.inputs import check_source, check_store, check_store_place

_LABELS, _REFERENCES, _LIMITS, _MODEL = "Labels of all rows", "References", "Which clips", "Model"


def prepare(
    source: Annotated[
        Path | None,
        typer.Argument(
            parser=path,
            help="Folder of audio with a text beside each file, LJSpeech, LibriTTS, VCTK, Kaldi...; a table or a "
            "manifest of clips; hf:owner/name. None, to only --drop or --restore rows.",
        ),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(parser=path, metavar="FOLDER", help="Code store: a new one, or one to add to.")],
    references: Annotated[
        Literal["none", "same_speaker"],
        typer.Option(
            metavar="HOW",
            help="none, or same_speaker: pair each clip with another of its speaker, to train cloning.",
            rich_help_panel=_REFERENCES,
        ),
    ] = "none",
    seed: Annotated[
        int,
        typer.Option(metavar="N", help="Draws the pairs: the same seed, the same pairs.", rich_help_panel=_REFERENCES),
    ] = 0,
    speaker: Annotated[str | None, typer.Option(metavar="NAME", help="Who speaks.", rich_help_panel=_LABELS)] = None,
    language: Annotated[
        str | None, typer.Option(metavar="CODE", help="Language of the texts, such as en.", rich_help_panel=_LABELS)
    ] = None,
    scene: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Description of the scene.", rich_help_panel=_LABELS)
    ] = None,
    validation_fraction: Annotated[
        float,
        typer.Option(
            metavar="X",
            callback=within(0, 1, below=True),
            help="Share of recordings kept for validation.",
            rich_help_panel=_LIMITS,
        ),
    ] = 0.05,
    max_seconds: Annotated[
        float,
        typer.Option(metavar="SECONDS", callback=within(0, above=True), help="Longest clip.", rich_help_panel=_LIMITS),
    ] = 30.0,
    allow_long: Annotated[
        bool, typer.Option("--allow-long", help="Accept longer clips, too.", rich_help_panel=_LIMITS)
    ] = False,
    allow_outside: Annotated[
        bool,
        typer.Option(
            "--allow-outside",
            help="Accept paths that leave the source's folder: for sources that you trust.",
            rich_help_panel=_LIMITS,
        ),
    ] = False,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="ROLES",
            help="What a table's columns mean, in order, - for unused: audio,speaker,text; or by name: "
            "audio=path,text=words.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    collect: Annotated[
        bool,
        typer.Option(
            "--collect", help="Raw recordings: cut them first, as `collect` does, into OUT-raw.", rich_help_panel=RAW
        ),
    ] = False,
    asr: TextAsrOption = None,
    speaker_model: SpeakerModelOption = None,
    limit: LimitOption = None,
    drop: Annotated[
        Path | None,
        typer.Option(
            parser=path, metavar="FILE", help="Take out rows for good: their ids, one a line.", rich_help_panel=STORED
        ),
    ] = None,
    restore: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Dropped rows that may come back: ids.", rich_help_panel=STORED),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Checkpoint to train, whose codec encodes.", rich_help_panel=_MODEL),
    ] = None,
    codec: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another codec: folder or hub id.", rich_help_panel=_MODEL)
    ] = None,
    whisper: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Whisper checkpoint that encodes references and user audio, for model.whisper.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Check recordings, encode them once, and store their codes."""
    if collect:
        if source is None:
            raise typer.BadParameter("name the recordings to --collect")
        source = collect_for(source, out, asr, speaker_model, language, device, as_json)
    elif given := [name for name, value in (("--asr", asr), ("--speaker-model", speaker_model)) if value is not None]:
        raise typer.BadParameter(f"{given[0]} belongs to --collect, for raw recordings")
    if source is not None:
        check_source(source)
        check_store_place(source, out)
    check_limits(limit)
    ids, restored = _read_ids(drop), _read_ids(restore)
    if source is None and not ids and not restored:
        raise typer.BadParameter("name a source, or rows of the store to --drop or to --restore")
    if source is None:
        check_store(out)
    if model is not None:
        check_model(model)
    for name, what in ((codec, "codec"), (whisper, "Whisper checkpoint")):
        if name is not None:
            check_name(name, what=what)
    read = None
    if source is not None:
        from higgstune.data.importers import read_source

        read = read_source(source, allow_outside=allow_outside, columns=columns)
        if not as_json:
            errors.print(f"read as {read.read_as}")
    with nullcontext() if source is None else announced("loading the codec", as_json):
        from higgstune.data.prepare import prepare as run

    with Bar() as bar:
        summary = run(
            read,
            out,
            codec=codec,
            device=device,
            model=model,
            whisper=whisper,
            validation_fraction=validation_fraction,
            references=references,
            max_seconds=max_seconds,
            allow_long=allow_long,
            allow_outside=allow_outside,
            columns=columns,
            seed=seed,
            speaker=speaker,
            language=language,
            scene=scene,
            limits=limit or (),
            drop=ids,
            restore=restored,
            progress=bar,
        )
    if as_json:
        print_result(dataclasses.asdict(summary), as_json)
    else:
        print_prepared(summary, out, model=model, codec=codec, whisper=whisper)


def _read_ids(file: Path | None) -> list[str]:
    """The ids in a file, one a line. Raises DataError for a file that cannot be read, or has none."""
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}): write the ids of rows into it, one a line") from error
    if not (ids := [line.strip() for line in lines if line.strip()]):
        raise DataError(f"{file} is empty: write the ids of rows into it, one a line")
    return ids
