"""Rows from tables of clips: `metadata.csv` of LJSpeech, file lists of trainers, tables with a header."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from higgstune.data.importers.columns import UNUSED, Reading, by_content, by_name, is_header, is_normalised, not_words
from higgstune.data.importers.recordings import Recordings
from higgstune.data.manifest import Utterance, parse_utterance
from higgstune.data.messages import is_unicode
from higgstune.data.origin import ORIGIN
from higgstune.data.rejection import RowError
from higgstune.data.source import Source, SourceRow, decode_lines, read_whole, without_audio_suffix
from higgstune.errors import DataError

SEPARATORS = {"|": "|", "\t": "TAB", ";": ";", ",": ","}
_QUOTED = ",;"  # separators of tables in which a cell may stand in quotes
_HINT = (
    "write one clip a line: id|text or id|text|normalised text, or a header such as file_name,text,speaker; or say "
    "with --columns what each column is"
)
_GPT_SOVITS = "audio,speaker,language,text"  # the columns of a .list
_TIMES = ("start", "end", "duration")
_BLANK = ("", "nan", "null", "none", "n/a", "<na>")  # a missing value, as pandas and others write it
_MAX_QUOTED_LINES = 50  # that one quoted cell may span


@dataclass(frozen=True)
class _Line:
    """A row of cells, or why there is none."""

    number: int  # in the file, from 1
    cells: list[str]
    problem: str | None = None


def read_table(path: Path, *, allow_outside: bool = False, columns: str | None = None) -> Source:
    """The rows of a table of clips. What each column means is decided from the whole table, see `columns`.

    Cells are separated by `|`, TAB, `;` or commas. The normalised text is used where there is one. The recording of
    an id is looked for, with any known suffix, in `wavs/` and beside the table: see `Recordings`.

    Raises DataError for a table that cannot be read, has no rows, or does not say which column is which; ConfigError
    for `columns` that do not fit.
    """
    lines = decode_lines(read_whole(path))
    if lines[0].lower().startswith("sep="):  # Excel's, about the separator
        lines[0] = ""
    if not any(line.strip() for line in lines):
        raise DataError(f"{path} is empty: {_HINT}")
    recordings = Recordings(path.parent, allow_outside)
    separator, reading, rows = _read(path, lines, recordings, columns)
    if not rows:
        raise DataError(f"{path} has a header but no rows: {_HINT}")
    for role in {"text", "normalised"}.intersection(reading.roles) if columns is None else ():
        words = reading.roles.index(role)
        if problem := not_words([line.cells[words] for line in rows if len(line.cells) > words]):
            raise DataError(f"{path}, read as {reading}: {problem}; say with --columns what the columns are")
    index = reading.roles.index("audio")
    recordings.expect(line.cells[index].strip() for line in rows if len(line.cells) > index and not line.problem)
    found = [
        _source_row(path, line, reading, recordings, separator, lines[line.number - 1], allow_outside) for line in rows
    ]
    joined = sum(
        len(line.cells) > len(reading.roles) and isinstance(row.content, Utterance)
        for line, row in zip(rows, found, strict=True)
    )

    def notes() -> Iterator[str]:
        if joined:
            yield f"{SEPARATORS[separator]} in a text, which is the last column and was kept whole: {joined} rows"
        yield from recordings.notes()

    return Source(found, f"{path.name}, columns separated by {SEPARATORS[separator]}: {reading}", notes)


def looks_like_table(path: Path) -> bool:
    """Whether the first line of a file is a header, or has several cells the first of which names a recording."""
    lines = decode_lines(read_whole(path))
    first = next((line for line in lines if line.strip()), "")
    cells = [cell.strip() for cell in re.split(r"[|\t;,]", first)]
    return len(cells) > 1 and (is_header(cells) or Recordings(path.parent, False).has(cells[0]))


def _read(
    path: Path, lines: Sequence[str], recordings: Recordings, columns: str | None
) -> tuple[str, Reading, list[_Line]]:
    """The separator of a table, the meaning of its columns, and its rows."""
    parsed = {separator: _split(lines, separator) for separator in SEPARATORS}
    for separator, rows in parsed.items():
        if not rows:
            continue
        header = [cell.strip() for cell in rows[0].cells]
        if len(header) > 1 and (reading := by_name(header, columns)) is not None:
            return separator, reading, _split(lines, separator, len(header), recordings)[1:]
        if len(header) > 1 and is_header(header) and not any(map(recordings.has, header)):
            raise DataError(
                f"{path}: its columns are {', '.join(header)}; say which are the recording and the text with "
                "--columns, such as audio=path,text=words"
            )
    separator = max(SEPARATORS, key=lambda name: _fit(parsed[name], recordings))
    rows = parsed[separator]
    if sum(len(line.cells) > 1 for line in rows) <= len(rows) / 2:
        raise DataError(f"{path} is not a table of clips: no line has several cells; {_HINT}")
    width = _width(path, rows, separator)
    if columns is None and path.suffix.lower() == ".list" and width == _GPT_SOVITS.count(",") + 1:
        columns = _GPT_SOVITS
    rows = _split(lines, separator, width, recordings)
    whole = [[cell.strip() for cell in line.cells] for line in rows if len(line.cells) == width and not line.problem]
    try:
        if columns is None and separator in _QUOTED and not any(map(recordings.has, (row[0] for row in whole))):
            raise DataError(f"its first line is `{SEPARATORS[separator].join(whole[0])}`; {_HINT}")
        return separator, by_content(whole, recordings.has, columns), rows
    except DataError as error:
        what = "TAB" if separator == "\t" else f"`{separator}`"
        raise DataError(f"{path}, columns separated by {what}: {error}") from error


def _fit(rows: Sequence[_Line], recordings: Recordings) -> tuple[int, int]:
    """How well a separator fits a table without a header: rows that begin with a recording, rows of several cells."""
    several = [line for line in rows if len(line.cells) > 1]
    return sum(recordings.has(line.cells[0].strip()) for line in several), len(several)


def _width(path: Path, rows: Sequence[_Line], separator: str) -> int:
    """The number of cells that most rows have. Raises DataError where two numbers are equally frequent."""
    counts = Counter(len(line.cells) for line in rows if not line.problem and len(line.cells) > 1).most_common(2)
    if not counts:
        raise DataError(f"{path} has no row that can be read: {_HINT}")
    if len(counts) == 2 and counts[0][1] == counts[1][1]:
        raise DataError(
            f"{path}: {counts[0][1]} rows have {counts[0][0]} columns, separated by {SEPARATORS[separator]}, and as "
            f"many have {counts[1][0]}: write a header, such as file_name{separator}text"
        )
    return counts[0][0]


def _split(
    lines: Sequence[str], separator: str, width: int | None = None, recordings: Recordings | None = None
) -> list[_Line]:
    """The cells of every line that is not empty. A quoted cell may span lines if its row then has `width` cells, and
    none of the other lines begins with a recording, as a row of its own does.
    """
    found, index = [], 0
    while index < len(lines):
        number, line = index + 1, lines[index]
        index += 1
        if not line.strip(" \r\n"):
            continue
        cells, problem = _cells(line, separator)
        is_open = any(cell.strip().startswith('"') and cell.count('"') % 2 for cell in cells)
        if problem is None and not (width and is_open):
            found.append(_Line(number, cells))
            continue
        for last in range(index, min(index + _MAX_QUOTED_LINES, len(lines))):
            if recordings is not None and recordings.has(lines[last].split(separator)[0].strip().strip('"')):
                break
            longer, fails = _quoted_cells("\n".join(lines[number - 1 : last + 1]), separator)
            if fails is None and len(longer) == (width or len(longer)):
                found.append(_Line(number, longer))
                index = last + 1
                break
        if index == number:  # no line was taken
            found.append(_Line(number, cells if problem is None else line.split(separator), problem))
    return found


def _cells(line: str, separator: str) -> tuple[list[str], str | None]:
    """The cells of one line, and what is wrong with them."""
    if separator in _QUOTED:
        return _quoted_cells(line, separator)
    cells = line.split(separator)
    filled = [cell.strip() for cell in cells if cell.strip()]
    if len(filled) > 1 and all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in filled):  # every cell is quoted
        return [cell.strip()[1:-1].replace('""', '"') for cell in cells], None
    return [_unquoted(cell) for cell in cells], None


def _quoted_cells(line: str, separator: str) -> tuple[list[str], str | None]:
    """The cells of a line in which cells may stand in quotes, and what is wrong with them."""
    cells: list[str] = []
    at = 0
    while True:
        start = at + len(line[at:]) - len(line[at:].lstrip(" "))
        if line[start : start + 1] == '"':
            match = re.compile(r'"((?:[^"]|"")*)" *').match(line, start)
            if match is None:
                return cells, f"the quote at column {start + 1} is not closed"
            cells.append(match[1].replace('""', '"'))
            at = match.end()
            if at < len(line) and line[at] != separator:
                return cells, f"a quote stands in the quoted cell at column {start + 1}: write it twice"
        else:
            end = line.find(separator, at)
            end = len(line) if end < 0 else end
            cells.append(line[at:end])
            at = end
        if at >= len(line):
            return cells, None
        at += 1


def _unquoted(cell: str) -> str:
    """A cell of a table without quoting; one that a spreadsheet has quoted, as its inner quotes show, loses them."""
    inner = cell.strip()[1:-1]
    is_quoted = cell.strip().startswith('"') and cell.strip().endswith('"') and len(inner) > 1
    return inner.replace('""', '"') if is_quoted and '""' in inner and '"' not in inner.replace('""', "") else cell


def _source_row(
    path: Path, line: _Line, reading: Reading, recordings: Recordings, separator: str, raw: str, allow_outside: bool
) -> SourceRow:
    location = f"{path.name}:{line.number}"
    try:
        row = _utterance(line, reading, recordings, separator, raw)
    except RowError as error:
        first = line.cells[0].strip() if line.cells else ""
        return SourceRow(location, path.parent, error, id=first or None)
    return SourceRow(location, path.parent, row, row.id, row.audio, allow_outside)


def _utterance(line: _Line, reading: Reading, recordings: Recordings, separator: str, raw: str) -> Utterance:
    if line.problem is not None:
        raise RowError("bad_row", line.problem)
    values = reading.values([cell.strip() for cell in _fitted(line, reading, separator, raw)])
    if broken := [name for name, value in values.items() if not is_unicode(value)]:
        raise RowError("bad_row", f"the column {broken[0]} is not UTF-8: convert the table")
    values = {name: value for name, value in values.items() if value.lower() not in _blanks(name)}
    if not values.get("audio"):
        raise RowError("bad_row", "the line names no recording")
    if not (values.get("normalised") or values.get("text")):
        raise RowError("empty_text", "the line has no text")
    audio = recordings.find(values["audio"])
    reference = values.get("reference_audio")
    start, end = _segment(values)
    row = {
        "audio": audio,
        "text": values.get("normalised") or values["text"],
        "id": without_audio_suffix(values.get("id") or (values["audio"] if values["audio"] in audio else audio)),
        **{name: values.get(name) for name in ("speaker", "language", "scene", *ORIGIN)},
        "reference_audio": reference and recordings.find(reference),
        "reference_text": values.get("reference_text") if reference else None,
        "start": start,
        "end": end,
    }
    return parse_utterance(row)


def _blanks(role: str) -> tuple[str, ...]:
    """What stands for a missing value: in a text, "Null" is a word, and in a time an error."""
    return _BLANK[:1] if role in _TIMES else _BLANK[:2] if role in ("text", "normalised") else _BLANK


def _segment(values: dict[str, str]) -> tuple[float | None, float | None]:
    """Start and end in seconds. A duration is one of a segment only beside a start."""
    try:
        start, end, duration = (float(cell) if (cell := values.get(n)) else None for n in _TIMES)
    except ValueError as error:
        raise RowError("bad_row", f"a time is not a number of seconds: {error}") from error
    if end is None and start is not None and duration is not None:
        end = start + duration
    return start, end


def _fitted(line: _Line, reading: Reading, separator: str, raw: str) -> Sequence[str]:
    """As many cells as columns. More are part of the text where that is last; else they are an error of the row."""
    width = len(reading.roles)
    cells = line.cells
    while len(cells) > width and not cells[-1].strip():
        cells = cells[:-1]
    if len(cells) > width:
        another_spelling = reading.text_is_last and is_normalised([cells[-1]], [cells[-2]])
        if reading.text_is_last and '"' not in raw and not another_spelling:
            return [*cells[: width - 1], raw.split(separator, width - 1)[-1]]
        raise RowError(
            "bad_row",
            f"{len(cells)} cells, and the table has {width} columns: put the text in quotes, or write it in the last "
            "column",
        )
    if set(reading.roles[len(cells) :]) - {"normalised", UNUSED, *ORIGIN}:
        raise RowError("bad_row", f"{len(cells)} cells, and the table has {width} columns")
    return cells
