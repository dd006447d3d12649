"""The demo's report: its facts, measures and clips."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from higgstune.data.store import CodeStore
from higgstune.demo.measure import Measurement
from higgstune.evaluation.report.page import Item, RunReport, Section, Table, Take, write_report
from higgstune.training.run_dir import RunResult

_COLUMNS = {
    "original": "original",
    "round trip": "codec round trip",
    "base": "before: the base",
    "adapted": "after: with the adapter",
}
_INTRODUCTION = (
    "A 10-million-parameter base with Higgs Audio's architecture, trained on one synthetic voice, was taught another "
    "with LoRA in two stages. It speaks through a codec fitted in a minute, which sounds rough: listen to the round "
    "trip, which is the best possible result. It learns the sentences of its training set, and hardly reads others."
)


def write_page(
    out: Path,
    run: RunResult,
    store: CodeStore,
    spoken: Mapping[str, Sequence[Path]],
    texts: Sequence[str],
    trained: int,
    measurement: Measurement | None,
    seconds: Mapping[str, float],
) -> Path:
    """Write `report.html`. `spoken` has a file for each text in each column; the first `trained` were trained on."""
    clips = [Item(text, [Take(spoken[name][i]) for name in _COLUMNS]) for i, text in enumerate(texts)]
    path = out / "report.html"
    write_report(
        RunReport(
            title="A miniature learns a voice",
            introduction=_INTRODUCTION,
            facts=_facts(run, store),
            verdicts={name: stage.verdict for name, stage in run.stages.items() if stage.verdict is not None},
            histories={name: stage.history for name, stage in run.stages.items()},
            sections=[
                Section("Sentences it was trained on", list(_COLUMNS.values()), clips[:trained]),
                Section("Sentences it has never seen", list(_COLUMNS.values()), clips[trained:]),
            ],
            tables=_measures(measurement),
            measures_note="" if measurement else "Not measured: no judge was named (--asr, --speaker-judge).",
            timings=seconds,
        ),
        path,
    )
    return path


def _facts(run: RunResult, store: CodeStore) -> dict[str, str]:
    rows, minutes = store.info.rows, 60 * store.info.hours["train"]
    facts = {"data": f"{rows['train']} clips ({minutes:.1f} min) for training, {rows['validation']} for validation"}
    for name, stage in run.stages.items():
        parameters = f"{stage.parameters:,} LoRA parameters in {stage.layers} layers"
        facts[name] = f"{stage.kind}: {stage.steps} steps, {parameters}"
        proof = stage.verification
        facts[f"{name}, as saved"] = (
            f"reloaded by a fresh process, {proof.from_trained:.1e} from the trained model's logits and "
            f"{proof.from_base:.1f} from the base's"
        )
    return facts


def _measures(measurement: Measurement | None) -> list[Table]:
    if measurement is None:
        return []
    judges = list(measurement.rows[0].similarity)
    columns = ["clips", "number", "word error rate", *(f"similarity ({judge})" for judge in judges)]
    rows = [
        [
            row.name,
            str(row.clips),
            None if row.error_rate is None else f"{100 * row.error_rate:.1f} %",
            *(f"{row.similarity[judge]:.3f}" for judge in judges),
        ]
        for row in measurement.rows
    ]
    return [Table("Measures by kind of clip", columns, rows, _note(measurement))]


def _note(measurement: Measurement) -> str:
    bars = (
        f"{bar.name} {bar.value:.3f} ({bar.condition}): {'holds' if bar.holds else 'BROKEN'}"
        for bar in measurement.bars
    )
    return f"Judged by {measurement.judges}. {'; '.join(bars)}."
