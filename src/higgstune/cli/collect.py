"""The verb `collect`: from raw recordings to a data set of utterances."""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from higgstune.cli.options import DeviceOption, JsonOption, path, within
from higgstune.cli.output import Bar, announced, errors, many, print_next, print_result
from higgstune.data.rejection import reasons_in_words
from higgstune.errors import Interrupted
from higgstune.progress import duration

if TYPE_CHECKING:
    from higgstune.raw.collect import CollectSummary

RAW, _SCALE = "Raw recordings", "Large jobs"
_SHOWN = 5

TextAsrOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Whisper by name or folder: writes the texts, or compares those that are given.",
        rich_help_panel=RAW,
    ),
]
SpeakerModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Separates speakers: a CAM++ file, or a WavLM by folder or hub id; none: one speaker.",
        rich_help_panel=RAW,
    ),
]


def _shard(text: str | None) -> str | None:
    if text is not None and (
        (found := re.fullmatch(r"(\d+)/(\d+)", text)) is None or not 1 <= int(found[1]) <= int(found[2])
    ):
        raise typer.BadParameter(f"it must be I/N with I from 1 to N, such as 3/16, not {text}")
    return text


def _numbers(shard: str) -> tuple[int, int]:
    number, _, count = shard.partition("/")
    return int(number), int(count)


def collect(
    raw: Annotated[
        Path, typer.Argument(parser=path, help="A recording, or a folder of them: hours of talk, a book, interviews.")
    ],
    *,
    out: Annotated[
        Path, typer.Option(parser=path, metavar="FOLDER", help="Data set: a new one, or one to resume or extend.")
    ],
    recipe: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Settings that differ from the defaults (YAML).")
    ] = None,
    asr: TextAsrOption = None,
    transcripts: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="PATH",
            help="Subtitles, labels or a text, or their folder, where they do not lie beside the recordings.",
            rich_help_panel=RAW,
        ),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(metavar="CODE", help="What is spoken, such as en; default: as recognised.", rich_help_panel=RAW),
    ] = None,
    speaker_model: SpeakerModelOption = None,
    speakers: Annotated[
        int | None,
        typer.Option(metavar="N", callback=within(1), help="How many speak in each recording.", rich_help_panel=RAW),
    ] = None,
    apply: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="A changed review.csv: apply what a person changed in it."),
    ] = None,
    copy: Annotated[
        bool,
        typer.Option(
            "--copy/--no-copy", help="Write clips, or only name stretches of the originals.", rich_help_panel=_SCALE
        ),
    ] = True,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            callback=_shard,
            help="Do a part of the recordings; then the same command without --shard merges.",
            rich_help_panel=_SCALE,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            callback=within(1),
            help="Processes, each with its own models; default: as many as cores, memory and recordings allow.",
            rich_help_panel=_SCALE,
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(
            help="ray: on the nodes of RAY_ADDRESS, which see RAW and --out at the same paths; none: a local one.",
            rich_help_panel=_SCALE,
        ),
    ] = "local",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Cut raw recordings into utterances, separate speakers, write or check the texts, refuse what is bad."""
    summary = _run(
        raw,
        out,
        as_json,
        recipe=recipe,
        language=language,
        speakers=speakers,
        transcripts=transcripts,
        asr=asr,
        speaker_model=speaker_model,
        apply=apply,
        copy=copy,
        shard=None if shard is None else _numbers(shard),
        engine=engine,
        workers=workers,
        device=device,
    )
    if as_json:
        print_result(dataclasses.asdict(summary), as_json)
    else:
        _print(summary, raw, out, shard)
        if summary.utterances and shard is None:
            outside = [] if copy else ["--allow-outside"]  # the originals are not in the data set
            print_next("higgstune", "prepare", str(out), "--out", f"{out}-codes", *outside)
    if not summary.utterances and shard is None:  # a part may well have none
        raise typer.Exit(2)


def collect_for(
    raw: Path, store: Path, asr: str | None, speaker_model: str | None, language: str | None, device: str, as_json: bool
) -> Path:
    """The data set for a code store, made of raw recordings beside it. Exits as `collect` where nothing is kept."""
    out = store.with_name(f"{store.name}-raw")
    summary = _run(raw, out, as_json, asr=asr, speaker_model=speaker_model, language=language, device=device)
    if not as_json:
        _print(summary, raw, out, None)
    if not summary.utterances:
        raise typer.Exit(2)
    return out


def _run(raw: Path, out: Path, as_json: bool, *, device: str, **options: Any) -> "CollectSummary":
    with announced("loading the models", as_json):
        from higgstune.environment import choose_device
        from higgstune.raw.collect import collect as run

    try:
        with Bar() as bar:
            chosen = str(choose_device(None if device == "auto" else device))
            return run(raw, out, device=chosen, progress=bar, **options)
    except (KeyboardInterrupt, Interrupted):
        errors.print(f"what was computed is kept in {out}: the same command resumes")
        raise


def _print(summary: "CollectSummary", raw: Path, out: Path, shard: str | None) -> None:
    kept, hours = many(summary.utterances, "utterance"), 3600 * summary.kept_hours
    of = f"{duration(3600 * summary.hours)} in {many(summary.recordings, 'recording')}"
    typer.echo(f"{out}: {kept}, {duration(hours)} kept of {of}")
    if summary.refused:
        where = "" if shard else f"; all of them are in {out / 'refused.jsonl'}"
        typer.echo(f"refused: {reasons_in_words(summary.refused)} ({duration(3600 * summary.refused_hours)}){where}")
    if summary.flagged:
        typer.echo(f"to look at: {reasons_in_words(summary.flagged)}")
    if not summary.utterances and "no text" in summary.refused and summary.models.get("asr") is None:
        typer.echo("there is no text for what is said: put it beside each recording (book.txt, book.srt), or:")
        print_next("higgstune", "collect", str(raw), "--out", str(out), "--asr", "large-v3")
    speakers = [f"{name} {duration(3600 * spoken)}" for name, spoken in summary.speakers.items()]
    more = f" and {len(speakers) - _SHOWN} more" if len(speakers) > _SHOWN else ""
    if speakers:
        typer.echo(f"speakers: {', '.join(speakers[:_SHOWN])}{more}")
    if summary.models.get("speakers") is None and summary.speakers:
        typer.echo("no model separated speakers: one is assumed in each recording (--speaker-model)")
    for name, why in summary.unreadable.items():
        typer.echo(f"not used: {name}: {why}")
    for note in summary.notes:
        typer.echo(f"note: {note}")
    for sentence in summary.advice:
        typer.echo(f"advice: {sentence}")
    if shard:
        print_next("higgstune", "collect", str(raw), "--out", str(out), before="once all shards are done:")
    elif summary.utterances:
        typer.echo(f"all of it, with players: {out / 'data_card.html'}")
