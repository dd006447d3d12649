"""What the page of `review` is given, and what it may decide; without a browser."""

import json
import wave
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from review_world import WORDS, check, decisions, refusal, small_data_set, utterance, write_data_set, write_recording

from higgstune.errors import DataError
from higgstune.pages.server import Reply, Request
from higgstune.raw.proofreading import Behind, Filter, Review
from higgstune.raw.review_app import ReviewApp

IDS = [utterance(number)["id"] for number in range(6)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return small_data_set(tmp_path)


def answer(app: ReviewApp, route: str, body: Any = None, **query: str) -> Reply:
    return app.routes[route](Request(query, body))


def content(app: ReviewApp, route: str, body: Any = None, **query: str) -> Any:
    return json.loads(answer(app, route, body, **query).content)


def test_the_worst_comes_first_and_what_is_refused_last(tmp_path: Path) -> None:
    kept = [
        utterance(0),
        utterance(1, measures={"snr": None}),
        utterance(2, history=[check("noise", 15.0)], measures={"snr": 15.0}),
        utterance(3, history=[check("text", 0.2)]),
        utterance(4, history=[check("text", 0.3), check("noise", 12.0)]),
    ]
    refused = [refusal(5, "text", 0.9), refusal(6, "text", 0.5)]
    refused[1]["history"][0]["verdict"] = "refused"
    found = Review(write_data_set(tmp_path, kept, refused)).ids()
    assert found == [utterance(number)["id"] for number in (4, 3, 2, 0, 1, 6, 5)]


@pytest.mark.parametrize(
    ("only", "numbers"),
    [
        (Filter(), [2, 3, 4, 1, 0, 5]),
        (Filter(kind="refused"), [5]),
        (Filter(kind="kept", speaker="speaker01"), [3, 1]),
        (Filter(flag="noise"), [3, 5]),
        (Filter(words="CHARLIE"), [2]),
        (Filter(words="too"), [2]),  # recognised
        (Filter(words="-00004"), [2]),
        (Filter(status="accepted"), [0]),
        (Filter(status="open", kind="kept"), [2, 3, 4, 1]),
    ],
)
def test_filters(tmp_path: Path, only: Filter, numbers: list[int]) -> None:
    kept = [utterance(number, measures={"snr": 30.0 - number}) for number in range(5)]
    kept[2] |= {"recognised": "charlie one charlie too", "history": [check("text", 0.3)]}
    kept[3] |= {"history": [check("noise", 15.0)]}
    review = Review(write_data_set(tmp_path, kept, [refusal(5, "noise", 4.0)]))
    review.decide(0, 1, {"id": IDS[0], "keep": True})
    assert review.ids(only) == [IDS[number] for number in numbers]


def test_a_decision_is_on_the_disk_and_in_the_counts(data: Path) -> None:
    app = ReviewApp(data)
    body = {"seen": 0, "generation": 1, "decision": {"id": IDS[1], "text": "Bravo.", "keep": True}}
    done = content(app, "POST /decide", body)
    assert (done["made"], done["sequence"]) == ([1], 1)
    assert [(row["text"], row["status"]) for row in done["rows"]] == [("Bravo.", "accepted")]
    assert decisions(data) == [{"id": IDS[1], "text": "Bravo.", "keep": True}]
    state = content(app, "GET /state")
    assert state["status"] == {"open": 5, "accepted": 1, "edited": 0, "dropped": 0}
    assert (state["utterances"], state["refused"]) == (6, 1)
    assert state["kept_seconds"] == pytest.approx(5 * 1.8)
    assert state["speakers"] == {"speaker01": 3, "speaker02": 3}
    assert content(ReviewApp(data), "GET /state") == state  # after a restart


def test_two_tabs_lose_nothing(data: Path) -> None:
    app = ReviewApp(data)
    here = {"seen": 0, "generation": 1, "decision": {"id": IDS[0], "text": "Here."}}
    there = {"seen": 0, "generation": 1, "decision": {"id": IDS[0], "text": "There."}}
    other = {"seen": 0, "generation": 1, "decision": {"id": IDS[1], "keep": False}}
    assert answer(app, "POST /decide", here).status == 200
    refused = answer(app, "POST /decide", there)
    late = json.loads(refused.content)
    assert refused.status == 409
    assert IDS[0] in late["error"]
    assert [row["text"] for row in late["rows"]] == ["Here."]
    done = content(app, "POST /decide", other)  # another utterance: that is appended, and the first change said
    assert {row["id"] for row in done["rows"]} == {IDS[0], IDS[1]}
    assert answer(app, "POST /decide", there | {"seen": done["sequence"]}).status == 200
    assert [line.get("text") for line in decisions(data)] == ["Here.", None, "There."]
    assert [row["text"] for row in content(app, "GET /changes", seen="1")["rows"]] == [
        "There.",
        f"{WORDS[1]} one, {WORDS[1]} two.",
    ]


def test_undo(data: Path) -> None:
    review = Review(data)
    review.decide(0, 1, {"id": IDS[0], "keep": False})
    review.decide(1, 1, {"id": IDS[0], "text": "New."})
    review.decide(2, 1, {"undo": 1})
    (row,) = review.views([IDS[0]])
    assert (row["status"], row["text"]) == ("edited", "New.")
    with pytest.raises(Behind, match="undone already"):
        review.decide(3, 1, {"undo": 1})
    review.decide(3, 1, {"undo": 3})
    assert review.views([IDS[0]])[0]["status"] == "dropped"
    assert len(decisions(data)) == 4


def test_a_speaker_is_renamed_and_merged_in_one_line(data: Path) -> None:
    app = ReviewApp(data)
    content(app, "POST /decide", {"seen": 0, "generation": 1, "rename": "speaker02", "to": "anna"})
    content(app, "POST /decide", {"seen": 1, "generation": 1, "rename": "speaker01", "to": "anna"})
    assert content(app, "GET /state")["speakers"] == {"anna": 6}
    assert [(line["speaker"], len(line["ids"])) for line in decisions(data)] == [("anna", 3), ("anna", 3)]
    again = answer(app, "POST /decide", {"seen": 2, "generation": 1, "rename": "speaker01", "to": "bert"})
    assert again.status == 409
    content(app, "POST /decide", {"seen": 2, "generation": 1, "decision": {"undo": 1}})
    assert content(app, "GET /state")["speakers"] == {"speaker02": 3, "anna": 3}


def test_pieces_are_reviewed_at_once(data: Path) -> None:
    app = ReviewApp(data)
    cut = {"id": IDS[0], "cut": [0.95], "texts": ["alpha one,", "alpha two."]}
    done = content(app, "POST /decide", {"seen": 0, "generation": 1, "decision": cut})
    assert done["structural"]
    first, second = sorted(done["rows"], key=lambda row: row["start"])
    assert (first["id"], first["text"], second["text"]) == (IDS[0], "alpha one,", "alpha two.")
    assert first["next"]["id"] == second["id"]
    assert second["next"]["id"] == IDS[1]
    assert second["flags"] == ["new"]
    assert second["recognised"] is None
    ids = content(app, "GET /list")["ids"]
    assert ids.index(second["id"]) == ids.index(first["id"]) + 1
    with wave.open(BytesIO(answer(app, "GET /sound", id=second["id"]).content)) as sound:
        assert sound.getnframes() / sound.getframerate() == pytest.approx(
            second["end"] - second["start"] + 1.0, abs=1e-3
        )
    content(app, "POST /decide", {"seen": 1, "generation": 1, "decision": {"undo": 1}})
    assert second["id"] not in content(app, "GET /list")["ids"]


def test_a_sound_has_half_a_second_on_both_sides(data: Path) -> None:
    reply = answer(ReviewApp(data), "GET /sound", id=IDS[1])
    assert (reply.headers["X-Start"], reply.headers["X-End"]) == ("0.5000", "2.3000")
    samples, rate = soundfile.read(BytesIO(reply.content))
    assert len(samples) / rate == pytest.approx(2.8, abs=1e-3)
    speech = np.abs(samples[round(0.7 * rate) : round(1.2 * rate)]).max()
    assert speech == pytest.approx(0.3, abs=0.01)
    assert np.abs(samples[round(1.27 * rate) : round(1.43 * rate)]).max() < 0.001
    assert answer(ReviewApp(data), "GET /sound", id="gone").status == 404


def test_what_is_refused_and_quiet_is_raised(tmp_path: Path) -> None:
    write_recording(tmp_path, 4.0)
    path = tmp_path / "raw" / "talk.wav"
    samples, rate = soundfile.read(path)
    soundfile.write(path, samples / 100, rate, subtype="FLOAT")
    row = refusal(0, "noise", 3.0) | {"measures": {"snr": 3.0}}
    reply = answer(ReviewApp(write_data_set(tmp_path, [], [row])), "GET /sound", id=row["id"])
    assert np.abs(soundfile.read(BytesIO(reply.content))[0]).max() == pytest.approx(
        0.3 / 100 * 10 ** (30 / 20), abs=0.01
    )


def test_without_the_recording_there_is_the_clip_alone(data: Path) -> None:
    (data.parent / "raw" / "talk.wav").unlink()
    app = ReviewApp(data)
    reply = answer(app, "GET /sound", id=IDS[0])
    assert (reply.headers["X-Context"], reply.headers["X-Start"]) == ("0", "0.0000")
    with pytest.raises(DataError, match=r"talk\.wav is not where it was"):
        answer(app, "GET /sound", id=IDS[5])  # refused: it has no clip


@pytest.mark.parametrize(
    "change",
    [
        {"audio": "../secret.flac", "segment": {"recording": "gone.wav", "start": 0.0, "end": 1.0, "speech": []}},
        {"audio": "/etc/hostname", "segment": {"recording": "../secret.flac", "start": 0.0, "end": 1.0, "speech": []}},
        {"audio": "clips/link.flac", "segment": {"recording": "link.wav", "start": 0.0, "end": 1.0, "speech": []}},
    ],
)
def test_nothing_outside_is_read(data: Path, change: dict[str, Any]) -> None:
    """A data set of a stranger may name any file."""
    secret = data.parent / "secret.flac"
    soundfile.write(secret, np.zeros(16_000), 16_000)
    (data / "clips" / "link.flac").symlink_to(secret)
    (data.parent / "raw" / "link.wav").symlink_to(secret)
    write_data_set(data.parent, [utterance(0), utterance(1)], [])
    rows = [json.dumps(utterance(0, **change))]
    (data / "manifest.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match="not where it was"):
        answer(ReviewApp(data), "GET /sound", id=IDS[0])


def test_a_new_collection_is_noticed(data: Path) -> None:
    app = ReviewApp(data)
    rows = (data / "manifest.jsonl").read_text().splitlines()
    (data / "manifest.jsonl").write_text("\n".join(rows[1:]) + "\n")
    assert content(app, "GET /changes", seen="0")["generation"] == 2
    late = answer(app, "POST /decide", {"seen": 0, "generation": 1, "decision": {"id": IDS[1], "keep": True}})
    assert late.status == 409
    assert not decisions(data)


@pytest.mark.parametrize(
    "body", [None, {"seen": "x"}, {"seen": 0, "generation": 1}, {"seen": 0, "generation": 1, "decision": {"id": "x"}}]
)
def test_a_broken_request_changes_nothing(data: Path, body: Any) -> None:
    with pytest.raises(DataError):
        answer(ReviewApp(data), "POST /decide", body)
    assert not decisions(data)


def test_a_folder_that_is_not_a_data_set_is_named(tmp_path: Path, data: Path) -> None:
    with pytest.raises(DataError, match=r"holds no manifest\.jsonl"):
        Review(tmp_path)
    (data / "manifest.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match=r"manifest\.jsonl:1 does not come from `collect`"):
        Review(data)


def test_texts_may_hold_any_character(tmp_path: Path) -> None:
    text = "a\u2028b </script> \u0085 \U0001f600"
    out = write_data_set(tmp_path, [utterance(0)], [])
    (out / "manifest.jsonl").write_text(
        json.dumps(utterance(0, text=text), ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert content(ReviewApp(out), "POST /rows", {"ids": [IDS[0]]})["rows"][0]["text"] == text


def test_a_recording_that_cannot_be_read_in_parts_is_decoded_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(file: soundfile.SoundFile, start: float, end: float) -> None:
        raise soundfile.LibsndfileError(1, "it has no seek: ")

    whole = answer(ReviewApp(data), "GET /sound", id=IDS[1])
    monkeypatch.setattr("higgstune.raw.review_sound._read", refuses)
    app = ReviewApp(data)
    assert answer(app, "GET /sound", id=IDS[1]).content == whole.content
    assert len(list((data / ".cache").iterdir())) == 1
    app.close()
    assert not list((data / ".cache").iterdir())
