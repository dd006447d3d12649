"""A run's report: one self-contained HTML page with the run's facts, measures, curves and clips."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from higgstune.evaluation.report.curves import History, codebooks_figure, evaluations_figure, losses_figure
from higgstune.evaluation.report.measures import (
    Change,
    ChangeRow,
    System,
    change_rows,
    changes_of,
    glances,
    metric_of,
    metric_rows,
    value_text,
)
from higgstune.evaluation.report.players import Item, Section, Take, has_transcripts, item_view, section_view
from higgstune.evaluation.verdict import Verdict
from higgstune.files import write_file
from higgstune.metrics import NOT_MEASURED

if TYPE_CHECKING:
    import jinja2

__all__ = ["Candidate", "Change", "Choice", "Item", "RunReport", "Section", "System", "Table", "Take", "write_report"]


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that could have been chosen: its metrics by name, and the gates of the rule that it failed."""

    stage: str
    step: int
    values: Mapping[str, float | None]
    failed: Sequence[str] = ()  # gates
    chosen: bool = False


@dataclass(frozen=True)
class Choice:
    """Which checkpoint was chosen, by which rule, and why."""

    checkpoint: str
    reason: str
    rule: str
    candidates: Sequence[Candidate] = ()


@dataclass(frozen=True)
class Table:
    """Any other table; the first cell of each row is its heading."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | None]]  # None: not measured
    note: str = ""


@dataclass(frozen=True)
class RunReport:
    """The contents of the page; empty parts are left out."""

    title: str
    introduction: str
    facts: Mapping[str, str]  # about base, data, adapter, stages
    histories: Mapping[str, History] = field(default_factory=dict)  # the trainer's log, by stage
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)  # by stage, at the head of the page
    evaluations: Mapping[str, History] = field(default_factory=dict)  # metrics by step during training, by stage
    choice: Choice | None = None
    systems: Sequence[System] = ()  # columns of the table of metrics: recordings, base, adapter
    measures_note: str = ""
    judges: Mapping[str, str] = field(default_factory=dict)  # by role: name and version
    not_measured: Mapping[str, str] = field(default_factory=dict)  # by metric: why
    guard: Sequence[Change] | None = None  # of what must not get worse; None: no guard set
    guard_conclusion: str = ""
    guard_note: str = ""
    sections: Sequence[Section] = ()
    tables: Sequence[Table] = ()
    environment: Mapping[str, str] = field(default_factory=dict)  # versions, device
    commands: Sequence[tuple[str, str]] = ()  # purpose and command
    timings: Mapping[str, float] = field(default_factory=dict)  # seconds
    showcase: Item | None = None  # one text, before and after, at the head of the page


def write_report(report: RunReport, path: Path) -> None:
    """Write the page. Raises DataError for a clip that cannot be read, WorkError if the disk refuses."""
    sections = [section_view(section, f"clips{i}") for i, section in enumerate(report.sections)]
    showcase = None if report.showcase is None else item_view(report.showcase, ("before", "after"), "showcase")
    template = pages().get_template("report.html.jinja")
    page = template.render(
        report=report,
        tables=[(f"table{i}", table.title) for i, table in enumerate(report.tables)],
        glances=glances(report.systems),
        metrics=metric_rows(report.systems),
        differences=_differences(report.systems),
        not_measured=unmeasured(report.not_measured),
        changes=None if report.guard is None else change_rows(report.guard),
        candidates=_candidates(report.choice),
        sections=sections,
        showcase=showcase,
        has_transcripts=has_transcripts(report.sections),
        losses=losses_figure(report.histories),
        codebooks=codebooks_figure(report.histories),
        evaluations=evaluations_figure(report.evaluations, _chosen(report.choice)),
    )
    write_file(path, page)


def _differences(systems: Sequence[System]) -> list[ChangeRow]:
    """Differences of the last system from the one before it."""
    return change_rows(changes_of(systems[-2], systems[-1])) if len(systems) > 1 and systems[-1].differences else []


def pages() -> "jinja2.Environment":
    """The templates of the pages, which escape all values and raise an error for an unknown name."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("higgstune.evaluation.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    return environment


def unmeasured(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """Label and reason of each metric that was not measured, in the given order."""
    return [(metric_of(name).label, why) for name, why in reasons.items()]


def duration(seconds: float) -> str:
    """Seconds as text: 3.1 s, 2 min 5 s, 1 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _chosen(choice: Choice | None) -> tuple[str, int] | None:
    return next(((c.stage, c.step) for c in choice.candidates if c.chosen), None) if choice is not None else None


def _candidates(choice: Choice | None) -> dict[str, Any] | None:
    """The table of the candidates, with a column for each metric that any of them has."""
    if choice is None or not choice.candidates:
        return None
    names = list(dict.fromkeys(name for candidate in choice.candidates for name in candidate.values))
    rows = [
        {
            "name": f"{candidate.stage}, step {candidate.step}",
            "chosen": candidate.chosen,
            "values": [value_text(name, candidate.values.get(name)) for name in names],
            "gates": "; ".join(candidate.failed) or "passed",
        }
        for candidate in choice.candidates
    ]
    return {"columns": [metric_of(name).label for name in names], "rows": rows, "missing": NOT_MEASURED}
