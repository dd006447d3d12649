"""The verb `review`: proof-read a data set in the browser."""

import os
import shlex
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from higgstune.cli.options import path, within
from higgstune.cli.output import many
from higgstune.errors import Interrupted

if TYPE_CHECKING:
    from higgstune.raw.proofreading import Review


def review(
    dataset: Annotated[
        Path, typer.Argument(parser=path, metavar="DATASET", help="A data set that `higgstune collect` wrote.")
    ],
    port: Annotated[
        int, typer.Option(metavar="N", callback=within(0, 65535), help="Port on this machine; default: a free one.")
    ] = 0,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page, or only print its link.")
    ] = True,
) -> None:
    """Proof-read a data set in the browser: play, correct, drop, split and join utterances, name speakers.

    The page is for whoever has its link, on this machine alone. Ctrl-C ends it; every decision is kept at once.
    """
    from higgstune.files import alone_in
    from higgstune.pages.server import PageServer
    from higgstune.raw.proofreading import check_dataset
    from higgstune.raw.review_app import ReviewApp

    check_dataset(dataset)
    with alone_in(dataset, "review", "nothing was decided"):
        app = ReviewApp(dataset)
        server = PageServer(app.routes, port)
        typer.echo(f"{many(app.review.state()['utterances'], 'utterance')}: {server.url}")
        typer.echo("Ctrl-C ends it")
        if browser:
            webbrowser.open(server.url)
        try:
            server.serve()
        except KeyboardInterrupt:
            _print_end(app.review, dataset)
        except Interrupted:
            _print_end(app.review, dataset)
            raise
        finally:
            app.close()


def _print_end(review: "Review", dataset: Path) -> None:
    state = review.state()
    typer.echo(f"\n{many(state['sequence'], 'decision')} in {dataset / 'review.jsonl'}")
    typer.echo(f"left to look at: {many(state['status']['open'], 'utterance')}")
    typer.echo(f"next: to apply them, collect as before: {shlex.join(_collect(review, dataset))}")


def _collect(review: "Review", dataset: Path) -> list[str]:
    """The command that collected, as it was recorded, or what is known of it."""
    command, raw = review.summary.get("command"), review.summary.get("raw")
    if isinstance(command, list):
        return [str(word) for word in command]
    source = os.path.relpath((dataset / raw).resolve()) if isinstance(raw, str) else "RAW"
    return ["higgstune", "collect", source, "--out", str(dataset)]
