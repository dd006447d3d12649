"""The command `higgstune`: one verb a function of the package, with the same options."""

import dataclasses
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from higgstune.cli.options import (
    AsrOption,
    BaseOption,
    CodecOption,
    CompareOption,
    DeviceOption,
    DropOption,
    EncoderOption,
    JsonOption,
    LanguageOption,
    LimitOption,
    NewFolderOption,
    QualityOption,
    QuantizeOption,
    RevisionOption,
    RowsOption,
    RunArgument,
    SeedOption,
    SetOption,
    SpeakerOption,
    StoredOption,
    TemperatureOption,
    WhisperOption,
)
from higgstune.cli.output import (
    Bar,
    command_line,
    errors,
    escape,
    measured,
    print_measures,
    print_result,
    told_stage,
)
from higgstune.errors import ConfigError, HiggstuneError, Interrupted, WorkError

# Modules that bring torch are imported by the verb that needs them: `--help` answers at once.

app = typer.Typer(
    name="higgstune",
    help="Fine-tune Higgs Audio v2 on your own recordings: from a folder of audio to a voice that speaks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> NoReturn:
    """Run a verb; exit 0 when done, 1 when the work failed, 2 when the user's input is wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # It is about kernels from a hub, for CPUs and 4 bits, and is said by every command that imports peft.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars, too: lines, not bars, in a log
    signal.signal(signal.SIGTERM, _end)
    try:
        app()
    except (HiggstuneError, OSError) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher that ends the others must not cut the message off
        _tell_launcher(error)
        rank = os.environ.get("RANK")
        who = "" if rank is None else f" in process {rank}"
        errors.print(f"[bold red]error{who}:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(getattr(error, "exit_code", 1))
    sys.exit(0)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    """What was begun is cleaned up, where a plain SIGTERM would leave it."""
    raise Interrupted(number)


def _tell_launcher(error: Exception) -> None:
    """torchrun shows what the process that failed first has left for it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        import higgstune

        typer.echo(higgstune.__version__)
        raise typer.Exit


@app.command(epilog="Example: higgstune prepare recordings/ --out data/voice --speaker anna")
def prepare(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of audio with .txt/.lab beside each file, LJSpeech folder, .jsonl manifest, ChatML .json or "
            "metadata.json with samples."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the code store; adding to an existing one works.")],
    model: Annotated[str | None, typer.Option(help="Checkpoint that will be trained: its codec encodes.")] = None,
    codec: Annotated[str | None, typer.Option(help="Folder or hub id of another codec.")] = None,
    speaker: Annotated[str | None, typer.Option(help="Speaker of all rows.")] = None,
    language: Annotated[str | None, typer.Option(help="Language of all rows.")] = None,
    scene: Annotated[str | None, typer.Option(help="Scene description of all rows.")] = None,
    references: Annotated[
        str, typer.Option(help="none, or same_speaker: pair each clip with another one of its speaker.")
    ] = "none",
    whisper: Annotated[
        str | None, typer.Option(help="Whisper checkpoint that hears references and user audio, for model.whisper.")
    ] = None,
    validation_fraction: Annotated[float, typer.Option(help="Share of recordings kept for validation.")] = 0.05,
    max_seconds: Annotated[float, typer.Option(help="Longest clip.")] = 30.0,
    allow_long: Annotated[bool, typer.Option(help="Take longer clips, too.")] = False,
    allow_outside: Annotated[
        bool,
        typer.Option("--allow-outside", help="Take paths that leave the source's folder, too: sources you trust."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the reference pairing.")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Check recordings, encode them once, and store their codes."""
    from higgstune.data.prepare import prepare as run
    from higgstune.environment import choose_device

    with Bar() as bar:
        summary = run(
            source,
            out,
            codec=codec,
            device=str(choose_device(device)),
            model=model,
            whisper=whisper,
            validation_fraction=validation_fraction,
            references=references,  # type: ignore[arg-type]
            max_seconds=max_seconds,
            allow_long=allow_long,
            allow_outside=allow_outside,
            seed=seed,
            speaker=speaker,
            language=language,
            scene=scene,
            progress=bar,
        )
    print_result(dataclasses.asdict(summary), as_json)
    if summary.refused and not as_json:
        typer.echo(f"refused rows, with their reasons: {out / 'rejected.jsonl'}")


@app.command(epilog="Example: higgstune inspect data/voice --row 0")
def inspect(
    store: Annotated[Path, typer.Argument(help="Folder of the code store.")],
    row: Annotated[str, typer.Option(help="Number (train rows first) or id of the row.")] = "0",
    model: Annotated[str | None, typer.Option(help="Checkpoint whose tokenizer reads the text.")] = None,
    text_targets: Annotated[str, typer.Option(help="transcript, assistant or none.")] = "transcript",
    reference: Annotated[str, typer.Option(help="turn or scene, as data.reference of a recipe.")] = "turn",
    whisper: Annotated[str | None, typer.Option(help="As model.whisper of a recipe.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show one row as the model sees it: prompt, tokens, frames, labels."""
    from higgstune.diagnostics.inspect_row import inspect_row, label_table

    if text_targets not in ("transcript", "assistant", "none"):
        raise ConfigError(f"--text-targets {text_targets}: transcript, assistant or none")
    if reference not in ("turn", "scene"):
        raise ConfigError(f"--reference {reference}: turn or scene")
    found = inspect_row(
        store,
        row,
        model=model,
        text_targets=text_targets,  # type: ignore[arg-type]
        reference=reference,  # type: ignore[arg-type]
        whisper=whisper,
    )
    if as_json:
        print_result(dataclasses.asdict(found), as_json)
        return
    typer.echo(f"{found.id} ({found.split}): {found.seconds:.2f} s, {found.frames} frames\n")
    typer.echo(found.prompt + "\n")
    typer.echo(
        f"{found.positions} positions: {found.text_tokens} text tokens, {found.audio_rows} rows of audio, "
        f"{found.feature_positions} heard through Whisper; "
        f"{len(found.text_labels)} text labels, {found.audio_label_cells} audio label cells\n"
    )
    typer.echo(
        "text labels (position token): " + " ".join(f"{p} {token!r}" for p, _, token in found.text_labels) + "\n"
    )
    table = Table("position", *(f"k={k}" for k in range(len(found.audio_labels[0][1]))), title="audio labels")
    for cells in label_table(found):
        table.add_row(*map(str, cells))
    Console().print(table)


@app.command(epilog="Example: higgstune train recipes/voice.yaml --out runs/voice --set data.store=data/voice")
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe in YAML; see recipes/.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, such as stages.0.learning_rate=5e-5; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on where the run stopped.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print memory, steps and time, and train nothing; exit code 1: does not fit.")
    ] = False,
    memory: Annotated[
        str | None, typer.Option(help="With --plan: what the device has, such as 16GB, in place of what is free.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="With --plan: cpu or cuda, which need not be here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train the stages of a recipe, and prove that what was saved is what was trained."""
    from higgstune.config.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if plan:
        _show_plan(loaded, memory, device, as_json)
        return
    if memory is not None or device is not None:
        raise ConfigError("--memory and --device belong to --plan; a run's device is model.device of the recipe")
    if out is None:
        raise ConfigError("give --out, the folder of the run (or --plan, which trains nothing)")
    import torch.distributed

    from higgstune.training.run import train as run

    result = run(loaded, out, resume=resume)
    stages = {
        name: {key: value for key, value in stage.as_json().items() if key != "history"}
        for name, stage in result.stages.items()
    }
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        told = {"stages": stages} if as_json else {f"stage {name}": told_stage(stage) for name, stage in stages.items()}
        print_result({"run": str(result.folder), "adapter": str(result.adapter), **told}, as_json)


def _show_plan(recipe: Any, memory: str | None, device: str | None, as_json: bool) -> None:
    from higgstune.planning.report import plan

    found = plan(recipe, memory=memory, device=device)
    if as_json:
        print_result(found.as_json(), as_json)
    else:
        table = Table("", *(f"{stage.name} ({stage.kind})" for stage in found.plan.stages))
        for row in found.rows():
            table.add_row(*row)
        Console().print(table)
        typer.echo(found.verdict())
    if found.fits is False:
        raise typer.Exit(1)


@app.command(epilog='Example: higgstune speak "Hello there." --adapter runs/voice --out hello.wav')
def speak(
    text: Annotated[str | None, typer.Argument(help="What to say.")] = None,
    out: Annotated[Path, typer.Option(help="A .wav file; with --file, a folder.")] = Path("speech.wav"),
    file: Annotated[Path | None, typer.Option(help="Text file, one clip a line.")] = None,
    model: Annotated[str | None, typer.Option(help="Base checkpoint; an adapter knows its own.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of an adapter or of a run.")] = None,
    codec: Annotated[str | None, typer.Option(help="Folder or hub id of another codec.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Recording of a voice to imitate.")] = None,
    reference_text: Annotated[str | None, typer.Option(help="What is said in it.")] = None,
    reference_place: Annotated[
        str | None, typer.Option(help="turn or scene; where not given, as the adapter was trained.")
    ] = None,
    whisper: WhisperOption = None,
    scene: Annotated[str | None, typer.Option(help="Scene description; empty for none.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option()] = 0.95,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 50,
    repeat_window: Annotated[int, typer.Option(help="Rows looked back on for repeats; 0 is off.")] = 7,
    max_repeats: Annotated[int, typer.Option(help="Repeats of a code allowed in the window.")] = 2,
    seed: Annotated[int, typer.Option(min=0, max=2**62)] = 0,
    max_seconds: Annotated[float | None, typer.Option(help="Cap of a piece; from the text's length if unset.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips spoken at a time.")] = 8,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the base at the hub.")] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quantize: QuantizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Speak a text, or each line of a file."""
    if (text is None) == (file is None):
        raise ConfigError("give either a text or --file")
    from higgstune.families.higgs_v2.prompt import DEFAULT_SCENE
    from higgstune.families.sampling import Sampling
    from higgstune.generate.speak import speak as run

    with Bar() as bar:
        said = text if text is not None else _lines(file)
        files = run(
            said,
            out,
            model=model,
            adapter=adapter,
            codec=codec,
            reference=reference,
            reference_text=reference_text,
            reference_place=reference_place,  # type: ignore[arg-type]
            whisper=whisper,
            scene=DEFAULT_SCENE if scene is None else scene or None,
            sampling=Sampling(temperature, top_k, top_p, repeat_window, max_repeats),
            seed=seed,
            max_seconds=max_seconds,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            revision=revision,
            quantize=quantize,  # type: ignore[arg-type]
            on_spoken=lambda done: bar("speaking", done, 1 if isinstance(said, str) else len(said)),
        )
    print_result({"files": [str(path) for path in files]}, as_json)


@app.command(epilog="Example: higgstune evaluate runs/voice --set validation --asr large-v3")
def evaluate(
    target: Annotated[
        Path, typer.Argument(help="Folder of a run or an adapter; a base; a folder of clips with their texts.")
    ],
    texts: SetOption = "validation",
    guard: Annotated[
        list[str] | None, typer.Option(help="A set that must not get worse, as --set; may be repeated.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for speech and results; where not given, in the run's folder.")
    ] = None,
    data: RowsOption = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Measure the base, too, to compare with.")] = True,
    asr: AsrOption = None,
    speaker_judge: SpeakerOption = "auto",
    quality_judge: QualityOption = None,
    temperature: TemperatureOption = 1.0,
    seed: SeedOption = 0,
    limit: LimitOption = None,
    language: LanguageOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips spoken at a time.")] = 8,
    model: BaseOption = None,
    codec: CodecOption = None,
    whisper: WhisperOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Speak a set of texts with an adapter and its base, measure both, and write a report.

    What was spoken or judged before is not done again: a run that was stopped goes on.
    """
    from higgstune.evaluation.evaluate import CLIPS, kind_of
    from higgstune.evaluation.evaluate import evaluate as run
    from higgstune.evaluation.report.run_report import tell
    from higgstune.families.sampling import Sampling

    if kind_of(target) == CLIPS and (texts != "validation" or guard or limit is not None or data is not None):
        raise ConfigError(
            f"{target} is a folder of clips, which are measured as they are: no --set, --guard, --limit, --data"
        )
    with Bar() as bar:
        result = run(
            target,
            texts=texts,
            guard=guard or [],
            out=out,
            data=data,
            base=base,
            asr=asr,
            speaker_judge=speaker_judge,
            quality_judge=quality_judge,
            sampling=Sampling(temperature),
            seed=seed,
            limit=limit,
            language=language,
            batch_size=batch_size,
            model=model,
            codec=codec,
            whisper=whisper,
            quantize=quantize,  # type: ignore[arg-type]
            device=None if device == "auto" else device,
            dtype=None if dtype == "auto" else dtype,
            progress=bar,
        )
    report = tell(result, target, command_line())
    if as_json:
        print_result(result.as_json() | {"report": str(report)}, as_json)
    else:
        print_measures(result.texts.systems, result.texts.differences)
        compared = [("against the base", result.texts)] if result.texts.differences else []
        compared += [(f"guard {guarded.name}", guarded) for guarded in result.guard]
        print_result({**{what: found.told for what, found in compared}, "open": str(report)}, as_json)


@app.command(epilog="Example: higgstune compare runs/one runs/two --out comparison --asr large-v3")
def compare(
    targets: Annotated[
        list[Path], typer.Argument(help="Segments, adapters, bases or folders of clips; the first is compared with.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the page, speech and results.")],
    texts: SetOption = "validation",
    data: RowsOption = None,
    gates: Annotated[
        list[str] | None,
        typer.Option("--gate", help='Condition of the best one, such as "wer <= 0.1"; may be repeated.'),
    ] = None,
    rank: Annotated[str | None, typer.Option(help='What is ranked by, such as "similarity - wer".')] = None,
    asr: AsrOption = None,
    speaker_judge: SpeakerOption = "auto",
    quality_judge: QualityOption = None,
    temperature: TemperatureOption = 1.0,
    seed: SeedOption = 0,
    limit: LimitOption = None,
    language: LanguageOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips spoken at a time.")] = 8,
    whisper: WhisperOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Let runs speak the same texts with the same seeds: one table, and a page to listen to, blind if you like."""
    from higgstune.evaluation.compare import compare as run
    from higgstune.families.sampling import Sampling

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
            sampling=Sampling(temperature),
            seed=seed,
            limit=limit,
            language=language,
            batch_size=batch_size,
            whisper=whisper,
            quantize=quantize,  # type: ignore[arg-type]
            device=None if device == "auto" else device,
            dtype=None if dtype == "auto" else dtype,
            progress=bar,
            command=command_line(),
        )
    if as_json:
        print_result(result.as_json(), as_json)
    else:
        last = list(result.differences)[-1]
        print_measures(result.evaluations, result.differences[last] if len(result.differences) == 1 else {})
        print_result({"best": result.told, "open": str(result.page)}, as_json)


@app.command(epilog="Example: higgstune merge runs/voice --out models/voice")
def merge(
    run: RunArgument,
    out: NewFolderOption,
    layout: Annotated[
        str | None,
        typer.Option(help="native, extended or original; where not given, native where nothing is lost by it."),
    ] = None,
    drop_modules: DropOption = False,
    whisper: EncoderOption = None,
    dtype: StoredOption = None,
    data: CompareOption = None,
    model: BaseOption = None,
    codec: CodecOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Merge an adapter into its base: one checkpoint, proven by loading it again."""
    from higgstune.exporting.merge import merge as run_merge

    with Bar() as bar:
        result = run_merge(
            run,
            out,
            layout=layout,
            drop_modules=drop_modules,
            whisper=whisper,
            dtype=dtype,
            data=data,
            model=model,
            codec=codec,
            revision=revision,
            device=device,
            progress=bar,
        )
    print_result(dataclasses.asdict(result), as_json)


@app.command(epilog="Example: higgstune export runs/voice --out models/voice --format native")
def export(
    run: RunArgument,
    out: NewFolderOption,
    format: Annotated[
        str, typer.Option(help="native (transformers, vLLM-Omni), boson (the original engine) or peft (adapter alone).")
    ],
    base_bits: Annotated[
        int | None, typer.Option(help="4 or 8: the card tells how to load the base so; native and peft only.")
    ] = None,
    drop_modules: DropOption = False,
    whisper: EncoderOption = None,
    dtype: StoredOption = None,
    data: CompareOption = None,
    model: BaseOption = None,
    codec: CodecOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write a run as other software loads it, with a model card."""
    from higgstune.exporting.export import export as write

    with Bar() as bar:
        result = write(
            run,
            out,
            format=format,
            base_bits=base_bits,
            drop_modules=drop_modules,
            whisper=whisper,
            dtype=dtype,
            data=data,
            model=model,
            codec=codec,
            revision=revision,
            device=device,
            progress=bar,
        )
    print_result(dataclasses.asdict(result), as_json)


@app.command(epilog="Example: higgstune doctor --adapter runs/voice --data data/voice")
def doctor(
    model: Annotated[str | None, typer.Option(help="Checkpoint: folder or hub id.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of an adapter or of a run; it names its base.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of a code store.")] = None,
    codec: Annotated[str | None, typer.Option(help="Folder or hub id of another codec.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe whose training is planned; it names the rest.")] = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Examine machine, checkpoint, codec, data and adapter: what is wrong, and what to do.

    Exits with 1 when something failed. Nothing is changed.
    """
    from higgstune import doctor as run

    report = run(
        model,
        adapter,
        data,
        codec,
        recipe,
        revision=revision,
        dtype=None if dtype == "auto" else dtype,
        device=None if device == "auto" else device,
        progress=lambda what: errors.print(f"examining {what}", highlight=False),
    )
    if as_json:
        print_result(report.to_json(), as_json)
    else:
        Console().print(report.table())
        typer.echo(", ".join(f"{count} {status}" for status, count in report.summary.items()))
    if not report.passed:
        raise typer.Exit(1)


@app.command(epilog="Example: higgstune demo --out runs/demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("runs/demo"),
    asr: AsrOption = None,
    speaker_judge: SpeakerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Teach a miniature a second voice: prepare, two stages, speak, report. No network, no GPU, a few minutes.

    With judges it measures the result, and exits with 1 when it is not good enough.
    """
    from higgstune.demo.demo import run_demo

    with Bar(live=False) as bar:  # training draws a bar of its own
        result = run_demo(out, asr=asr, speaker_judge=speaker_judge, progress=bar)
    if as_json:
        print_result(dataclasses.asdict(result), as_json)
    else:
        rows = result.measurement.rows if result.measurement else []
        figures = {row.name: measured(row.error_rate, row.similarity) for row in rows}
        bars = result.measurement.bars if result.measurement else []
        held = {bar.name: f"{bar.value:.3f} ({bar.condition}) {'holds' if bar.holds else 'BROKEN'}" for bar in bars}
        print_result({**figures, **held, "seconds": round(result.seconds), "open": str(result.report)}, as_json)
    if result.measurement is not None and not result.measurement.passed:
        broken = [bar.name for bar in result.measurement.bars if not bar.holds]
        raise WorkError(f"the demo's result is not good enough: {', '.join(broken)}; see {result.report}")


def _lines(file: Path | None) -> list[str]:
    assert file is not None
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"--file {file} cannot be read: {reason}") from error
    if not any(lines):
        raise ConfigError(f"--file {file} has no text")
    return [line for line in lines if line]


if __name__ == "__main__":
    main()
