"""The last lines of a verb: its result in words, and the command to type next."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from higgstune.cli.output import errors, many, print_next
from higgstune.data.rejection import reasons_in_words, some_ids
from higgstune.hub import local_folder
from higgstune.progress import duration

if TYPE_CHECKING:
    from higgstune.data.summary import PrepareSummary
    from higgstune.exporting.export import ExportResult
    from higgstune.training.run_dir import RunResult, StageResult

_SENTENCE = "Good morning, how are you?"


def print_prepared(
    summary: "PrepareSummary", out: Path, *, model: str | None, codec: str | None, whisper: str | None
) -> None:
    """What a store holds now, and what a person should look at before training on it."""
    seconds = {split: 3600 * hours for split, hours in summary.hours.items()}
    rows = "; ".join(f"{split}: {many(n, 'clip')}, {duration(seconds[split])}" for split, n in summary.rows.items())
    typer.echo(f"{out}: {many(sum(summary.rows.values()), 'clip')}, {duration(sum(seconds.values()))} ({rows})")
    used = sum(summary.accepted.values())
    if summary.read_as:
        new = f"{summary.added} new, {summary.updated} updated, {summary.encoded} encoded"
        typer.echo(f"from this source: {many(used, 'clip')} ({new})")
        typer.echo(f"first one: {summary.example}")
    if summary.passed_over:
        typer.echo(f"not used: {', '.join(summary.passed_over)}")
    pairs = summary.references
    if pairs.paired or pairs.explicit:
        typer.echo(f"references: {pairs.paired} paired with another clip, {pairs.explicit} with their own")
    counts = {"dropped": summary.dropped, "restored": summary.restored, "with Whisper features": summary.whisper}
    for name, count in counts.items():
        if count:
            typer.echo(f"{name}: {count}")
    if summary.refused:
        typer.echo(f"refused: {reasons_in_words(summary.refused)}; all of them are in {out / 'rejected.jsonl'}")
    unseen = [("not measured", summary.not_measured), ("not in this source", summary.not_in_source)]
    for name, ids in [*unseen, ("stay with their old text", summary.stale)]:
        if ids:
            typer.echo(f"{name}: {some_ids(ids)}")
    for warning in summary.warnings:
        typer.echo(f"warning: {warning}")
    if summary.outliers:
        ids = list(dict.fromkeys(outlier.id for outlier in summary.outliers))
        typer.echo(f"rows that stand out: {some_ids(ids)}")
        print_next("higgstune", "inspect", str(out), "--outliers", before="to see why:")
    if summary.read_as:
        named = {"data.store": out, "model.checkpoint": model, "model.codec": codec, "model.whisper": whisper}
        settings = [word for key, value in named.items() if value for word in ("--set", f"{key}={value}")]
        recipe = "whisper" if whisper else "clone" if pairs.paired or pairs.explicit else "voice"
        print_next("higgstune", "train", _recipe_for(recipe, model), *settings, "--out", f"runs/{out.resolve().name}")


def _recipe_for(name: str, model: str | None) -> str:
    """The shipped recipe of that name for the family of a checkpoint, as far as this disk shows it."""
    from higgstune.config.shipped import shipped_recipes
    from higgstune.families import family_in

    folder = None if model is None else local_folder(model, what="checkpoint")
    own = "" if folder is None else f"{family_in(folder)[0].name}/{name}"
    return own if own in shipped_recipes() else name


def print_trained(result: "RunResult", seconds: float, recipe: Path, overrides: Sequence[str]) -> None:
    """What a run has learned, whether it is usable, and how to use it, or what to try instead."""
    for name, stage in result.stages.items():
        typer.echo(f"stage {name}: {_stage(stage)}")
    typer.echo(f"time: {duration(seconds)}")
    typer.echo(f"adapter: {result.adapter}")
    if (report := result.folder / "report.html").exists():
        typer.echo(f"report: {report}")
    verdict = result.verdict
    if verdict is not None:
        typer.echo(f"verdict: {verdict}")
    if result.usable:
        wav = f"{result.folder.resolve().name}.wav"
        print_next("higgstune", "speak", _SENTENCE, "--adapter", str(result.folder), "--out", wav)
    elif verdict is not None and verdict.change:
        replaced = {change.partition("=")[0] for change in verdict.change}
        kept = [setting for setting in overrides if setting.partition("=")[0] not in replaced]
        settings = [word for setting in (*kept, *verdict.change) for word in ("--set", setting)]
        print_next("higgstune", "train", str(recipe), *settings, "--out", f"{result.folder}-2")
    else:
        print_next("higgstune", "doctor", "--recipe", str(result.folder / "recipe.yaml"))


def _stage(stage: "StageResult") -> str:
    """The result of a stage in one line; `--json` has all of it."""
    parts = [f"{stage.kind}, {many(stage.steps, 'step')}"]
    if stage.compiled:
        parts.append("layers compiled")
    if stage.stopped_early:
        parts.append("stopped early: no better validation within evaluation.patience")
    if stage.chosen is not None:
        last = stage.chosen.rule == "the last step"
        parts.append("ends with the last one" if last else f"ends with step {stage.chosen.step}: {stage.chosen.rule}")
    verdict = stage.verdict
    if verdict is not None and verdict.loss is not None and verdict.base_loss is not None:
        parts.append(f"validation audio loss {verdict.base_loss:.2f} before, {verdict.loss:.2f} after")
    return "; ".join(parts)


def print_exported(result: "ExportResult") -> None:
    """What was written, what it was compared with, and how to speak with it."""
    typer.echo(f"folder: {result.folder} ({result.format}{f', {result.dtype}' if result.dtype else ''})")
    typer.echo(f"check: {result.check.summary}")
    if result.faults:
        typer.echo(f"verdict of its run: not usable: {'; '.join(result.faults)}; the card says so, too")
    if result.dropped and result.loss is not None:
        losses = f"{result.loss.without_modules:.3f} without them, {result.loss.with_modules:.3f} with them"
        typer.echo(f"left out: {', '.join(result.dropped)}; audio loss {losses}")
    option = "--adapter" if result.format == "peft" else "--model"
    wav = f"{result.folder.resolve().name}.wav"
    print_next("higgstune", "speak", _SENTENCE, option, str(result.folder), "--out", wav)


def warn_of_unusable(run: Path) -> None:
    """Say on stderr that a run ended with an adapter that is not usable."""
    from higgstune.inputs import is_unusable_run

    if is_unusable_run(run):
        errors.print(f"warning: the run {run} is not usable; its report says why")
