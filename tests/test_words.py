"""Code, docs and messages use the terms of the field; the words of an older dialect, listed here, stay out."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What is checked. Left out for good: dev/LOG.md and dev/INTAKE.md, which are history, and this file.
CLEAN = (
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "unified_lora_training.py",
    "bench", "dev", "docs", "fuzz", "src", "tests", "tools",
)  # fmt: skip
LEFT_OUT = ("tests/test_words.py", "dev/LOG.md", "dev/INTAKE.md")

# Regular expressions of old words -> what to write instead.
OLD_WORDS = {
    r"heard|hears?|hearing": "Whisper features, encoded by Whisper; transcript",
    r"listen(s|ed|ing|ers?)?": "uses Whisper; sample evaluation",
    r"ask(s|ed|ing)?": "request, need; evaluation item; arguments",
    r"told|tell(s|ing)?": "report, warn, message, summary",
    r"agree(s|d|ing|ment|ments)?": "match, equal; sync",
    r"(goes|go|going|gone|went) on": "resume, continue",
    r"from elsewhere": "external",
    r"computed again": "recomputed",
    r"cells?": "label entries",
    r"rows? of audio": "audio frames, delayed frames",
    r"rehears(e|es|ed|ing|als?)": "dry run",
    r"twins?": "near-duplicates",
    r"blam(e|es|ed|ing)": "attribute",
    r"heeded": "installed",
    r"(is|are|was) no": "is not a",
    r"not there": "missing",
}
# A word ends where its letters end: `heard_clips` has one, `task` has none. A space stands for `_` and `-`, too.
PATTERN = re.compile(rf"(?<![a-z])(?:{'|'.join(OLD_WORDS).replace(' ', '[ _-]')})(?![a-z])", re.IGNORECASE)

# Phrases in which a word has its plain meaning -> why they may stay.
ALLOWED_PHRASES = {
    r"listen to": "a person plays a file",
    r"--listen\b": "an option of `inspect`",
    r"listening test": "the field's term for people who rate speech",
    r"\b(there|it) (is|are|was) no\b": "nothing is there; no noun is denied to be another",
    r"\b(is|are) no (longer|more|less|fewer)\b": "a comparison",
    r"\.tell\(|def tell\(": "the method of a file",
}
# (part of a path, word) -> why it may stay there.
ALLOWED_PLACES = {
    ("data/importers/", "cell"): "cells of a table",
    ("tests/data/test_layouts.py", "cell"): "cells of a table",
    ("docs/data.md", "cell"): "cells of a table",
    ("raw/review_table.py", "cell"): "cells of a table",
    ("evaluation/report/", "cell"): "cells of an HTML table",
    ("exporting/card.py", "cell"): "cells of a Markdown table",
    ("tests/evaluation/test_report.py", "cell"): "cells of an HTML table",
    ("tools/demo/texts.py", ""): "sentences to be spoken",
    ("tests/test_fuzz.py", "cell"): "cells of a table",
    ("tests/test_notebook.py", "cell"): "cells of a notebook",
}
ALLOWED = re.compile("|".join(ALLOWED_PHRASES), re.IGNORECASE)
KINDS = (".py", ".md", ".yaml", ".sh", ".js", ".css", ".html", ".jinja")


def files(name: str) -> list[Path]:
    """What people read: code, docs, recipes, pages."""
    path = ROOT / name
    return [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.suffix in KINDS)


def old_words(line: str, path: str = "") -> list[str]:
    """The old words of a line: in prose, in messages and in identifiers."""
    found = [match[0] for match in PATTERN.finditer(ALLOWED.sub("", line))]
    return [word for word in found if not any(p in path and word.lower().startswith(w) for p, w in ALLOWED_PLACES)]


@pytest.mark.parametrize("name", CLEAN)
def test_old_words_stay_out(name: str) -> None:
    found = []
    for path in files(name):
        place = path.relative_to(ROOT).as_posix()
        if place in LEFT_OUT:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{place}:{number}: {word}" for word in old_words(line, place)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("Clips that were Heard", ["Heard"]),
        ("self.heard_clips = asked", ["heard", "asked"]),
        ("def test_it_goes_on() -> None:", ["goes_on"]),
        ("open the page and listen to it: there is no other way", []),
        ("tasks, masks, shareholders and satellites", []),
    ],
)
def test_words_are_found_in_prose_and_in_identifiers(line: str, found: list[str]) -> None:
    assert old_words(line) == found


def test_a_word_may_stay_where_it_has_its_plain_meaning() -> None:
    assert not old_words("a cell of the table", "src/higgstune/data/importers/table.py")
    assert old_words("a cell with a label", "src/higgstune/kernels/loss.py") == ["cell"]
