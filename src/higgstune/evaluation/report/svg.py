"""Matplotlib figures as inline SVG, in the page's colours, light or dark, and in its font.

Matplotlib is imported when a figure is drawn: it takes long, and most uses of this package draw none.
"""

import io
import re
from typing import Any

from markupsafe import Markup, escape

# Matplotlib needs real colours: each stands for a property of the page's style sheet, which has the visible colour.
INK, MUTED, LINE = "#0a0001", "#0a0002", "#0a0003"
SERIES = tuple(f"#0b00{i:02x}" for i in range(6))
CODEBOOKS = tuple(f"#0c00{i:02x}" for i in range(8))
_PROPERTIES = (
    {INK: "--ink", MUTED: "--muted", LINE: "--line"}
    | {colour: f"--s{i}" for i, colour in enumerate(SERIES)}
    | {colour: f"--q{i}" for i, colour in enumerate(CODEBOOKS)}
)
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "higgstune",  # the same figure is the same bytes
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
_VIEW_BOX = re.compile(r'viewBox="([^"]*)"')


def property_of(colour: str) -> str:
    """The style sheet's property that a colour of this module stands for, such as `var(--s0)`."""
    return f"var({_PROPERTIES[colour]})"


def new_axis(size: tuple[float, float] = (4.1, 2.7)) -> Any:
    """An axis alone in a figure of this size in inches; the default is as wide as a phone."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):  # type: ignore[arg-type]
        axis = Figure(figsize=size, layout="constrained").add_subplot()
        axis.set_axisbelow(True)
        return axis


def inline_svg(axis: Any, name: str, summary: str) -> Markup:
    """The axis' figure as an <svg> element; `name` is unique in the page, `summary` describes the figure in words."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(_STYLE):  # type: ignore[arg-type]
        axis.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, prop in _PROPERTIES.items():
        text = text.replace(colour, f"var({prop})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)
    start = f'<svg role="img" aria-label="{escape(summary)}" viewBox="{_VIEW_BOX.findall(text)[0]}">'
    return Markup(start + text[text.index(">") + 1 :])  # matplotlib escapes its text; the summary is escaped here
