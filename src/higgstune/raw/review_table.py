"""`review.csv`: a data set's utterances for a spreadsheet, and what a person changed in it.

`keep` (yes, no), `text` and `speaker` may be changed, and rows may be sorted or deleted. `hash` stands for an utterance
and these three as they were written: a row whose columns still match it was not touched; one that was, but whose
utterance has changed in the data set since, is refused.
"""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from higgstune.errors import DataError
from higgstune.files import alone_in
from higgstune.raw.edits import DecisionLog
from higgstune.raw.journal import key_of
from higgstune.raw.proofreading import read_rows

COLUMNS = ("id", "keep", "text", "speaker", "recognised", "flags", "note", "hash")
_CHANGEABLE = ("keep", "text", "speaker")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would compute
_YES, _NO = ("yes", "y", "true", "1"), ("no", "n", "false", "0")
_SHOWN = 10  # errors


def table_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table of rows of the manifest and of those that are refused; with the mark, Excel reads it as UTF-8."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(COLUMNS)
    for row in rows:
        values = _values(row)
        flags = " ".join(dict.fromkeys(c["what"] for c in row.get("history", []) if c["verdict"] == "flagged"))
        note = f"{row['reason']}: {row['message']}" if "reason" in row else ""
        cells = [row["id"], *(values[name] for name in _CHANGEABLE), row.get("recognised") or "", flags, note]
        writer.writerow([*map(_quoted, cells), _hash(row, values)])
    return "\ufeff" + table.getvalue()


def read_review(path: Path, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The decisions that a changed table makes about the rows of the data set, in the order of the table.

    Comma or semicolon, UTF-8 with or without a mark. Raises DataError that names lines: of unknown ids, of utterances
    that have changed since, of values that mean nothing.
    """
    known = {row["id"]: row for row in rows}
    faults: list[str] = []
    found: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for number, cells in _lines(path):
        name = cells["id"]
        if name not in known:
            faults.append(f"line {number}: there is no utterance {name!r}")
        elif name in seen:
            faults.append(f"line {number}: {name} is in line {seen[name]}, too")
        else:
            seen[name] = number
            try:
                found += _decision(known[name], cells)
            except ValueError as error:
                faults.append(f"line {number}: {name}: {error}")
    if faults:
        more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise DataError(f"{path}: nothing is applied\n  " + "\n  ".join(faults[:_SHOWN]) + more)
    return found


def apply_table(folder: Path, path: Path) -> int:
    """Append to a data set's decisions what a table changes; how many they are.

    Raises DataError where the table does not fit, or while `review` is open, WorkError where the disk refuses.
    """
    rows = read_rows(folder)
    with alone_in(folder, "review", "nothing is applied"):
        decisions = read_review(path, rows)
        DecisionLog(folder).append(*decisions)
    return len(decisions)


def _decision(row: Mapping[str, Any], cells: Mapping[str, str]) -> list[dict[str, Any]]:
    """None or one. Raises ValueError."""
    before = _values(row)
    after = {**before, **{name: cells[name].strip() for name in _CHANGEABLE if name in cells}}
    after["keep"] = _keep(after["keep"])
    if after == before or cells["hash"] == _hash(row, after):
        return []
    if cells["hash"] != _hash(row, before):
        raise ValueError("it has changed since the table was written: collect again, and change the new table")
    for name in ("text", "speaker"):
        if before[name] and not after[name]:
            raise ValueError(f"{name} is empty{': write no under keep to drop it' if name == 'text' else ''}")
    decision: dict[str, Any] = {name: after[name] for name in ("text", "speaker") if after[name] != before[name]}
    if after["keep"] != before["keep"]:
        decision["keep"] = after["keep"] == "yes"
    return [{"id": row["id"], **decision}]


def _keep(cell: str) -> str:
    word = cell.lower()
    if word not in (*_YES, *_NO):
        raise ValueError(f"keep is {cell!r}: write yes or no")
    return "yes" if word in _YES else "no"


def _values(row: Mapping[str, Any]) -> dict[str, str]:
    text, speaker = str(row.get("text") or "").strip(), str(row.get("speaker") or "").strip()
    return {"keep": "no" if "reason" in row else "yes", "text": text, "speaker": speaker}


def _hash(row: Mapping[str, Any], values: Mapping[str, str]) -> str:
    segment = row["segment"]
    place = [segment["recording"], segment["start"], segment["end"]]
    return "h" + key_of(row["id"], place, [values[name] for name in _CHANGEABLE])[:11]  # never a number


def _lines(path: Path) -> Iterable[tuple[int, dict[str, str]]]:
    """The first line of each row in the file, and its columns by name."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}): save it as `CSV UTF-8`") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    head = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=";" if head.count(";") > head.count(",") else ",")
    try:
        names = [name.strip().lower() for name in next(reader, [])]
        if missing := [name for name in ("id", "hash") if name not in names]:
            raise DataError(f"{path}:1: there is no column {missing[0]!r}: the table that `collect` writes has one")
        first = reader.line_num + 1
        for cells in reader:
            if any(cells):
                if len(cells) > len(names) and any(cells[len(names) :]):
                    raise DataError(f"{path}:{first}: it has more columns than the first line: save it as CSV again")
                filled = [*cells, *[""] * (len(names) - len(cells))]
                yield first, {name: _plain(cell) for name, cell in zip(names, filled, strict=False)}
            first = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}: save it as CSV again") from error


def _quoted(cell: str) -> str:
    """A text that a spreadsheet does not take for a formula."""
    return f"'{cell}" if cell.startswith(_FORMULA) or cell.startswith("'") else cell


def _plain(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and cell[1:2] in (*_FORMULA, "'") else cell
