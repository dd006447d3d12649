"""The verb `inspect`: a code store as a whole, one of its rows, or all rows that stand out."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from higgstune.cli.options import JsonOption, check_model, path
from higgstune.cli.output import announced, print_result
from higgstune.cli.store_views import print_row, print_store, print_tokens
from higgstune.environment import check_versions
from higgstune.hub import check_name
from higgstune.inputs import check_store, check_wav_name

if TYPE_CHECKING:
    from higgstune.data.outliers import Outlier, OutlierReport

STORED, _TOKENS = "Rows of the store", "As the model sees it"

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
    row: Annotated[
        str | None, typer.Option(metavar="ROW", help="Show this clip: its number (train rows first) or its id.")
    ] = None,
    wav: Annotated[
        Path | None,
        typer.Option(
            "--listen", parser=path, metavar="FILE", help="Write the clip as .wav, decoded by the store's codec."
        ),
    ] = None,
    codec: Annotated[
        str | None, typer.Option(metavar="NAME", help="The store's codec, if it has moved: folder or hub id.")
    ] = None,
    outliers: Annotated[
        bool,
        typer.Option(
            "--outliers",
            help="List all rows with a measure beyond a limit, or with the audio of another row.",
            rich_help_panel=STORED,
        ),
    ] = False,
    limit: LimitOption = None,
    tokens: Annotated[
        bool,
        typer.Option(
            "--tokens", help="Show the row as the model sees it: prompt, tokens, labels.", rich_help_panel=_TOKENS
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Checkpoint whose tokenizer reads the text.", rich_help_panel=_TOKENS),
    ] = None,
    text_targets: Annotated[
        Literal["transcript", "assistant", "none"],
        typer.Option(
            metavar="WHICH",
            help="Which text has labels: transcript, assistant or none.",
            rich_help_panel=_TOKENS,
        ),
    ] = "transcript",
    reference: Annotated[
        Literal["turn", "scene"],
        typer.Option(
            metavar="PLACE",
            help="Of the reference: turn or scene, as data.reference of a recipe.",
            rich_help_panel=_TOKENS,
        ),
    ] = "turn",
    whisper: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whisper checkpoint, as model.whisper of a recipe.", rich_help_panel=_TOKENS),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a code store holds: hours, speakers, lengths, texts, refusals. With --row, one of its clips."""
    of_tokens = {
        "--model": model is not None,
        "--whisper": whisper is not None,
        "--text-targets": text_targets != "transcript",
        "--reference": reference != "turn",
    }
    of_row = {"--row": row is not None, "--tokens": tokens, "--listen": wav is not None}
    _refuse(outliers, of_row | of_tokens, "--outliers lists all rows")
    _refuse(not outliers, {"--limit": bool(limit)}, "it is for --outliers")
    _refuse(row is None, {"--tokens": tokens, "--listen": wav is not None}, "name a row with --row")
    _refuse(not tokens, of_tokens, "it is for --tokens")
    _refuse(wav is None, {"--codec": codec is not None}, "it is for --listen")
    _refuse(tokens, {"--listen": wav is not None}, "leave out --tokens")
    check_store(store)
    check_limits(limit)
    if outliers:
        from higgstune.data.outliers import store_outliers

        _print_outliers(store_outliers(store, limit), store, as_json)
    elif row is None:
        from higgstune.data.overview import store_overview

        overview = store_overview(store)
        print_result(dataclasses.asdict(overview), as_json) if as_json else print_store(overview, store)
    elif tokens:
        if model is not None:
            check_model(model)
        check_versions()
        from higgstune.diagnostics.inspect_row import inspect_row

        found = inspect_row(store, row, model=model, text_targets=text_targets, reference=reference, whisper=whisper)
        print_result(dataclasses.asdict(found), as_json) if as_json else print_tokens(found)
    else:
        _show_row(store, row, wav, codec, as_json)


def _refuse(applies: bool, given: dict[str, bool], reason: str) -> None:
    """Raise typer.BadParameter for the first option that was given where `applies` holds."""
    for option, is_given in given.items():
        if applies and is_given:
            raise typer.BadParameter(reason, param_hint=option)


def _show_row(store: Path, row: str, wav: Path | None, codec: str | None, as_json: bool) -> None:
    if wav is not None:
        check_wav_name(wav)
    if codec is not None:
        check_name(codec, what="codec")
    from higgstune.data.overview import row_overview

    found = row_overview(store, row)
    if wav is not None:
        with announced("loading the codec", as_json):
            from higgstune.data.audio import write_wav
            from higgstune.data.overview import row_waveform

        write_wav(wav, *row_waveform(store, row, codec))
    if as_json:
        print_result(dataclasses.asdict(found) | ({} if wav is None else {"file": str(wav)}), as_json)
    else:
        print_row(found, store, wav)


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
