"""The report of a run or of an evaluation: facts, the chosen checkpoint and why, measures, clips, and commands."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from higgstune.checkpoint_files import read_json
from higgstune.config.expression import STEP
from higgstune.data.shard_reader import read_index
from higgstune.environment import versions
from higgstune.errors import DataError
from higgstune.evaluation.clips import SAMPLES, Clip, read_clips
from higgstune.evaluation.evaluate import FOLDER, EvaluationResult, SetResult
from higgstune.evaluation.report.measures import changes_of
from higgstune.evaluation.report.page import (
    Candidate,
    Change,
    Choice,
    Item,
    RunReport,
    Section,
    System,
    Table,
    write_report,
)
from higgstune.evaluation.report.players import badness, complaints, take_of
from higgstune.evaluation.verdict import Verdict
from higgstune.inputs import ADAPTER, BASE, CLIPS_FILE, RUN_STATE
from higgstune.metrics import METRICS, ClipRow, Confusion, Evaluation, shown
from higgstune.model.adapter_folder import adapter_card

REPORT = "report.html"
_MAX_TEXTS = 40  # of a set, with players: a page with hundreds would not open on a phone
_IMPORTANT = ("wer", "similarity", "cap_rate", "loop_rate", "duration_ratio")


def write_run_report(run: Path, result: EvaluationResult | None = None, command: Sequence[str] = ()) -> Path:
    """Write `report.html` into a run's folder: of its training alone, or with the result of `evaluate`.

    `command` is the one that made `result`. Raises WorkError if the disk refuses.
    """
    state = read_json(run / RUN_STATE, "every run's folder has one")
    stages: dict[str, Any] = state["stages"]
    card = adapter_card(run / str(state["adapter"]))
    path = run / REPORT
    write_report(
        RunReport(
            title="/".join(run.resolve().parts[-2:]),
            introduction=_introduction(result),
            facts=facts_of(card, stages),
            verdicts={name: Verdict(**stage["verdict"]) for name, stage in stages.items() if "verdict" in stage},
            histories={name: stage["history"] for name, stage in stages.items()},
            evaluations=evaluations_of(stages),
            choice=_choice(stages),
            sections=_training_sections(run, stages) if result is None else _sections(result),
            commands=_commands(run, card, command),
            environment=_trained_with(state) | _environment(result),
            **_measured(result, _other_sets(run / FOLDER, result)),
        ),
        path,
    )
    return path


def write_target_report(result: EvaluationResult, target: Path, command: Sequence[str]) -> Path:
    """Write the report of an evaluation: into the run's folder if `target` is a run, else beside the speech."""
    if (target / RUN_STATE).is_file() and result.folder == target / FOLDER:
        return write_run_report(target, result, command)
    return write_evaluation_report(result, result.folder / REPORT, target.resolve().name, command)


def write_evaluation_report(result: EvaluationResult, path: Path, title: str, command: Sequence[str]) -> Path:
    """Write the report of an evaluation without a run: of a base, a single adapter or an external folder of clips."""
    card = {} if result.adapter is None else adapter_card(result.adapter)
    write_report(
        RunReport(
            title=title,
            introduction=_introduction(result),
            facts=facts_of(card, {}),
            sections=_sections(result),
            commands=[("measure again", shlex.join(command))],
            environment=_environment(result),
            **_measured(result, []),
        ),
        path,
    )
    return path


def _introduction(result: EvaluationResult | None) -> str:
    if result is None:
        return "The training of this run, and clips spoken during it. `higgstune evaluate` adds measurements."
    clips = max(len(clips) for clips in result.texts.clips.values())
    return f"{clips} texts ({result.texts.name}), spoken and measured. The worst clips come first."


def facts_of(card: Mapping[str, Any], stages: Mapping[str, Any]) -> dict[str, str]:
    """How an adapter was trained, and on what data, from its card and its run's stages."""
    facts = {}
    if card.get("checkpoint"):
        facts["base"] = f"{card['checkpoint']} (fingerprint {card.get('base_fingerprint')})"
        facts["codec"] = f"{card.get('codec')} (revision {card.get('codec_revision')})"
    if data := card.get("data"):
        facts["data"] = (
            f"{data['store']}: {data['train_rows']} rows ({60 * data['train_hours']:.1f} min) for training, "
            f"{data['validation_rows']} ({60 * data['validation_hours']:.1f} min) for validation"
        )
    if replay := card.get("recipe", {}).get("data", {}).get("replay"):
        facts["replayed"] = f"{replay['store']}: {100 * replay['share']:.0f} % of all rows"
    if lora := card.get("recipe", {}).get("lora"):
        facts["adapter"] = ", ".join(f"{key} {value}" for key, value in lora.items())
    for name, stage in stages.items():
        facts[f"stage {name}"] = (
            f"{stage['kind']}: {stage['steps']} steps, {stage['parameters']:,} parameters in {stage['layers']} layers"
        )
        proof = stage["verification"]
        facts[f"{name}, as saved"] = (
            f"reloaded by a fresh process: {proof['from_trained']:.1e} from the trained model's logits, "
            f"{proof['from_base']:.1e} from the base's"
        )
    return facts


