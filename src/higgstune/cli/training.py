"""The verb `train`, which also plans a run."""

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from higgstune.cli.endings import print_trained
from higgstune.cli.options import PLAN, JsonOption, PlannedDeviceOption, path
from higgstune.cli.output import Bar, announced, errors, print_result, print_table
from higgstune.errors import ConfigError, not_usable_code
from higgstune.files import check_folder
from higgstune.hub import check_name
from higgstune.inputs import check_store

if TYPE_CHECKING:
    from higgstune.config.recipe import Recipe
    from higgstune.training.run_dir import RunResult


def train(
    recipe: Annotated[
        Path, typer.Argument(parser=path, help="A recipe in YAML, or one that `higgstune recipe` lists: voice.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FOLDER", help="Folder of the run: a new one, or with --resume an old one."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a key of the recipe, such as stages.0.learning_rate=5e-5; may be repeated.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was interrupted.")] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Only print memory, steps and time; exit code 1 if the run does not fit.",
            rich_help_panel=PLAN,
        ),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory of the device, such as 16GB; default: what is free.", rich_help_panel=PLAN
        ),
    ] = None,
    device: PlannedDeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the stages of a recipe, and verify that each saved adapter is what was trained."""
    from higgstune.config.recipe import load_recipe
    from higgstune.config.trackers import check_installed

    loaded = load_recipe(recipe, overrides or [])
    if not plan and (memory is not None or device is not None):
        raise ConfigError("--memory and --device belong to --plan; a run's device is model.device of the recipe")
    if not plan and out is None:
        raise ConfigError("give --out, the folder of the run (or --plan, which trains nothing)")
    check_store(Path(loaded.data.store))
    check_name(loaded.model.checkpoint, what="checkpoint")
    if out is None or plan:
        _show_plan(loaded, memory, device, as_json)
        return
    check_installed(loaded.report_to)
    check_folder(out)
    with announced("loading the model", as_json):
        import torch.distributed

        from higgstune.training.run import train as run

    started = time.monotonic()
    result = run(loaded, out, resume=resume)
    seconds = time.monotonic() - started
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        if as_json:
            print_result(_as_json(result) | {"seconds": round(seconds, 1)}, as_json)
        else:
            print_trained(result, seconds, recipe, overrides or [])
    if not result.usable:
        raise typer.Exit(not_usable_code())


def _as_json(result: "RunResult") -> dict[str, Any]:
    stages = {
        name: {key: value for key, value in stage.as_json().items() if key != "history"}
        for name, stage in result.stages.items()
    }
    verdict = None if result.verdict is None else asdict(result.verdict)
    return {"run": str(result.folder), "adapter": str(result.adapter), "stages": stages, "verdict": verdict}


def _show_plan(recipe: "Recipe", memory: str | None, device: str | None, as_json: bool) -> None:
    with announced("planning", as_json):
        from higgstune.config.trackers import ADVICE, missing_trackers
        from higgstune.planning.report import plan
        from higgstune.progress import silent

    with Bar() as bar:
        found = plan(recipe, memory=memory, device=device, progress=silent if as_json else bar)
    for problem in missing_trackers(recipe.report_to):  # a warning, as the plan may be for another machine
        errors.print(f"warning: {problem} on this machine: {ADVICE}")
    if as_json:
        print_result(found.as_json(), as_json)
    else:
        table = Table("", *(f"{stage.name} ({stage.kind})" for stage in found.plan.stages))
        for row in found.rows():
            table.add_row(*row)
        print_table(table)
        typer.echo(found.verdict())
    if found.fits is False:
        raise typer.Exit(1)
