"""The verb `compare`: several runs speak the same texts with the same seeds; one table and one page."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from higgstune.checkpoint_files import read_json
from higgstune.environment import choose_device
from higgstune.errors import ConfigError, DataError
from higgstune.evaluation.choice import Choice, Rule, check_rules, choose
from higgstune.evaluation.clips import Clip, check_target
from higgstune.evaluation.evaluate import RECORDINGS, EvaluationResult, SpeechSettings, evaluate
from higgstune.evaluation.judges import AUTO, judge_specs, load_judges
from higgstune.evaluation.report.compare import Comparison, Contender, system_names, write_comparison
from higgstune.evaluation.report.measures import System
from higgstune.evaluation.report.players import Item, Section, badness, take_of
from higgstune.evaluation.report.run_report import evaluations_of, facts_of
from higgstune.evaluation.score import compare as differences_of
from higgstune.evaluation.test_sets import VALIDATION
from higgstune.files import write_file
from higgstune.inputs import ADAPTER, BASE, CLIPS, RUN_STATE, BaseSpec, find_adapter, find_run, kind_of
from higgstune.metrics import METRICS, SIGNIFICANT, Difference, Evaluation
from higgstune.model.adapter_folder import adapter_card, adapter_conditioning, stores_of_card
from higgstune.progress import Progress

_MAX_TEXTS = 40  # with players
_RANK_WITHOUT_JUDGES = "-abs(duration_ratio - 1)"


@dataclass(frozen=True)
class ComparisonResult:
    """The result of `compare`, by the systems' names, in the order in which they were given."""

    evaluations: dict[str, Evaluation]
    settings: dict[str, SpeechSettings | None]  # None: an external folder of clips
    differences: dict[str, dict[str, Difference]]  # every system but the first minus the first, by metric
    best: str | None  # None: several are equal by the rule
    rule: str
    choice: Choice
    page: Path

    @property
    def conclusion(self) -> str:
        """Which system is best, in words, and how certain that is."""
        equal = [name for index, name in enumerate(self.evaluations) if self.choice.is_as_good(index)]
        text = f"{self.best} ({self.rule})" if self.best else f"none of {', '.join(equal)}: equal ({self.rule})"
        if broken := self.choice.broken[self.choice.best]:
            text += f"; it does not meet {', '.join(broken)}, and no other breaks less"
        differences = [one for found in self.differences.values() for one in found.values()]
        if not any(difference.p_holm < SIGNIFICANT for difference in differences):
            text += "; no measure differs clearly"
        return text

    def as_json(self) -> dict[str, Any]:
        """Everything except the rows of the clips."""
        return {
            "systems": {
                name: found.without_clips() | {"settings": None if settings is None else asdict(settings)}
                for (name, found), settings in zip(self.evaluations.items(), self.settings.values(), strict=True)
            },
            "differences": {
                name: {metric: asdict(difference) for metric, difference in found.items()}
                for name, found in self.differences.items()
            },
            "best": self.best,
            "conclusion": self.conclusion,
            "rule": self.rule,
            "broken": dict(zip(self.evaluations, self.choice.broken, strict=True)),
            "page": str(self.page),
        }


@dataclass(frozen=True)
class _System:
    """A run, an adapter, a base or a folder of clips, evaluated."""

    target: Path
    evaluation: Evaluation
    settings: SpeechSettings | None
    clips: dict[str, Clip]  # by id
    recordings: dict[str, Clip]
    facts: dict[str, str]
    stages: dict[str, Any]