def evaluations_of(stages: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """The measurements of the clips spoken during training, by stage and step."""
    wanted = {f"eval_{metric.name}": metric.name for metric in METRICS}
    found = {}
    for name, stage in stages.items():
        entries = [
            {"step": entry["step"]} | {wanted[key]: value for key, value in entry.items() if key in wanted}
            for entry in stage["history"]
            if any(key in entry for key in wanted)
        ]
        if entries:
            found[name] = entries
    return found


def _choice(stages: Mapping[str, Any]) -> Choice | None:
    """The choice of the last stage, whose adapter is the run's."""
    name, stage = list(stages.items())[-1]
    chosen = stage.get("chosen")
    if chosen is None:
        return None
    in_rule = [metric.name for metric in METRICS if re.search(rf"\b{metric.name}\b", chosen["rule"])]
    candidates = [
        Candidate(
            name,
            entry[STEP],
            {key: entry["measures"][key] for key in (*_IMPORTANT, *in_rule) if key in entry["measures"]},
            entry["broken"],
            entry[STEP] == chosen["step"],
        )
        for entry in chosen["candidates"]
    ]
    reason = "It meets every condition and ranks highest."
    if not chosen["healthy"]:
        reason = "No step meets every condition; this one breaks the fewest. Listen to it before you use it."
    if chosen["rule"] == "the last step":
        reason = "The last step: the recipe names no judge, gates or rank to choose by, or evaluation.choose: last."
    return Choice(f"{name}, step {chosen['step']}", reason, chosen["rule"], candidates)


def _measured(result: EvaluationResult | None, others: Sequence[Table]) -> dict[str, Any]:
    if result is None:
        return {"tables": others}
    systems = result.texts.systems
    last = list(systems.values())[-1]
    return {
        "systems": [
            System(name, found.summary, result.texts.differences if name == ADAPTER else {})
            for name, found in systems.items()
        ],
        "judges": last.judges,
        "tables": [*([] if last.confusion is None else [_confusion_table(last.confusion)]), *others],
        "not_measured": last.not_measured,
        "guard": [change for guarded in result.guard for change in guard_changes(guarded)] if result.guard else None,
        "guard_conclusion": "; ".join(f"{guarded.name}: {guarded.conclusion}" for guarded in result.guard),
        "guard_note": "Texts and voices that must not get worse: the base before, the adapter after. If nothing "
        "changes, chance calls some metric of a set worse in at most one of twenty sets. Listen to the clips too.",
    }


def _other_sets(folder: Path, result: EvaluationResult | None) -> list[Table]:
    """A table of the other sets that earlier calls have measured, if there are any."""
    now = [] if result is None else [found.name for found in (result.texts, *result.guard)]
    rows: list[list[str | None]] = []
    measured: list[tuple[str, str, dict[str, Any]]] = []
    for path in sorted(folder.glob("*.json")):
        found = read_json(path, "evaluate the set again")
        if "systems" in found and found["set"] not in now:
            measured += [(found["set"], name, system["summary"]) for name, system in found["systems"].items()]
    metrics = [metric for metric in METRICS if any(metric.name in summary for *_, summary in measured)]
    metrics = [metric for metric in metrics if metric.name in _IMPORTANT]
    for name, system, summary in measured:
        clips = max((estimate["clips"] for estimate in summary.values()), default=0)
        values = [shown(m, summary[m.name]["value"]) if m.name in summary else None for m in metrics]
        rows.append([f"{name}, {system}", str(clips), *values])
    note = "Measured by earlier calls; the file of each set has all its numbers."
    return [Table("Other sets", ["set", "clips", *(m.label for m in metrics)], rows, note)] if rows else []


def _confusion_table(confusion: Confusion) -> Table:
    rows = [
        [name, *(f"{value:.2f} ({times})" for value, times in zip(similar, nearest, strict=True))]
        for name, similar, nearest in zip(confusion.speakers, confusion.similarity, confusion.nearest, strict=False)
    ]
    return Table(
        "Whose voice is it?",
        ["clips of", *confusion.speakers],
        rows,
        "Mean similarity to each speaker's recordings, and how many clips are nearest to them.",
    )


def guard_changes(guarded: SetResult) -> list[Change]:
    """Each metric of a guarded set before and after."""
    before, after = (guarded.systems[name] for name in (BASE, ADAPTER))
    changes = changes_of(System(BASE, before.summary), System(ADAPTER, after.summary, guarded.differences))
    return [Change(c.metric, c.before, c.after, c.difference, guarded.name) for c in changes]


def _sections(result: EvaluationResult) -> list[Section]:
    titles = [(result.texts, result.texts.name), *((guarded, f"guard: {guarded.name}") for guarded in result.guard)]
    return [_section(found, title) for found, title in titles]


def _section(found: SetResult, title: str) -> Section:
    """Every text with each system's clip of it, the worst of the last system first."""
    last = list(found.systems)[-1]
    rows = {system: {row["id"]: row for row in evaluation.clips} for system, evaluation in found.systems.items()}
    files = {system: {clip.id: clip for clip in clips} for system, clips in found.clips.items()}
    items = []
    worst = sorted(rows[last].values(), key=badness, reverse=True)[:_MAX_TEXTS]
    for row in worst:
        name, language = str(row["id"]), row.get("language")
        takes = [
            take_of(rows[system][name], clips[name].file) if name in clips else None for system, clips in files.items()
        ]
        detail = ", ".join(str(row[key]) for key in ("speaker", "language") if row.get(key))
        items.append(
            Item(
                str(row["text"]),
                takes,
                language=None if language is None else str(language),
                detail=detail,
                why=", ".join(complaints(row)),
            )
        )
    note = f"The worst {len(worst)} of {len(rows[last])} texts." if len(worst) < len(rows[last]) else ""
    return Section(title, list(files), items, note)


def _training_sections(run: Path, stages: Mapping[str, Any]) -> list[Section]:
    """The clips that each stage spoke at its start and at the chosen step."""
    sections = []
    for name, stage in stages.items():
        steps = [0, stage.get("chosen", {}).get("step", stage["steps"])]
        places = [run / name / SAMPLES / f"step-{step:06d}" for step in steps]
        spoken = {step: place for step, place in zip(steps, places, strict=True) if (place / CLIPS_FILE).is_file()}
        if spoken:
            sections.append(_training_section(name, spoken))
    return sections


def _training_section(stage: str, folders: Mapping[int, Path]) -> Section:
    clips: dict[int, dict[str, Clip]] = {step: {c.id: c for c in read_clips(place)} for step, place in folders.items()}
    rows: dict[int, dict[str, ClipRow]] = {}
    for step, place in folders.items():
        measured = place / "evaluation.json"
        found = Evaluation.of(read_json(measured, "")).clips if measured.is_file() else []
        rows[step] = {str(row["id"]): row for row in found}
    last = clips[list(clips)[-1]]
    items = [
        Item(
            clip.text,
            [
                take_of(rows[step].get(name, {}), some[name].file) if name in some else None
                for step, some in clips.items()
            ],
        )
        for name, clip in last.items()
    ]
    return Section(f"{stage}, during training", [f"step {step}" for step in clips], items)


def _trained_with(state: Mapping[str, Any]) -> dict[str, str]:
    found = state.get("environment")
    return {"trained with": "not recorded" if found is None else ", ".join(f"{k} {v}" for k, v in found.items())}


def _environment(result: EvaluationResult | None) -> dict[str, str]:
    """Versions and settings of this call."""
    settings = {} if result is None or result.settings is None else asdict(result.settings)
    return versions() | {key: str(value) for key, value in settings.items()}


def _commands(run: Path, card: Mapping[str, Any], command: Sequence[str]) -> list[tuple[str, str]]:
    commands = [
        *_preparation(Path(card.get("data", {}).get("store", ""))),
        ("train it again", f"higgstune train {shlex.quote(str(run / 'recipe.yaml'))} --out NEW_FOLDER"),
    ]
    if command:
        commands.append(("measure it again", shlex.join(command)))
    return [*commands, ("speak with it", f'higgstune speak "..." --adapter {shlex.quote(str(run))} --out speech.wav')]


def _preparation(store: Path) -> list[tuple[str, str]]:
    """The command that makes a store like this one, as far as the store records it: its source is not recorded."""
    try:
        info = read_index(store).info
    except DataError:  # it has moved, or something else has its place now
        return []
    words = ["higgstune", "prepare", "RECORDINGS", "--out", str(store), "--codec", info.codec]
    for name, value in info.settings.items():
        option = f"--{name.replace('_', '-')}"
        words += [option] if value is True else [] if value is False else [option, str(value)]
    return [("prepare its data again", shlex.join(words))]
