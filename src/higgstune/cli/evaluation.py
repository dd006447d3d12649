"""The verbs `evaluate` and `compare`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from higgstune.cli.options import (
    TEXTS,
    AsrOption,
    BaseOption,
    CodecOption,
    DeviceOption,
    JsonOption,
    LanguageOption,
    LimitOption,
    QualityOption,
    QuantizeOption,
    RowsOption,
    SeedOption,
    SetOption,
    SpeakerOption,
    TemperatureOption,
    WhisperOption,
    base_spec,
    path,
)
from higgstune.cli.output import Bar, announced, command_line, print_measures, print_next, print_result
from higgstune.errors import ConfigError
from higgstune.files import check_folder
from higgstune.inputs import CLIPS, BaseSpec, check_store, find_run, is_unusable_run, kind_of

_VALIDATION = "validation"
_BEST = "Which is best"


def evaluate(
    target: Annotated[
        Path,
        typer.Argument(parser=path, help="Folder of a run or an adapter; a base; a folder of clips with their texts."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FOLDER", help="For speech and results; default: the run's folder."),
    ] = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Do not measure the base as well.")] = False,
    texts: SetOption = _VALIDATION,
    guard: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SET",
            help="Another set, which must not get worse; may be repeated.",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    data: RowsOption = None,
    limit: LimitOption = None,
    language: LanguageOption = None,
    asr: AsrOption = None,
    speaker_judge: SpeakerOption = "auto",
    quality_judge: QualityOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = 0,
    model: BaseOption = None,
    codec: CodecOption = None,
    whisper: WhisperOption = None,
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Speak a set of texts with an adapter and its base, measure both, and write a report.

    A repeated command reuses what was spoken and judged before.
    """
    target = find_run(target)
    if kind_of(target) == CLIPS and (texts != _VALIDATION or guard or limit is not None or data is not None):
        raise ConfigError(
            f"{target} is a folder of clips, which are measured as they are: no --set, --guard, --limit, --data"
        )
    if guard and no_base:
        raise ConfigError("--guard compares with the base: leave out --no-base")
    spec = base_spec(model, codec=codec, device=device, quantize=quantize)
    _check([target], [texts, *(guard or [])], data, out, spec)
    from higgstune.evaluation.judges import judge_specs

    judge_specs(asr, speaker_judge, quality_judge)
    with announced("loading models and judges", as_json):
        from higgstune.evaluation.evaluate import evaluate as run
        from higgstune.evaluation.report.run_report import write_target_report

    with Bar() as bar:
        result = run(
            target,
            texts=texts,
            guard=guard or [],
            out=out,
            data=data,
            with_base=not no_base,
            asr=asr,
            speaker_judge=speaker_judge,
            quality_judge=quality_judge,
            temperature=temperature,
            seed=seed,
            limit=limit,
            language=language,
            base=spec,
            whisper=whisper,
            progress=bar,
        )
    report = write_target_report(result, target, command_line())
    if as_json:
        print_result(result.as_json() | {"report": str(report)}, as_json)
    else:
        print_measures(result.texts.systems, result.texts.differences)
        compared = [("against the base", result.texts)] if result.texts.differences else []
        compared += [(f"guard {guarded.name}", guarded) for guarded in result.guard]
        conclusions = {what: found.conclusion for what, found in compared}
        print_result({**conclusions, "report": str(report)}, as_json)
        if result.adapter is not None and not is_unusable_run(target):
            print_next("higgstune", "export", str(target), "--out", f"models/{target.resolve().name}")


def compare(
    targets: Annotated[
        list[Path],
        typer.Argument(parser=path, help="Runs, adapters, bases or folders of clips; the first is compared with."),
    ],
    out: Annotated[Path, typer.Option(parser=path, metavar="FOLDER", help="For the page, speech and results.")],
    texts: SetOption = _VALIDATION,
    data: RowsOption = None,
    limit: LimitOption = None,
    language: LanguageOption = None,
    asr: AsrOption = None,
    speaker_judge: SpeakerOption = "auto",
    quality_judge: QualityOption = None,
    gates: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            metavar="RULE",
            help='Condition of the best one, such as "wer <= 0.1"; may be repeated.',
            rich_help_panel=_BEST,
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(metavar="RULE", help='Rank by this, such as "similarity - wer".', rich_help_panel=_BEST),
    ] = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = 0,
    whisper: WhisperOption = None,
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let runs speak the same texts with the same seeds: one table, and a page with players and a blind test."""
    from higgstune.evaluation.choice import check_rules
    from higgstune.evaluation.judges import judge_specs
    from higgstune.evaluation.report.compare import system_names

    system_names(targets)
    spec = base_spec(device=device, quantize=quantize)
    _check(targets, [texts], data, out, spec)
    check_rules(gates, rank, judge_specs(asr, speaker_judge, quality_judge))
    with announced("loading models and judges", as_json):
        from higgstune.evaluation.compare import compare as run

    with Bar() as bar:
        result = run(
            targets,
            out=out,
            texts=texts,
            data=data,
            gates=gates,
            rank=rank,
            asr=asr,
            speaker_judge=speaker_judge,
            quality_judge=quality_judge,
            temperature=temperature,
            seed=seed,
            limit=limit,
            language=language,
            base=spec,
            whisper=whisper,
            progress=bar,
            command=command_line(),
        )
    if as_json:
        print_result(result.as_json(), as_json)
    else:
        last = list(result.differences)[-1]
        print_measures(result.evaluations, result.differences[last] if len(result.differences) == 1 else {})
        print_result({"best": result.conclusion, "report": str(result.page)}, as_json)


def _check(targets: Sequence[Path], sets: Sequence[str], data: Path | None, out: Path | None, base: BaseSpec) -> None:
    """Refuse what needs no model to be refused."""
    from higgstune.evaluation.clips import check_target
    from higgstune.evaluation.test_sets import read_sentences

    for target in targets:
        check_target(target, base)
    if data is not None:
        check_store(data)
    if out is not None:
        check_folder(out)
    for name in sets:
        if name != _VALIDATION:
            read_sentences(name)
