"""What is stated of recordings: from any kind of source into the store, and what a store or a card then says."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from commands import Command
from preparing import manifest, run
from recordings import speech, write

from higgstune.data import shard_writer
from higgstune.data.entry import stored_entries
from higgstune.data.importers import read_source
from higgstune.data.manifest import Utterance
from higgstune.data.origin import ORIGIN, in_words, join_origins, origin_as_json, origin_from_json
from higgstune.data.store import CodeStore

STATED = {"source": "own phone", "licence": "CC-BY-4.0", "consent": "Anna, for all uses, 2026"}


def source(folder: Path, *stated: dict[str, Any]) -> Path:
    rows = []
    for number, one in enumerate(stated):
        write(folder / f"{number}.wav", speech(0.5, seed=number))
        rows.append({"audio": f"{number}.wav", "text": f"Number {number}.", "segment": {"start": 0.0}} | one)
    return manifest(folder, *rows)


def test_statements_become_columns_that_a_later_preparation_corrects(tmp_path: Path, command: Command) -> None:
    spoken = {"role": "assistant", "content": [{"type": "audio", "url": "1.wav"}]}
    talk = {"messages": [{"role": "user", "content": "Good morning."}, spoken], **STATED}
    path = source(tmp_path / "raw", STATED, {"licence": ""})
    rows = [json.loads(path.read_text().splitlines()[0]), talk, {"audio": "1.wav", "text": "Two.", "licence": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(path, tmp_path / "store").added == 3
    origin = CodeStore.open(tmp_path / "store").origin()
    assert origin == {name: {STATED[name]: 2, None: 1} for name in ORIGIN}
    _, out, _ = command("inspect", tmp_path / "store")
    assert "licence: CC-BY-4.0 (2 rows); not stated (1 row); consent: Anna, for all uses, 2026 (2 rows)" in out
    found = json.loads(command("inspect", tmp_path / "store", "--json")[1])["origin"]
    assert found["licence"] == [{"says": "CC-BY-4.0", "rows": 2}, {"says": None, "rows": 1}]
    rows[0]["licence"] = rows[2]["licence"] = "CC0-1.0"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(path, tmp_path / "store").updated == 2
    assert CodeStore.open(tmp_path / "store").origin()["licence"] == {"CC0-1.0": 2, "CC-BY-4.0": 1}


def test_a_store_of_an_earlier_version_states_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        whole = shard_writer.store_schema
        patch.setattr(shard_writer, "store_schema", lambda books: without_origin(whole(books)))
        run(source(tmp_path / "raw", STATED, STATED), tmp_path / "store", validation_fraction=0.0)
    [shard] = (tmp_path / "store").glob("*.parquet")
    assert not set(ORIGIN) & set(pq.read_schema(shard).names)
    assert CodeStore.open(tmp_path / "store").origin() == {name: {None: 2} for name in ORIGIN}
    monkeypatch.setattr(shard_writer, "_SHORT", 0)
    run(source(tmp_path / "raw", {}, {}, STATED), tmp_path / "store", validation_fraction=0.0)
    store = CodeStore.open(tmp_path / "store")
    assert [shard.rows for shard in store.shards] == [2, 1]  # the old one stays
    assert store.origin()["consent"] == {None: 2, STATED["consent"]: 1}
    assert [entry.consent for entry in stored_entries(store)] == [None, None, STATED["consent"]]


def without_origin(schema: Any) -> Any:
    for name in ORIGIN:
        schema = schema.remove(schema.get_field_index(name))
    return schema


def test_statements_of_other_programs_are_read_and_refuse_no_row(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", speech(0.5))
    write(tmp_path / "b.wav", speech(0.5))
    table = tmp_path / "metadata.csv"
    table.write_text("file_name|text|license\na.wav|Good morning.|CC-BY-4.0\nb.wav|Good evening.\n")
    assert [row.content.licence for row in read_source(table) if isinstance(row.content, Utterance)] == [
        "CC-BY-4.0",
        None,
    ]
    rows = [
        {"audio": "a.wav", "text": "Good morning.", "source": {"url": "https://example.org"}, "content": 1},
        {"audio": "b.wav", "text": "Good evening.", "source": 3, "source_id": 4, "sources": []},
    ]
    found = [row.content for row in read_source(manifest(tmp_path, *rows))]
    assert [one.source for one in found if isinstance(one, Utterance)] == ['{"url": "https://example.org"}', "3"]


def test_a_card_says_what_most_rows_say_and_takes_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("higgstune.data.origin._MAX_STATEMENTS", 2)
    one = join_origins([])
    one["source"].update({"a": 1, "b": 3, "c": 2, None: 1})
    listed = origin_as_json(one)["source"]
    assert listed == [{"says": "b", "rows": 3}, {"says": "c", "rows": 2}, {"says": "2 others", "rows": 2}]
    assert origin_from_json({"source": listed})["source"] == {"b": 3, "c": 2, "2 others": 2}
    assert in_words(one["source"]) == "b (3 rows); c (2 rows); a (1 row); not stated (1 row)"
    assert in_words({None: 4}) == in_words({}) == "not stated"
    assert in_words({str(n): 1 for n in range(25)}).endswith("; 19 (1 row); 5 others")
    odd: Any
    for odd in (None, [], {"source": 3, "licence": [{"says": 1, "rows": 2}, 5, {"says": "a", "rows": "b"}]}):
        assert origin_from_json(odd) == join_origins([])
