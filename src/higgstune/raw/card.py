"""A data set's card, `data_card.html` and `data_card.md`: what is in it, where it is from, and what to do next.

The page plays clips of its folder through relative links, and requests nothing else.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from higgstune.data.origin import NOT_STATED, ORIGIN
from higgstune.data.splits import TRAIN, VALIDATION
from higgstune.data.text import is_wide, spoken_length
from higgstune.evaluation.report.curves import SERIES, Panel, inline_svg, new_axis
from higgstune.evaluation.report.page import Table, pages
from higgstune.evaluation.report.players import Item, Section, Take, section_view
from higgstune.evaluation.test_sets import LANGUAGES
from higgstune.files import format_bytes, write_file
from higgstune.progress import duration
from higgstune.raw.advice import across_splits, check_of, common_pairs, texts_by_language, units_of, words_of
from higgstune.raw.choose import Chosen
from higgstune.raw.dataset import CACHE, CLIPS, MANIFEST, REFUSED, clip_path
from higgstune.raw.utterances import Part

HTML, MARKDOWN = "data_card.html", "data_card.md"
COST = ".cost.json"  # of each part in the cache: the CPU seconds that it took
_SHOWN_CLIPS, _SHOWN_ROWS, _SHOWN_MISSING = 10, 40, 30
_FREQUENT = 1000  # words
_BINS = 30
_FOLDERS = re.compile(r"(?<![\w.])/(?:[^/\s]+/)+")
_MARKDOWN_SIGNS = re.compile(r"([\\`*_\[\]|#~])")


@dataclass(frozen=True)
class _Card:
    """The content of both forms."""

    title: str
    advice: Sequence[str]
    sections: Sequence[Section]
    tables: Sequence[Table]
    facts: Mapping[str, Mapping[str, str]]  # by heading


def write_card(out: Path, chosen: Sequence[Chosen], parts: Sequence[Part], content: Mapping[str, Any]) -> None:
    """Write both forms into a data set, unless they are there and nothing changed; `content` is its `collect.json`.

    The clips that are shown depend on the data set alone. Raises DataError for a clip that cannot be read, WorkError
    if the disk refuses.
    """
    kept = [one for one in chosen if one.refused is None]
    seconds = [json.loads(path.read_text()) for path in sorted((out / CACHE).glob(f"*{COST}"))]
    state = out / CACHE / "card.json"
    lists = [(out / name).read_text(encoding="utf-8") for name in (MANIFEST, REFUSED)]
    key = _hash(json.dumps([*lists, content, seconds, _frequent_words(None) is None], sort_keys=True))
    written = json.loads(state.read_text()) if state.is_file() else None
    if written == key and (out / HTML).is_file() and (out / MARKDOWN).is_file():
        return
    histograms = {name: values for name, values in _histograms(kept).items() if values}
    card = _Card(
        title=out.resolve().name,
        advice=content["advice"],
        sections=_sections(out, kept),
        tables=[
            *_amounts(chosen, parts),
            _quantiles(histograms),
            _coverage(kept),
            _duplicates(kept),
        ],
        facts=_facts(out, content, sum(seconds), parts),
    )
    views = [section_view(section, f"clips{i}") for i, section in enumerate(card.sections)]
    panels = [_panel(i, name, values) for i, (name, values) in enumerate(histograms.items())]
    page = pages().get_template("card.html.jinja")
    write_file(out / HTML, page.render(card=card, content=content, sections=views, panels=panels, duration=duration))
    write_file(out / MARKDOWN, _markdown(card))
    write_file(state, json.dumps(key))


def _sections(out: Path, kept: Sequence[Chosen]) -> list[Section]:
    some = sorted(kept, key=lambda one: _hash(f"{one.part.sha256} {one.utterance.start}"))[:_SHOWN_CLIPS]
    worst = sorted(kept, key=_badness, reverse=True)[:_SHOWN_CLIPS]
    notes = (
        "Chosen by a hash of recording and time: nobody picked them.",
        "Kept, but with the most flags, then the largest difference of given and recognised text, then the most noise.",
    )
    return [
        Section(title, ["clip"], [_item(out, one) for one in clips], note, _SHOWN_CLIPS)
        for title, clips, note in zip(("Ten at random", "The ten worst"), (some, worst), notes, strict=True)
        if clips
    ]


def _badness(one: Chosen) -> tuple[float, ...]:
    difference, snr = check_of(one, "text"), one.utterance.measures.snr
    return len(one.flags), difference.value if difference else 0.0, -(math.inf if snr is None else snr)


def _item(out: Path, one: Chosen) -> Item:
    utterance, file = one.utterance, clip_path(out, one.id)
    snr = utterance.measures.snr
    notes = [f"gain {one.gain:+.1f} dB"] + ([] if snr is None else [f"SNR {snr:.0f} dB"])
    take = Take(file, utterance.recognised if utterance.given else None, notes, f"{CLIPS}/{quote(file.name)}")
    return Item(
        one.text,
        [take if file.is_file() else None],  # no clip with --no-copy
        language=one.part.language,
        detail=", ".join(filter(None, (one.id, one.speaker, one.split))),
        why="; ".join(check.message for check in one.checks if check.verdict == "flagged"),
    )


def _amounts(chosen: Sequence[Chosen], parts: Sequence[Part]) -> list[Table]:
    kept = [one for one in chosen if one.refused is None]
    refused = [one for one in chosen if one.refused is not None]
    whole = sum(part.seconds for part in parts)
    left = whole - sum(one.utterance.seconds for one in chosen)
    rows: list[list[str | None]] = [
        ["recordings", f"{len(parts):,}", duration(whole)],
        ["kept", f"{len(kept):,}", _long(kept)],
        ["refused", f"{len(refused):,}", _long(refused)],
        ["in no utterance: pauses, music, noise", "none", duration(max(left, 0.0))],
    ]
    columns = ("utterances", "duration")
    return [
        Table("How much", ["what", "number", "duration"], rows),
        _counted("Refused", "reason", columns, refused, lambda one: one.refused.what if one.refused else ""),
        _counted("Speakers", "speaker", columns, kept, lambda one: one.speaker or "unknown"),
        _counted("Languages", "language", columns, kept, lambda one: one.part.language or "unknown"),
        _counted("Splits", "split", columns, kept, lambda one: one.split),
    ]


def _counted(
    title: str, head: str, columns: Sequence[str], members: Sequence[Chosen], name_of: Callable[[Chosen], str]
) -> Table:
    groups: dict[str, list[Chosen]] = defaultdict(list)
    for one in members:
        groups[name_of(one)].append(one)
    order = sorted(groups.items(), key=lambda item: -sum(one.utterance.seconds for one in item[1]))
    return _table(title, [head, *columns], [[name, f"{len(found):,}", _long(found)] for name, found in order])


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | None]], note: str = "") -> Table:
    """A table of at most 40 rows, which says how many it has left out."""
    more = f"The first {_SHOWN_ROWS} of {len(rows)}." if len(rows) > _SHOWN_ROWS else "" if rows else "None."
    return Table(title, columns, rows[:_SHOWN_ROWS], " ".join(filter(None, (note, more))))


def _histograms(kept: Sequence[Chosen]) -> dict[str, list[float]]:
    spoken = [(one, sum(end - start for start, end in one.utterance.speech)) for one in kept]
    differences = [check_of(one, "text") for one in kept]
    return {
        "Length, s": [one.utterance.seconds for one in kept],
        "Level before the gain, LUFS": _known(one.utterance.measures.loudness for one in kept),
        "SNR, dB": _known(one.utterance.measures.snr for one in kept),
        "Speech rate, letters a second": [spoken_length(one.text) / time for one, time in spoken if time > 0],
        "Difference of given and recognised text, % of characters": [100 * c.value for c in differences if c],
    }


def _panel(number: int, name: str, values: Sequence[float]) -> Panel:
    axis = new_axis()
    axis.hist(values, bins=_BINS, color=SERIES[0])
    axis.locator_params(axis="y", integer=True, nbins=5)
    axis.locator_params(axis="x", nbins=6)
    axis.set(xlabel=name.rpartition(", ")[2], ylabel="utterances")
    low, middle, high = np.percentile(values, [0, 50, 100])
    summary = f"{name}: {len(values)} utterances from {low:.3g} to {high:.3g}, median {middle:.3g}."
    return Panel(name, inline_svg(axis, f"histogram{number}", summary), summary)


def _quantiles(histograms: Mapping[str, Sequence[float]]) -> Table:
    rows = [
        [name, f"{len(values):,}", *(f"{value:.3g}" for value in np.percentile(values, [5, 50, 95]))]
        for name, values in histograms.items()
    ]
    note = "Of utterances that are kept and of which it could be measured."
    return Table("Measures", ["measure", "utterances", "5 % are below", "median", "5 % are above"], rows, note)


def _coverage(kept: Sequence[Chosen]) -> Table:
    rows: list[list[str | None]] = []
    for language, texts in texts_by_language(kept).items():
        if language in LANGUAGES:
            pairs = common_pairs(language)
            missing = sorted(pairs - units_of(texts))
            what = f"{language}: letter pairs" if max(map(len, pairs)) > 1 else f"{language}: characters"
            rows.append([what, f"{len(pairs) - len(missing)} of {len(pairs)}", _some(missing)])
        if language is not None and (words := _frequent_words(language)):
            spoken = [word for text in texts for word in words_of(text)]
            whole, single = " ".join(spoken), set(spoken)
            absent = [word for word in words if not (word in whole if is_wide(word) else word in single)]
            rows.append([f"{language}: words", f"{len(words) - len(absent)} of {len(words)}", _some(absent)])
    note = (
        "Letter pairs, not phones: pairs within words that at least three of the language's built-in test sentences "
        f"have. Words: the {_FREQUENT:,} most frequent ones of wordfreq, where that package is installed."
    )
    return _table("Coverage", ["language", "covered", "missing, such as"], rows, note)


def _frequent_words(language: str | None) -> list[str] | None:
    """The most frequent words, none for a language without a list; None where the optional wordfreq is missing."""
    try:
        import wordfreq
    except ModuleNotFoundError:
        return None
    if language not in wordfreq.available_languages():
        return []
    found = (words_of(word) for word in wordfreq.top_n_list(language, 2 * _FREQUENT))  # numbers are not words
    return list(dict.fromkeys(words[0] for words in found if len(words) == 1))[:_FREQUENT]


def _duplicates(kept: Sequence[Chosen]) -> Table:
    """Speech, and texts, that are in training and in validation."""
    rows: list[list[str | None]] = [
        [one.id, other.id, check.message.partition(" are also ")[0] or None]
        for one, other, check in across_splits(kept)
    ]
    places: dict[str, dict[str, str]] = defaultdict(dict)
    for one in kept:
        places[" ".join(words_of(one.text))].setdefault(one.split, one.id)
    rows += [
        [ids[TRAIN], ids[VALIDATION], f"the text “{text}”"] for text, ids in places.items() if text and len(ids) > 1
    ]
    return _table("Duplicates across splits", ["utterance", "the same in", "what"], rows)


def _facts(out: Path, content: Mapping[str, Any], seconds: float, parts: Sequence[Part]) -> dict[str, dict[str, str]]:
    recipe = content["recipe"]
    hours = sum(part.seconds for part in parts) / 3600
    cost = {"CPU time of the recordings": f"{duration(seconds)}, in all calls with any settings"} if seconds else {}
    if seconds and hours:
        cost["for an hour of them"] = duration(seconds / hours)
    cost["clips on the disk"] = format_bytes(sum(path.stat().st_size for path in (out / CLIPS).glob("*.flac")))
    return {
        "Origin": {name: recipe[name] or NOT_STATED for name in ORIGIN},
        "Models": {name: model or "none" for name, model in content["models"].items()}
        | {"higgstune": content["higgstune"]},
        "Recipe": {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in recipe.items()
                   if name not in ORIGIN},
        "Cost": cost,
        "Not used": {name: _FOLDERS.sub("", why) for name, why in content["unreadable"].items()},
        "Notes": {str(number): _FOLDERS.sub("", note) for number, note in enumerate(content["notes"], 1)},
    }  # fmt: skip


def _markdown(card: _Card) -> str:
    lines = [f"# {_plain(card.title)}", "", "## What to do next", ""]
    lines += [f"- {_plain(sentence)}" for sentence in card.advice]
    for table in card.tables:
        lines += ["", f"## {_plain(table.title)}", *(["", _plain(table.note)] if table.note else [])]
        if table.rows:
            head: list[Sequence[str | None]] = [table.columns, ["---"] * len(table.columns)]
            lines += ["", *("| " + " | ".join(_entry(entry) for entry in row) + " |" for row in [*head, *table.rows])]
    for section in card.sections:
        lines += ["", f"## {_plain(section.title)}", "", _plain(section.note), ""]
        for item in section.items:
            link = next((take.link for take in item.takes if take is not None), None)
            text = _plain(item.text)
            lines.append(f"- {text if link is None else f'[{text}]({link})'}: {_plain(item.why or item.detail)}")
    for name, values in card.facts.items():
        if values:
            lines += ["", f"## {name}", "", *(f"- {_plain(key)}: {_plain(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _entry(text: str | None) -> str:
    return "not measured" if text is None else text if text == "---" else _plain(text)


def _plain(text: str) -> str:
    """Text that is neither HTML nor Markdown."""
    return _MARKDOWN_SIGNS.sub(r"\\\1", escape(" ".join(text.split()), quote=False))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_MISSING} more" if len(names) > _SHOWN_MISSING else ""
    return " ".join(names[:_SHOWN_MISSING]) + more or "none"


def _long(members: Sequence[Chosen]) -> str:
    return duration(sum(one.utterance.seconds for one in members))


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
