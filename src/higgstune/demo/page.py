"""The demo's report: what was learned, in a sentence and as clips, then measures, facts and commands."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from higgstune.data.store import CodeStore
from higgstune.demo.measure import Clips, Measurement, Row
from higgstune.evaluation.report.page import Item, RunReport, Section, Table, Take, write_report
from higgstune.training.run_dir import RunResult

COLUMNS = {"recording": "recording", "round trip": "through the codec", "before": "before", "after": "after"}
_NOTE = (
    "None of these sentences was trained on. Before, the miniature reads any sentence of its 900 words, in its own "
    "voice. After a few minutes of another voice it has that voice, and reads worse in it. The recording through the "
    "codec is the best that can be reached."
)


@dataclass(frozen=True)
class Story:
    """What the page is about: the clips of each kind have the same texts, in the same order."""

    run: RunResult
    store: CodeStore
    spoken: Sequence[Clips]
    measurement: Measurement | None
    seconds: Mapping[str, float]

    @property
    def minutes(self) -> float:
        """Of the recordings that were learned from."""
        return 60 * sum(self.store.info.hours.values())

    @property
    def lesson(self) -> str:
        """What was learned, in a sentence with its figures."""
        if not self.run.usable:
            return "The miniature did not learn the voice: the verdict says why."
        learned = (
            f"From {self.minutes:.1f} minutes of recordings and {self.seconds['train'] / 60:.1f} minutes of training "
            "on one core, the miniature learned a second voice"
        )
        if self.measurement is None:
            return f"{learned}. It says new sentences in it, not always with the right words."
        rows = {row.name: row for row in self.measurement.rows}
        figures = [
            f"similarity to it ({judge}) {rows['before'].similarity[judge]:.2f} before, {value:.2f} after"
            for judge, value in rows["after"].similarity.items()
        ]
        if rows["after"].error_rate is not None:
            wrong = [f"{100 * (rows[name].error_rate or 0):.0f} % {name}" for name in ("before", "after")]
            figures.append(f"wrong words in new sentences {', '.join(wrong)}")
        return f"{learned}: {'; '.join(figures)}."


def write_page(out: Path, story: Story) -> Path:
    """Write `report.html`."""
    path = out / "report.html"
    clips = {found.name: found for found in story.spoken if found.name in COLUMNS}
    texts = clips["after"].texts
    items = [Item(text, [Take(found.files[i]) for found in clips.values()]) for i, text in enumerate(texts)]
    write_report(
        RunReport(
            title="A miniature learns a voice",
            introduction=story.lesson,
            showcase=Item(texts[0], [Take(clips[name].files[0]) for name in ("before", "after")]),
            facts=_facts(story),
            verdicts={name: stage.verdict for name, stage in story.run.stages.items() if stage.verdict is not None},
            histories={name: stage.history for name, stage in story.run.stages.items()},
            sections=[Section("New sentences", list(COLUMNS.values()), items, _NOTE)],
            tables=_measures(story.measurement),
            commands=next_commands(out, texts[0]),
            timings=story.seconds,
        ),
        path,
    )
    return path


def next_commands(out: Path, text: str) -> list[tuple[str, str]]:
    """Purpose and command: what to try next, as it can be typed in the folder where the demo ran."""
    return [
        ("Let it say something", _typed("speak", text, "--adapter", out, "--out", "speech.wav")),
        ("Compare it with its base, in figures", _typed("evaluate", out)),
        ("Merge it into a checkpoint of its own", _typed("export", out, "--out", out.parent / "demo-model")),
        ("Repeat the demo", _typed("demo", "--out", out.with_name(f"{out.name}-2"))),
    ]


def _typed(*words: str | Path) -> str:
    return shlex.join(["higgstune", *map(str, words)])


def _facts(story: Story) -> dict[str, str]:
    rows = story.store.info.rows
    facts = {
        "base": "a miniature of Higgs Audio v2, 12 million parameters, trained on synthetic speech",
        "recordings": f"{rows['train']} clips for training, {rows['validation']} for validation, "
        f"{story.minutes:.1f} minutes in all",
    }
    for name, stage in story.run.stages.items():
        facts[name] = f"{stage.steps} steps, {stage.parameters:,} LoRA parameters in {stage.layers} layers"
    facts["the adapter on disk"] = "read again by another process, which got the same output"
    return facts


def _measures(measurement: Measurement | None) -> list[Table]:
    if measurement is None:
        return []
    judges = list(measurement.rows[0].similarity)
    measured = measurement.rows[0].error_rate is not None
    columns = ["clips", "number", *(["word error rate"] if measured else []), "stop in time"]
    columns += [f"similarity ({judge})" for judge in judges]
    rows = [[row.name, str(row.clips), *_values(row, judges, measured)] for row in measurement.rows]
    return [Table("Measures", columns, rows, _note(measurement))]


def _values(row: Row, judges: Sequence[str], measured: bool) -> list[str]:
    rate = [f"{100 * (row.error_rate or 0):.1f} %"] if measured else []
    stopped = "recorded" if row.stopped is None else f"{100 * row.stopped:.0f} %"
    return [*rate, stopped, *(f"{row.similarity[judge]:.3f}" for judge in judges)]


def _note(measurement: Measurement) -> str:
    bars = (
        f"{bar.name} {bar.value:.3f} ({bar.condition}): {'holds' if bar.holds else 'BROKEN'}"
        for bar in measurement.bars
    )
    return (
        f"Judged by {measurement.judges}. Two controls must fail: texts swapped between sentences, and an adapter of "
        f"zeros. The bars: {'; '.join(bars)}."
    )
