"""`review.csv`: written, changed as a spreadsheet changes it, and read back."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from review_world import check, decisions, refusal, small_data_set, utterance

from higgstune.errors import DataError
from higgstune.files import alone_in
from higgstune.raw.proofreading import read_rows
from higgstune.raw.review_table import apply_table, read_review, table_of

TRICKY = '=1+1; "quoted", and\na second line'


def rows() -> list[dict[str, Any]]:
    kept = [utterance(0), utterance(1, text=TRICKY, history=[check("noise", 15.0)]), utterance(2, speaker=None)]
    return [*kept, refusal(3, "noise", 4.0)]


def changed(tmp_path: Path, changes: dict[int, dict[str, str]], *, delimiter: str = ",", mark: bool = True) -> Path:
    """The table with other values in some rows, as a spreadsheet saves it."""
    table = list(csv.DictReader(io.StringIO(table_of(rows()).removeprefix("\ufeff"), newline="")))
    for number, change in changes.items():
        table[number] |= change
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(table)
    path = tmp_path / "review.csv"
    path.write_text(text.getvalue(), encoding="utf-8-sig" if mark else "utf-8", newline="")
    return path


def test_a_table_names_what_is_odd_and_computes_nothing() -> None:
    text = table_of(rows())
    assert text.startswith("\ufeffid,keep,text,speaker,recognised,flags,note,hash")
    table = list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline="")))
    assert [row["keep"] for row in table] == ["yes", "yes", "yes", "no"]
    assert (table[1]["text"], table[1]["flags"]) == (f"'{TRICKY}", "noise")
    assert table[3]["note"] == "noise: noise is 4.0"
    assert len({row["hash"] for row in table}) == 4


@pytest.mark.parametrize("delimiter", [",", ";"])
@pytest.mark.parametrize("mark", [True, False])
def test_only_differences_become_decisions(tmp_path: Path, delimiter: str, mark: bool) -> None:
    assert read_review(changed(tmp_path, {}, delimiter=delimiter, mark=mark), rows()) == []
    changes = {
        0: {"text": " Größer; als, "},
        1: {"keep": "FALSE"},
        2: {"speaker": "anna", "keep": "yes"},
        3: {"keep": "yes", "text": "New."},
    }
    ids = [row["id"] for row in rows()]
    assert read_review(changed(tmp_path, changes, delimiter=delimiter, mark=mark), rows()) == [
        {"id": ids[0], "text": "Größer; als,"},
        {"id": ids[1], "keep": False},
        {"id": ids[2], "speaker": "anna"},
        {"id": ids[3], "text": "New.", "keep": True},
    ]


def test_rows_may_be_sorted_and_deleted_and_columns_too(tmp_path: Path) -> None:
    path = changed(tmp_path, {1: {"keep": "no"}})
    table = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    text = "hash,id,keep\n" + "".join(f"{table[n]['hash']},{table[n]['id']},{table[n]['keep']}\n" for n in (2, 1))
    path.write_text(f"{text},,\n")
    assert read_review(path, rows()) == [{"id": rows()[1]["id"], "keep": False}]


def test_unknown_ids_and_values_are_named_by_their_lines(tmp_path: Path) -> None:
    twice = rows()[1]["id"]
    path = changed(tmp_path, {0: {"id": "gone"}, 2: {"keep": "maybe"}, 3: {"id": twice}})
    with pytest.raises(DataError, match="nothing is applied") as caught:
        read_review(path, rows())
    lines = str(caught.value).splitlines()[1:]
    assert lines[0].strip() == "line 2: there is no utterance 'gone'"
    assert (
        lines[1].strip() == f"line 5: {rows()[2]['id']}: keep is 'maybe': write yes or no"
    )  # the one before has two lines
    assert lines[2].strip() == f"line 6: {twice} is in line 3, too"


@pytest.mark.parametrize(
    ("change", "message"), [({"text": " "}, "text is empty: write no"), ({"speaker": ""}, "speaker is")]
)
def test_what_is_emptied_is_named(tmp_path: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        read_review(changed(tmp_path, {0: change}), rows())


def test_an_utterance_that_has_changed_since_is_refused_only_where_its_row_was_changed(tmp_path: Path) -> None:
    path = changed(tmp_path, {0: {"text": "Mine."}})
    now = rows()
    now[1]["text"] = "Changed on the page."
    assert read_review(path, now) == [{"id": now[0]["id"], "text": "Mine."}]
    now[0]["text"] = "Changed on the page, too."
    with pytest.raises(DataError, match=r"line 2: .* has changed since"):
        read_review(path, now)
    now[0]["text"] = "Mine."  # as after the table was applied: applying it again changes nothing
    assert read_review(path, now) == []
    moved = rows()
    moved[0]["segment"]["end"] += 0.5
    with pytest.raises(DataError, match=r"line 2: .* has changed since"):
        read_review(path, moved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ":1: there is no column 'id'"),
        (b"id,keep\na,yes\n", ":1: there is no column 'hash'"),
        ("id,hash,text\na,b,Größe\n".encode("cp1252"), "is not UTF-8 .*: save it as `CSV UTF-8`"),
        (b"id,hash\na,b,c\n", ":2: it has more columns"),
        (b'id,hash\n"a' + b"x" * (2 << 20), "field larger than"),
    ],
)
def test_a_file_that_is_not_the_table_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_review(tmp_path / "x.csv", rows())
    with pytest.raises(DataError, match="cannot be read"):
        read_review(tmp_path / "missing.csv", rows())


def test_a_table_is_applied_to_a_data_set(tmp_path: Path) -> None:
    data = small_data_set(tmp_path)
    path = tmp_path / "mine.csv"
    path.write_text(table_of(read_rows(data)).replace(",yes,", ",no,", 1), encoding="utf-8")
    with alone_in(data, "review", ""), pytest.raises(DataError, match="another review"):
        apply_table(data, path)
    assert apply_table(data, path) == 1
    assert decisions(data) == [{"id": utterance(0)["id"], "keep": False}]
