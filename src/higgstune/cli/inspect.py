"""The verb `inspect`: a row of a code store as the model sees it, or all rows that stand out."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from higgstune.cli.options import JsonOption, check_model, path
from higgstune.cli.output import print_result, print_table
from higgstune.environment import check_versions
from higgstune.inputs import check_store

if TYPE_CHECKING:
    from higgstune.data.outliers import Outlier, OutlierReport

STORED = "Rows of the store"

LimitOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help='List rows beyond this, such as "snr < 10", in place of the default; repeatable.',
        rich_help_panel=STORED,
    ),
]


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
    outliers: Annotated[
        bool,
        typer.Option(
            "--outliers",
            help="List all rows with a measure beyond a limit, or with the audio of another row.",
            rich_help_panel=STORED,
        ),
    ] = False,
    limit: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one row as the model sees it: prompt, tokens, frames, labels. Or all rows that stand out."""
    check_store(store)
    check_limits(limit)
    if outliers:
        if row != "0" or model is not None or whisper is not None:
            raise typer.BadParameter(
                "it lists all rows: leave out --row, --model and --whisper", param_hint="--outliers"
            )
        from higgstune.data.outliers import store_outliers

        _print_outliers(store_outliers(store, limit), store, as_json)
        return
    if limit:
        raise typer.BadParameter("it is for --outliers", param_hint="--limit")
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
    measures = "not measured" if found.measures is None else dataclasses.asdict(found.measures)
    print_result({"measures": measures}, as_json)
    table = Table("position", *(f"k={k}" for k in range(len(found.audio_labels[0][1]))), title="audio labels")
    for entries in label_table(found):
        table.add_row(*map(str, entries))
    print_table(table)


def _print_outliers(report: "OutlierReport", store: Path, as_json: bool) -> None:
    """All outliers under their kinds: value, id, text; no table, which would cut long ids off."""
    if as_json:
        print_result(dataclasses.asdict(report), as_json)
        return
    from higgstune.data.measures import LIMITS

    typer.echo(f"outliers: {counted(report.outliers)} of {report.rows}")
    reasons = {(limit.name, limit.sign): limit.reason for limit in LIMITS}
    for kind, found in by_kind(report.outliers).items():
        name, sign, *_ = kind.split()
        reason = reasons.get((name, sign))
        typer.echo(f"\n{kind}: {len(found)}" + (f" ({reason})" if reason else ""))
        for outlier in found:
            value = f"like {outlier.other}" if outlier.value is None else f"{outlier.value:g}"
            typer.echo(f"  {value}  {outlier.id}  {outlier.text[:60]!r}")
    if report.not_measured:
        typer.echo(f"\nnot measured: {len(report.not_measured)} of an earlier version; prepare their source again")
    if report.outliers:
        typer.echo(
            f"\nto take rows out, write their ids into a file, one a line: higgstune prepare --drop FILE --out {store}"
        )


def by_kind(outliers: "Iterable[Outlier]") -> "dict[str, list[Outlier]]":
    kinds = defaultdict(list)
    for outlier in outliers:
        kinds[outlier.kind].append(outlier)
    return dict(kinds)


def counted(outliers: "Sequence[Outlier]") -> str:
    return f"{len({outlier.id for outlier in outliers})} rows" if outliers else "none"


def check_limits(limits: Sequence[str] | None) -> None:
    if limits:
        from higgstune.data.measures import parse_limits

        parse_limits(limits)