def compare(
    targets: Sequence[str | Path],
    *,
    out: str | Path,
    texts: str = VALIDATION,
    data: str | Path | None = None,
    gates: Sequence[str] | None = None,
    rank: str | None = None,
    base: BaseSpec = BaseSpec(),
    whisper: str | Path | None = None,
    asr: str | None = None,
    speaker_judge: str | None = AUTO,
    quality_judge: str | None = None,
    temperature: float | None = None,
    seed: int = 0,
    limit: int | None = None,
    language: str | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> ComparisonResult:
    """Evaluate two or more runs, adapters, bases or folders of clips on the same texts, and write a page into `out`.

        compare(["runs/a", "runs/b"], out="runs/compared", asr="large-v3").best

    The others are compared with the first one. `gates` and `rank` decide which is best (see `choice.Rule`); `command`
    is shown on the page. `out` is a folder; as in `evaluate`, it keeps the speech. `base` applies to every
    base, `whisper` to the adapters that were trained with Whisper.

    Raises as `evaluate`, and DataError if systems did not speak the same texts.
    """
    names = system_names([Path(target) for target in targets])
    places = [find_run(target) for target in targets]
    check_rules(gates, rank, judge_specs(asr, speaker_judge, quality_judge))
    with_whisper = [_uses_whisper(place) for place in places]
    if whisper is not None and not any(with_whisper):
        raise ConfigError("--whisper has no effect: no adapter here was trained with Whisper")
    for place in places:
        check_target(place, base)
    judges = load_judges(asr, speaker_judge, quality_judge, device=str(choose_device(base.device)))
    if data is None:  # one store for all: its rows are spoken, and clips are compared with its voices
        found_store = _store_of(places)
        if texts == VALIDATION or (found_store is not None and Path(found_store).exists()):
            data = found_store
    out = Path(out)
    systems = {}
    for name, place, uses_whisper in zip(names, places, with_whisper, strict=True):
        found = evaluate(
            place, texts=texts, out=out / name, data=data, base=base, with_base=False,
            whisper=whisper if uses_whisper else None, judges=judges, temperature=temperature, seed=seed, limit=limit,
            language=language, batch_size=batch_size, progress=_named_progress(name, progress),
        )  # fmt: skip
        systems[name] = _system(place, found)
    evaluations = {name: system.evaluation for name, system in systems.items()}
    differences = _differences(evaluations, seed)
    rule, choice = _choose(evaluations, gates, rank)
    page = out / "compare.html"
    best = names[choice.best] if sum(map(choice.is_as_good, range(len(names)))) == 1 else None
    settings = {name: system.settings for name, system in systems.items()}
    result = ComparisonResult(evaluations, settings, differences, best, str(rule), choice, page)
    write_comparison(_page(systems, result, texts, seed, command), page)
    write_file(out / "compare.json", json.dumps(result.as_json(), indent=1, ensure_ascii=False) + "\n")
    return result


def _uses_whisper(place: Path) -> bool:
    """Whether it is an adapter that encodes references with Whisper; a base names its own Whisper."""
    return kind_of(place) == ADAPTER and adapter_conditioning(find_adapter(place)).whisper is not None


def _named_progress(name: str, progress: Progress | None) -> Progress | None:
    """Progress whose stages begin with a system's name."""
    return None if progress is None else lambda what, done, total: progress(f"{name}: {what}", done, total)


def _store_of(places: Sequence[Path]) -> str | None:
    """The store that the first of the runs was trained on: all systems speak its rows."""
    for place in places:
        if (place / RUN_STATE).is_file():
            state = read_json(place / RUN_STATE, "")
            if "adapter" in state:
                stores = stores_of_card(adapter_card(place / state["adapter"]))
                return next((str(store) for store in stores if store.exists()), str(stores[0]) if stores else None)
    return None


def _system(target: Path, found: EvaluationResult) -> _System:
    measured = found.texts
    name = next(name for name in reversed(measured.systems) if name != RECORDINGS)
    state = read_json(target / RUN_STATE, "") if (target / RUN_STATE).is_file() else {"stages": {}}
    card = {} if found.adapter is None else adapter_card(found.adapter)
    return _System(
        target,
        measured.systems[name],
        found.settings,
        {clip.id: clip for clip in measured.clips[name]},
        {clip.id: clip for clip in measured.clips.get(RECORDINGS, [])},
        {"folder": str(target), **facts_of(card, state["stages"])} if name != BASE else {"folder": str(target)},
        state["stages"],
    )


def _differences(evaluations: dict[str, Evaluation], seed: int) -> dict[str, dict[str, Difference]]:
    """Of every system but the first, from the first."""
    (name_of_first, first), *others = evaluations.items()
    differences = {}
    for name, evaluation in others:
        try:
            differences[name] = differences_of(first, evaluation, seed=seed)
        except DataError as error:
            raise DataError(f"{name_of_first} and {name}: {error}") from error
    return differences


def _choose(evaluations: dict[str, Evaluation], gates: Sequence[str] | None, rank: str | None) -> tuple[Rule, Choice]:
    measures = [{name: estimate.value for name, estimate in found.summary.items()} for found in evaluations.values()]
    measured = [metric.name for metric in METRICS if all(metric.name in found for found in measures)]
    if rank is None and not {"wer", "similarity"} & set(measured):
        rank = _RANK_WITHOUT_JUDGES
    rule = Rule.of(gates, rank, measured, clips=min(len(found.clips) for found in evaluations.values()))
    return rule, choose(measures, rule)


def _page(
    systems: dict[str, _System], result: ComparisonResult, texts: str, seed: int, command: Sequence[str]
) -> Comparison:
    first = next(iter(systems.values()))
    contenders = [
        Contender(
            System(name, system.evaluation.summary, result.differences.get(name, {})),
            facts=system.facts,
            histories={stage: found["history"] for stage, found in system.stages.items()},
            evaluations=evaluations_of(system.stages),
            confusion=system.evaluation.confusion,
        )
        for name, system in systems.items()
    ]
    all_spoken_here = all(kind_of(system.target) != CLIPS for system in systems.values())
    origin = f"The same texts ({texts}), voices and seeds." if all_spoken_here else "Clips of the same texts."
    return Comparison(
        title=" or ".join(systems) if len(systems) == 2 else f"{len(systems)} systems",
        introduction=f"{origin} Best: {result.conclusion}.",
        contenders=contenders,
        sections=[_section(systems)],
        measures_note="A difference covers the clips that both systems have measured, a column all clips of its own.",
        judges=first.evaluation.judges,
        not_measured=first.evaluation.not_measured,
        commands=[("compare again", shlex.join(command))] if command else [],
        seed=seed,
    )


def _section(systems: dict[str, _System]) -> Section:
    """Every text that all systems have spoken, the worst first."""
    rows = {name: {row["id"]: row for row in system.evaluation.clips} for name, system in systems.items()}
    shared = [str(key) for key in next(iter(rows.values())) if all(key in found for found in rows.values())]
    shared.sort(key=lambda key: max(badness(found[key]) for found in rows.values()), reverse=True)
    recordings = next(iter(systems.values())).recordings
    items = []
    for key in shared[:_MAX_TEXTS]:
        takes = [take_of(rows[name][key], system.clips[key].file) for name, system in systems.items()]
        recording = [take_of({}, recordings[key].file) if key in recordings else None] if recordings else []
        row = next(iter(rows.values()))[key]
        language = row.get("language")
        items.append(Item(str(row["text"]), [*recording, *takes], language=None if language is None else str(language)))
    note = f"The {len(items)} of {len(shared)} texts with the worst results." if len(items) < len(shared) else ""
    return Section("All systems", [*(["recording"] if recordings else []), *systems], items, note)
