"""Draw the pictures of the docs, docs/figures/*.svg, and the badges of the README.

    python tools/figures.py

All text stands on filled boxes and lines are grey, so that they read on a white and on a black page; 380 pixels wide,
so that they read on a phone. `tests/test_docs.py` fails where the files differ from what this draws.
"""

import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WIDTH = 380
THING, STEP, PLAIN, GREY = "#1f5f99", "#b45309", "#4b5563", "#7a828c"
FONT = "font-family='system-ui, sans-serif' font-size='14'"


def box(x: int, y: int, width: int, height: int, text: str, fill: str) -> str:
    """A box with a line of white text in its middle."""
    return (
        f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='6' fill='{fill}'/>"
        f"<text x='{x + width / 2:g}' y='{y + height / 2 + 5:g}' text-anchor='middle' fill='#fff'>{escape(text)}</text>"
    )


def arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    """A line with a head."""
    return f"<path d='M{x1} {y1} L{x2} {y2}' stroke='{GREY}' stroke-width='2' marker-end='url(#head)'/>"


def drawing(title: str, height: int, parts: list[str]) -> str:
    """A whole picture."""
    head = (
        f"<marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='6' markerHeight='6' orient='auto'>"
        f"<path d='M0 0 L8 4 L0 8 z' fill='{GREY}'/></marker>"
    )
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}' viewBox='0 0 {WIDTH} {height}' "
        f"role='img' {FONT}>\n<title>{escape(title)}</title>\n<defs>{head}</defs>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def flow() -> str:
    """What becomes of recordings, with the verb of each step."""
    things = ["recordings + texts", "code store", "adapter", "speech", "report", "folder to share"]
    steps = [
        ("prepare", "encode each clip once"),
        ("train", "train LoRA, reload, verify"),
        ("speak", "frame by frame"),
        ("evaluate", "metrics, players"),
        ("export", "merge, verify, card"),
    ]
    parts = []
    for row, thing in enumerate(things):
        y = 4 + 74 * row
        parts.append(box(4, y, 160, 32, thing, THING))
        if row < len(steps):
            verb, does = steps[row]
            parts += [arrow(84, y + 32, 84, y + 72), box(96, y + 39, 80, 26, verb, STEP)]
            parts.append(box(180, y + 39, 196, 26, does, PLAIN))
    return drawing("From recordings to a folder to share", 4 + 74 * 5 + 36, parts)


def delay() -> str:
    """Rows of the model for two frames and three codebooks."""
    frames, books = 2, 3
    rows = frames + books + 1
    size, left = 50, 72
    parts = [box(left + size * row, 4, size - 4, 28, str(row), PLAIN) for row in range(rows)]
    parts.append(box(4, 4, left - 8, 28, "row", PLAIN))
    for book in range(books):
        y = 38 + 38 * book
        parts.append(box(4, y, left - 8, 34, f"book {book}", PLAIN))
        for row in range(rows):
            frame = row - 1 - book
            code = 0 <= frame < frames
            text = f"c{frame},{book}" if code else ("BOS" if frame < 0 else "EOS")
            fill = THING if code else (STEP if frame == frames else PLAIN)
            parts.append(box(left + size * row, y, size - 4, 34, text, fill))
    y = 38 + 38 * books + 6
    parts += [box(4, y, 110, 26, "code: label", THING), box(120, y, 124, 26, "first EOS: label", STEP)]
    parts.append(box(250, y, 122, 26, "forced: no label", PLAIN))
    return drawing("The delay pattern: codebook k starts k rows later", y + 32, parts)


def verbs() -> str:
    """Each verb with what it reads and writes."""
    rows = [
        ("recordings", "prepare", "code store"),
        ("code store", "inspect", "a clip, outliers"),
        ("recipe, store", "train", "run, adapter"),
        ("adapter, text", "speak", "wav"),
        ("run", "evaluate", "report.html"),
        ("several runs", "compare", "compare.html"),
        ("run", "export", "folder, card"),
        ("any of these", "doctor", "what to mend"),
    ]
    parts = []
    for row, (reads, verb, writes) in enumerate(rows):
        y = 4 + 38 * row
        parts += [box(4, y, 118, 30, reads, THING), arrow(124, y + 15, 140, y + 15), box(142, y, 90, 30, verb, STEP)]
        parts += [arrow(234, y + 15, 250, y + 15), box(252, y, 124, 30, writes, THING)]
    return drawing("What each verb reads and writes", 4 + 38 * len(rows), parts)


def badge(name: str, value: str) -> str:
    """Two boxes in a row, as on other projects' pages, without anybody's server."""
    width, split = 16 + 8 * (len(name) + len(value)) + 16, 16 + 8 * len(name)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='22' role='img' "
        f"font-family='system-ui, sans-serif' font-size='12'>\n<title>{escape(f'{name}: {value}')}</title>\n"
        f"{box(0, 0, split, 22, name, PLAIN)}\n{box(split, 0, width - split, 22, value, THING)}\n</svg>\n"
    )


DRAWINGS = {
    "flow": flow,
    "delay": delay,
    "verbs": verbs,
    "licence": lambda: badge("licence", PROJECT["license"]),
    "python": lambda: badge("python", PROJECT["requires-python"].replace(">=", "") + " or newer"),
}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (FIGURES / f"{name}.svg").write_text(draw(), encoding="utf-8")
