"""The verbs `prepare` and `inspect`: from recordings to a code store, and a look at one of its rows."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from higgstune.cli.options import DeviceOption, JsonOption, check_model, path, within
from higgstune.cli.output import Bar, announced, print_result, print_table
from higgstune.environment import check_versions
from higgstune.files import check_folder
from higgstune.hub import check_name
from higgstune.inputs import check_source, check_store

_LABELS, _LIMITS, _MODEL = "Labels of all rows", "Which clips", "Model"


def prepare(
    source: Annotated[
        Path,
        typer.Argument(
            parser=path,
            help="Folder of audio with .txt/.lab beside each file, LJSpeech folder, .jsonl manifest, ChatML .json or "
            "metadata.json with samples.",
        ),
    ],
    out: Annotated[Path, typer.Option(parser=path, metavar="FOLDER", help="Code store: a new one, or one to add to.")],
    references: Annotated[
        Literal["none", "same_speaker"], typer.Option(help="same_speaker: pair each clip with another of its speaker.")
    ] = "none",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the pairing.")] = 0,
    speaker: Annotated[str | None, typer.Option(metavar="NAME", rich_help_panel=_LABELS)] = None,
    language: Annotated[str | None, typer.Option(metavar="CODE", help="Such as en.", rich_help_panel=_LABELS)] = None,
    scene: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Description of the scene.", rich_help_panel=_LABELS)
    ] = None,
    validation_fraction: Annotated[
        float,
        typer.Option(
            metavar="X",
            callback=within(0, 1),
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
    check_source(source)
    check_folder(out)
    if model is not None:
        check_model(model)
    for name, what in ((codec, "codec"), (whisper, "Whisper checkpoint")):
        if name is not None:
            check_name(name, what=what)
    with announced("loading the codec", as_json):
        from higgstune.data.prepare import prepare as run

    with Bar() as bar:
        summary = run(
            source,
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
            seed=seed,
            speaker=speaker,
            language=language,
            scene=scene,
            progress=bar,
        )
    print_result(dataclasses.asdict(summary), as_json)
    if summary.refused and not as_json:
        typer.echo(f"refused rows, with their reasons: {out / 'rejected.jsonl'}")


def inspect(
    store: Annotated[Path, typer.Argument(parser=path, help="Folder of the code store.")],
    row: Annotated[str, typer.Option(metavar="ROW", help="Number (train rows first) or id of the row.")] = "0",
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Checkpoint whose tokenizer reads the text.")
    ] = None,
    text_targets: Annotated[
        Literal["transcript", "assistant", "none"], typer.Option(help="Which text has labels.")
    ] = "transcript",
    reference: Annotated[
        Literal["turn", "scene"], typer.Option(help="Place of the reference, as data.reference of a recipe.")
    ] = "turn",
    whisper: Annotated[str | None, typer.Option(metavar="NAME", help="As model.whisper of a recipe.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show one row as the model sees it: prompt, tokens, frames, labels."""
    check_store(store)
    if model is not None:
        check_model(model)
    check_versions()
    from higgstune.diagnostics.inspect_row import inspect_row, label_table

    found = inspect_row(store, row, model=model, text_targets=text_targets, reference=reference, whisper=whisper)
    if as_json:
        print_result(dataclasses.asdict(found), as_json)
        return
    typer.echo(f"{found.id} ({found.split}): {found.seconds:.2f} s, {found.frames} frames\n")
    typer.echo(found.prompt + "\n")
    typer.echo(
        f"{found.tokens} tokens: {found.text_tokens} of text, {found.audio_rows} audio frames, "
        f"{found.feature_positions} Whisper features; "
        f"{len(found.text_labels)} text labels, {found.audio_label_entries} audio label entries\n"
    )
    typer.echo(
        "text labels (position token): " + " ".join(f"{p} {token!r}" for p, _, token in found.text_labels) + "\n"
    )
    table = Table("position", *(f"k={k}" for k in range(len(found.audio_labels[0][1]))), title="audio labels")
    for entries in label_table(found):
        table.add_row(*map(str, entries))
    print_table(table)
