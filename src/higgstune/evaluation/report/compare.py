"""The page that compares systems: metrics, differences, curves, clips side by side, and a blind test."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

from higgstune.errors import ConfigError
from higgstune.evaluation.report.curves import History, overlaid_evaluations, overlaid_losses
from higgstune.evaluation.report.measures import System, change_rows, changes_of, metric_rows
from higgstune.evaluation.report.page import Table, pages, unmeasured
from higgstune.evaluation.report.players import Section, has_transcripts, section_view
from higgstune.files import write_file
from higgstune.metrics import Confusion

_LABELS = "ABCDEFGH"  # of the systems in the blind test


@dataclass(frozen=True)
class Contender:
    """One of the systems that are compared."""

    system: System  # with its differences from the first one
    facts: Mapping[str, str] = field(default_factory=dict)
    histories: Mapping[str, History] = field(default_factory=dict)  # the trainer's log, by stage
    evaluations: Mapping[str, History] = field(default_factory=dict)  # metrics by step during training, by stage
    confusion: Confusion | None = None


@dataclass(frozen=True)
class Comparison:
    """The contents of the page. The blind test takes the columns named like a system, and shuffles them by `seed`."""

    title: str
    introduction: str
    contenders: Sequence[Contender]
    sections: Sequence[Section] = ()
    measures_note: str = ""
    judges: Mapping[str, str] = field(default_factory=dict)
    not_measured: Mapping[str, str] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    commands: Sequence[tuple[str, str]] = ()
    seed: int = 0
    question: str = "Which one sounds best?"


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page. Raises ConfigError if two systems have one name or there are too many.

    Raises DataError for a clip that cannot be read, WorkError if the disk refuses.
    """
    systems = [contender.system for contender in comparison.contenders]
    _check(systems)
    sections = [section_view(section, f"clips{i}") for i, section in enumerate(comparison.sections)]
    by_name = {contender.system.name: contender for contender in comparison.contenders}
    template = pages().get_template("compare.html.jinja")
    page = template.render(
        comparison=comparison,
        systems=systems,
        tables=[(f"table{i}", table.title) for i, table in enumerate(comparison.tables)],
        has_transcripts=has_transcripts(comparison.sections),
        metrics=metric_rows(systems),
        not_measured=unmeasured(comparison.not_measured),
        differences=[
            (system.name, change_rows(changes_of(systems[0], system))) for system in systems[1:] if system.differences
        ],
        losses=overlaid_losses({name: contender.histories for name, contender in by_name.items()}),
        evaluations=overlaid_evaluations({name: contender.evaluations for name, contender in by_name.items()}),
        confusions=[(name, c.confusion) for name, c in by_name.items() if c.confusion is not None],
        sections=sections,
        blind=blind_test(comparison, sections),
    )
    write_file(path, page)


def blind_test(comparison: Comparison, sections: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The sets of the blind test as the page's script reads them; None if no text has two clips to compare.

    `sections` are views with the ids of the players. Each set is one text: the systems' clips in a shuffled order, with
    every order used equally often as far as their number allows. `key` ties saved votes to this test.
    """
    names = [contender.system.name for contender in comparison.contenders]
    sets = []
    for section in sections:
        for view in [*section["items"], *section["folded"]]:
            takes = [
                {"system": names.index(take["column"]), "audio": take["id"]}
                for take in view["takes"]
                if take is not None and take["column"] in names
            ]
            if len(takes) > 1:
                sets.append({"text": view["item"].text, "language": view["item"].language or "", "takes": takes})
    if not sets:
        return None
    _shuffle(sets, comparison.seed)
    content = json.dumps([names, sets, _clips_of(sections)], ensure_ascii=False)
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    return {"key": key, "systems": names, "sets": sets, "labels": _LABELS, "seed": comparison.seed}


def system_names(places: Sequence[Path]) -> list[str]:
    """Names of systems: the folders' names, with their parents' names if two are the same.

    Raises ConfigError for fewer than two systems, for more than a page can show, and for one folder given twice.
    """
    _check_number(len(places))
    for depth in range(1, 5):
        names = ["-".join(place.resolve().parts[-depth:]) for place in places]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"one folder is given twice: {', '.join(map(str, places))}")


def _check_number(systems: int) -> None:
    if not 2 <= systems <= len(_LABELS):
        raise ConfigError(f"{systems} systems cannot be compared on a page: give 2 to {len(_LABELS)}")


def _check(systems: Sequence[System]) -> None:
    names = [system.name for system in systems]
    if len(set(names)) < len(names):
        raise ConfigError(f"two systems have one name: {', '.join(names)}: give each its own")
    _check_number(len(names))


def _clips_of(sections: Sequence[Mapping[str, Any]]) -> list[str]:
    views = [view for section in sections for view in (*section["items"], *section["folded"])]
    return [hashlib.sha256(take["url"].encode()).hexdigest() for view in views for take in view["takes"] if take]


def _shuffle(sets: list[dict[str, Any]], seed: int) -> None:
    """Shuffle the sets, and the takes of each so that every system stands first equally often."""
    draw = random.Random(seed)
    draw.shuffle(sets)
    orders: dict[int, list[tuple[int, ...]]] = {}  # by number of takes: orders that are not used yet
    for entry in sets:
        count = len(entry["takes"])
        if not orders.get(count):
            orders[count] = list(permutations(range(count))) if count <= 5 else [tuple(range(count))]
            draw.shuffle(orders[count])
        order = list(orders[count].pop())
        if count > 5:  # too many orders to use each
            draw.shuffle(order)
        entry["takes"] = [entry["takes"][i] for i in order]
