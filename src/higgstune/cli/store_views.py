"""What `inspect` prints: a store as a whole, one row, and a row's tokens and labels."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from higgstune.cli.output import many, print_next, print_table
from higgstune.data.origin import in_words, origin_from_json
from higgstune.data.rejection import reasons_in_words
from higgstune.progress import duration

if TYPE_CHECKING:
    from higgstune.data.measures import Measures
    from higgstune.data.overview import Amount, RowOverview, StoreOverview
    from higgstune.diagnostics.inspect_row import RowInspection

_NAMES = 6  # speakers, languages
_BAR = 40  # characters of the longest bar
_SAID = 90  # characters of a text


def print_store(found: "StoreOverview", store: Path) -> None:
    """A store's rows in numbers, some of its texts, what was refused, and what stands out."""
    rows = sum(amount.rows for amount in found.splits.values())
    seconds = sum(amount.seconds for amount in found.splits.values())
    typer.echo(f"{store}: {many(rows, 'clip')}, {duration(seconds)} of speech")
    for split, amount in found.splits.items():
        typer.echo(f"  {split}: {many(amount.rows, 'clip')}, {duration(amount.seconds)}")
    typer.echo(f"speakers: {_named(found.speakers)}")
    typer.echo(f"languages: {_named(found.languages)}")
    typer.echo("; ".join(f"{name}: {in_words(stated)}" for name, stated in origin_from_json(found.origin).items()))
    shortest, low, median, high, longest = found.lengths
    typer.echo(f"lengths: {shortest:g} to {longest:g} s, half of them {low:g} to {high:g} s, median {median:g} s")
    most = max(count for *_, count in found.histogram)
    for start, end, count in found.histogram:
        typer.echo(f"  {f'{start:g} to {end:g} s':>14}  {'#' * -(-count * _BAR // most):<{_BAR}}  {count}")
    typer.echo("texts:")
    for name, text in found.texts.items():
        typer.echo(f"  {name}: {_shortened(text)}")
    if found.refused:
        typer.echo(f"refused from the last source: {reasons_in_words(found.refused)} (all in {store}/rejected.jsonl)")
        for place, reason in found.first_refused:
            typer.echo(f"  {place}: {reason}")
    stand_out = ", ".join(f"{kind} ({count})" for kind, count in found.outliers.items())
    typer.echo(f"rows that stand out: {f'{found.outlier_rows}: {stand_out}' if found.outliers else 'none'}")
    if found.outliers:
        print_next("higgstune", "inspect", str(store), "--outliers", before="to see them:")
    print_next("higgstune", "inspect", str(store), "--row", "0", "--listen", "row.wav", before="to play a clip:")


def print_row(found: "RowOverview", store: Path, wav: Path | None) -> None:
    """A row for the person who spoke it: text, length, voice, level."""
    typer.echo(f"{found.id} ({found.split}, row {found.number} of {found.rows})")
    typer.echo(f"text: {found.text}")
    rate = found.characters_per_second
    typer.echo(f"length: {found.seconds:.2f} s" + ("" if rate is None else f", {rate:.1f} characters a second"))
    typer.echo(f"speaker: {found.speaker or 'not named'}")
    typer.echo(f"language: {found.language or 'not named'}")
    if found.scene is not None:
        typer.echo(f"scene: {found.scene or 'none'}")
    if found.reference is not None:
        typer.echo(f"reference: {found.reference}")
    if found.turns is not None:
        typer.echo(f"taken from a conversation of {found.turns} messages")
    for line in _measured(found.measures):
        typer.echo(line)
    if wav is not None:
        typer.echo(f"wrote {wav}, decoded from its codes: this is what a model is trained on")
        return
    name = found.id if found.id.isascii() and found.id.isprintable() and "/" not in found.id else "row"
    print_next("higgstune", "inspect", str(store), "--row", str(found.number), "--listen", f"{name}.wav")


def _measured(measures: "Measures | None") -> list[str]:
    if measures is None:
        return ["measures: none, as an earlier version stored the row; prepare its source again"]
    mixed = f", {measures.silent_channels} of them silent" if measures.silent_channels else ""
    return [
        f"level: {measures.level:g} dBFS, peak {measures.peak:g} dBFS",
        f"noise: {measures.noise_floor:g} dBFS, {measures.snr:g} dB below the speech",
        f"silence: {measures.leading_silence:g} s before, {measures.trailing_silence:g} s after",
        f"bandwidth: {measures.bandwidth / 1000:.1f} kHz",
        f"clipped: {100 * measures.clipped:.2g} % of the samples",
        f"channels: {measures.channels}{mixed}",
    ]


def print_tokens(found: "RowInspection") -> None:
    """A row as the model sees it."""
    from higgstune.diagnostics.inspect_row import label_table

    typer.echo(f"{found.id} ({found.split}): {found.seconds:.2f} s, {found.frames} frames\n")
    typer.echo(found.prompt + "\n")
    typer.echo(
        f"{found.tokens} tokens: {found.text_tokens} of text, {found.audio_rows} audio frames, "
        f"{found.feature_positions} Whisper features; "
        f"{len(found.text_labels)} text labels, {found.audio_label_entries} audio label entries\n"
    )
    typer.echo(
        "text labels (position token): " + " ".join(f"{p} {token!r}" for p, _, token in found.text_labels) + "\n"
    )
    table = Table("position", *(f"k={k}" for k in range(len(found.audio_labels[0][1]))), title="audio labels")
    for entries in label_table(found):
        table.add_row(*map(str, entries))
    print_table(table)


def _named(amounts: "dict[str, Amount]") -> str:
    shown = [
        f"{name or 'not named'} ({many(amount.rows, 'clip')}, {duration(amount.seconds)})"
        for name, amount in list(amounts.items())[:_NAMES]
    ]
    more = len(amounts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _shortened(text: str) -> str:
    return text if len(text) <= _SAID else text[:_SAID] + "..."
