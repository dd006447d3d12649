"""The verbs `doctor` and `demo`: whether what is here works."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from higgstune.cli.options import MODEL, AsrOption, DeviceOption, JsonOption, RevisionOption, SpeakerOption, path
from higgstune.cli.output import Bar, announced, errors, print_result, print_table
from higgstune.errors import ConfigError, WorkError, not_usable_code
from higgstune.files import check_folder
from higgstune.inputs import BaseSpec
from higgstune.progress import duration


def doctor(
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Checkpoint: folder or hub id.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(parser=path, metavar="FOLDER", help="An adapter or a run; it names its base.")
    ] = None,
    data: Annotated[Path | None, typer.Option(parser=path, metavar="FOLDER", help="A code store.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(parser=path, metavar="RECIPE", help="Recipe to plan; it names the others.")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another codec: folder or hub id.", rich_help_panel=MODEL)
    ] = None,
    revision: RevisionOption = None,
    golden: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FOLDER", help="Golden values to compare this installation with."),
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Check machine, checkpoint, codec, data and adapter: what is wrong, and what to do.

    Exits with 1 when a check failed. Nothing is changed.
    """
    try:
        with announced("loading libraries", as_json, any_version=True):
            from higgstune.diagnostics.examine import doctor as run
    except (ImportError, AttributeError, RuntimeError, OSError) as error:  # libraries that do not fit, or are broken
        from higgstune.diagnostics.without_libraries import examine_without_libraries

        report = examine_without_libraries(error, adapter=adapter, data=data, recipe=recipe)
    else:
        report = run(
            # Not by `base_spec`: a wrong name is a finding, too.
            BaseSpec(model, revision, codec, device=None if device == "auto" else device),
            adapter=adapter,
            data=data,
            recipe=recipe,
            golden_values=golden,
            progress=lambda what: errors.print(f"examining {what}"),
        )
    if as_json:
        print_result(report.to_json(), as_json)
    else:
        if sys.stdout.isatty():
            print_table(report.table())
        else:
            typer.echo(report.text())
        typer.echo(", ".join(f"{count} {status}" for status, count in report.summary.items()))
    if not report.passed:
        raise typer.Exit(1)


def demo(
    out: Annotated[Path, typer.Option(parser=path, metavar="FOLDER", help="New folder of the demo.")] = Path(
        "runs/demo"
    ),
    asr: AsrOption = None,
    speaker_judge: SpeakerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Teach a miniature a second voice: prepare, two stages, speak, report. No network, no GPU, a few minutes.

    With judges it measures the result, and exits with 1 when it is not good enough.
    """
    check_folder(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} exists: remove it, or give another --out")
    with announced("unpacking recordings and a base", as_json):
        from higgstune.demo.demo import run_demo
        from higgstune.demo.page import next_commands
        from higgstune.training.run_dir import is_unusable

    with Bar(live=False) as bar:  # training draws a bar of its own
        say = (lambda _: None) if as_json else errors.print
        result = run_demo(out, asr=asr, speaker_judge=speaker_judge, progress=bar, say=say)
    if as_json:
        print_result(dataclasses.asdict(result), as_json)
    else:
        bars = result.measurement.bars if result.measurement else []
        for measured in bars:
            outcome = "holds" if measured.holds else "BROKEN"
            typer.echo(f"{measured.name}: {measured.value:.3f} ({measured.condition}) {outcome}")
        typer.echo(f"\n{result.lesson}\nIt took {duration(result.seconds)}. Open {result.report} to listen to it.")
        if not is_unusable(result.verdict):
            typer.echo("\nnext:")
            for purpose, command in next_commands(out, result.sentence)[:3]:
                typer.echo(f"  {command}    # {purpose.lower()}")
    if result.measurement is not None and not result.measurement.passed:
        broken = [bar.name for bar in result.measurement.bars if not bar.holds]
        raise WorkError(f"the demo's result is not good enough: {', '.join(broken)}; see {result.report}")
    if is_unusable(result.verdict):
        raise typer.Exit(not_usable_code())
