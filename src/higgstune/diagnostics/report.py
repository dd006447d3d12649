"""What an examination found: findings, their summary, and the table that people read."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from rich.table import Table
from rich.text import Text

Status = Literal["ok", "warning", "failed", "skipped"]
STATUSES: tuple[Status, ...] = get_args(Status)
# In the order of the report. Each is a section of docs/doctor.md.
CHECKS = (
    *("environment", "recipe", "checkpoint", "rotary", "codec", "data"),
    *("prompt", "loss", "adapter", "generation", "memory"),
)
_COLOURS: dict[Status, str] = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}


@dataclass(frozen=True)
class Finding:
    """One thing that a check saw."""

    check: str  # one of CHECKS
    status: Status
    message: str  # what was found, and where
    advice: str = ""  # what to do


@dataclass(frozen=True)
class Report:
    """All findings of an examination, in the order of CHECKS."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not any(finding.status == "failed" for finding in self.findings)

    @property
    def summary(self) -> dict[str, int]:
        """How many findings there are of each status."""
        counts = Counter(finding.status for finding in self.findings)
        return {status: counts[status] for status in STATUSES}

    def of(self, check: str, status: Status | None = None) -> list[Finding]:
        """The findings of one check, or those of a status among them."""
        return [f for f in self.findings if f.check == check and status in (None, f.status)]

    def to_json(self) -> dict[str, Any]:
        """As `doctor --json` prints it."""
        return {
            "passed": self.passed,
            "summary": self.summary,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def table(self) -> Table:
        """For a terminal."""
        table = Table("status", "check", "finding", "what to do")
        for finding in self.findings:
            colour = _COLOURS[finding.status]
            # Text, not strings: a path in brackets is not markup.
            table.add_row(
                Text(finding.status, style=colour), finding.check, Text(finding.message), Text(finding.advice)
            )
        return table


def in_order(findings: Iterable[Finding]) -> Report:
    """A report of findings that were made in any order."""
    return Report(tuple(sorted(findings, key=lambda finding: CHECKS.index(finding.check))))


def naming(names: Iterable[str], most: int = 3) -> str:
    """Some of many names for a message: `a, b, c and 25 more`."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
