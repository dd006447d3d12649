"""The report of `doctor`: findings, their summary, and a table."""

import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

from rich.table import Table
from rich.text import Text

Status = Literal["ok", "warning", "failed", "skipped"]
STATUSES: tuple[Status, ...] = get_args(Status)
# In the order of the report. Each is a section of docs/doctor.md.
CHECKS = (
    *("environment", "recipe", "checkpoint", "rotary", "codec", "data"),
    *("prompt", "loss", "adapter", "generation", "memory", "golden"),
)
_INDENT = " " * 9  # below the longest status and a space
_COLOURS: dict[Status, str] = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}


@dataclass(frozen=True)
class Finding:
    """One result of a check."""

    check: str  # one of CHECKS
    status: Status
    message: str  # the observation, with its file or option
    advice: str = ""  # what to do


@dataclass(frozen=True)
class Report:
    """All findings, in the order of CHECKS."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not any(finding.status == "failed" for finding in self.findings)

    @property
    def summary(self) -> dict[str, int]:
        """The number of findings of each status."""
        counts = Counter(finding.status for finding in self.findings)
        return {status: counts[status] for status in STATUSES}

    def of(self, check: str, status: Status | None = None) -> list[Finding]:
        """The findings of one check, optionally of one status."""
        return [f for f in self.findings if f.check == check and status in (None, f.status)]

    def to_json(self) -> dict[str, Any]:
        """The object that `doctor --json` prints."""
        return {
            "passed": self.passed,
            "summary": self.summary,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def text(self, width: int = 110) -> str:
        """For a log: a paragraph a finding, in lines of up to `width` characters unless a word is longer."""
        fill = partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
        paragraphs = []
        for finding in self.findings:
            head = f"{finding.status:<8} {finding.check}: "
            paragraphs.append(fill(finding.message, initial_indent=head, subsequent_indent=_INDENT))
            if finding.advice:
                paragraphs.append(fill(f"to do: {finding.advice}", initial_indent=_INDENT, subsequent_indent=_INDENT))
        return "\n".join(paragraphs)

    def table(self) -> Table:
        """For a terminal."""
        table = Table("status", "check", "finding", "what to do")
        for finding in self.findings:
            colour = _COLOURS[finding.status]
            # Text, as rich would read brackets in strings as markup.
            table.add_row(
                Text(finding.status, style=colour), finding.check, Text(finding.message), Text(finding.advice)
            )
        return table


def sorted_report(findings: Iterable[Finding]) -> Report:
    """A report of findings, sorted."""
    return Report(tuple(sorted(findings, key=lambda finding: CHECKS.index(finding.check))))


def naming(names: Iterable[str], limit: int = 3) -> str:
    """The first names and the number of others for a message: `a, b, c and 25 more`."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
