"""A run's report: one self-contained HTML page with curves and audio players."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import soundfile

from higgstune.files import write_file
from higgstune.report.curves import History, codebooks_figure, losses_figure


@dataclass(frozen=True)
class Section:
    """Clips to listen to side by side: for each text one file (or None) a column."""

    title: str
    columns: Sequence[str]
    clips: Sequence[tuple[str, Sequence[Path | None]]]


@dataclass(frozen=True)
class Report:
    """What the page shows."""

    title: str
    introduction: str
    facts: Mapping[str, str]  # what was trained on what
    histories: Mapping[str, History]  # by stage
    sections: Sequence[Section]
    measures: Sequence[Mapping[str, str]] = ()  # rows of one table, all with the same keys
    measures_note: str = ""
    timings: Mapping[str, float] = field(default_factory=dict)  # seconds


def write_report(report: Report, path: Path) -> None:
    """Write the page. Raises WorkError where the disk refuses."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("higgstune.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.jinja").render(
        report=report,
        losses=losses_figure(report.histories),
        codebooks=codebooks_figure(report.histories),
        players=[[(text, [_player(file) for file in files]) for text, files in s.clips] for s in report.sections],
    )
    write_file(path, page)


def _player(file: Path | None) -> dict[str, Any] | None:
    """Audio as an MP3 data URL, which every browser plays and which keeps the page small."""
    if file is None:
        return None
    waveform, rate = soundfile.read(file, dtype="float32")
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format="MP3")
    return {
        "url": "data:audio/mpeg;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "seconds": len(waveform) / rate,
    }
