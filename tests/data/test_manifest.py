"""The manifest: strict rows, conversations in one spelling, errors that say where."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from higgstune.data.manifest import Utterance, parse_line, parse_utterance, read_manifest, write_manifest
from higgstune.data.messages import audio_parts, is_target, normalize_messages, target_text
from higgstune.data.rejection import RowError
from higgstune.errors import DataError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "prompts.json").read_text(encoding="utf-8"))
WITH_TARGET = [entry for entry in GOLDEN if entry["messages"][-1]["content"][-1]["type"] == "audio"]
SCENE = "Generate audio following instruction.\n\n<|scene_desc_start|>\n{}\n<|scene_desc_end|>"
TARGET = {"role": "assistant", "content": [{"type": "audio", "url": "target.wav"}]}
USER = {"role": "user", "content": [{"type": "text", "text": "Hello."}]}

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
seconds = st.floats(0, 1e6, allow_nan=False)
utterances = st.builds(
    Utterance,
    audio=texts,
    text=texts,
    id=st.none() | texts,
    speaker=st.none() | texts,
    language=st.none() | texts,
    scene=st.none() | texts,
    reference_audio=st.none() | texts,
    start=st.none() | seconds,
)


@settings(deadline=None, max_examples=60)
@given(st.lists(utterances, min_size=1, max_size=5))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[Utterance]) -> None:
    path = tmp_path_factory.mktemp("manifest") / "rows.jsonl"
    write_manifest(path, rows)
    assert [row for _, row in read_manifest(path)] == rows


@pytest.mark.parametrize("entry", WITH_TARGET, ids=lambda entry: entry["name"])
def test_a_conversation_survives_a_round_trip(tmp_path: Path, entry: dict[str, Any]) -> None:
    row = parse_utterance({"messages": entry["messages"], "start_index": entry.get("start_index")})
    write_manifest(tmp_path / "rows.jsonl", [row])
    assert [read for _, read in read_manifest(tmp_path / "rows.jsonl")] == [row]


@pytest.mark.parametrize("entry", [e for e in GOLDEN if "Processor" in e["reference"]], ids=lambda e: e["name"])
def test_native_conversations_stay_as_they_are(entry: dict[str, Any]) -> None:
    assert normalize_messages(entry["messages"])[0] == entry["messages"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense", "not JSON"),
        (b'{"audio": "a.wav", "text": "b"', "not JSON"),
        (b"[1, 2]", "must be an object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"audio": "a.wav", "txt": "b"}', "'txt' is unknown; did you mean 'text'"),
        (b'{"audio": "a.wav", "text": "b", "zzz": 1}', "the valid ones are audio, text"),
        (b'{"audio": "a.wav"}', "text missing"),
        (b"{}", "audio and text missing"),
        (b'{"audio": 5, "text": "b"}', "audio: Input should be a valid string, got 5"),
        (b'{"audio": "a.wav", "text": ["b"]}', "text: Input should be a valid string"),
        (b'{"audio": "a.wav", "text": "b", "id": 7}', "id: Input should be a valid string"),
        (b'{"audio": "", "text": "b"}', "must not be empty"),
        (b'{"audio": "a.wav", "text": "b", "start": "1"}', "start: Input should be a valid number"),
        (b'{"audio": "a.wav", "text": "b", "start": true}', "start: Input should be a valid number"),
        (b'{"audio": "a.wav", "text": "b", "start": -1}', "greater than or equal to 0"),
        (b'{"audio": "a.wav", "text": "b", "start": NaN}', "NaN is not a JSON number"),
        (b'{"audio": "a.wav", "text": "b", "end": 1e999}', "finite"),
        (b'{"audio": "a.wav", "text": "b", "start": 2, "end": 2}', "segment from 2 to 2 s is empty"),
        (b'{"audio": "a.wav", "text": "b", "text": "c"}', "'text' occurs twice"),
        (b'{"audio": "a.wav", "text": "\\ud800"}', "surrogate"),
        (b'{"audio": "a.wav", "text": "b", "reference_text": "c"}', "reference_text without reference_audio"),
        (b'{"audio": "a.wav", "text": "b", "start_index": 1}', "start_index belongs to messages"),
        (b'{"messages": [], "text": "b"}', "text beside messages"),
        (b'{"messages": []}', "at least one message"),
        (b'{"messages": 1}', "valid list"),
    ],
)
def test_errors_of_broken_lines_name_the_problem(line: bytes, message: str) -> None:
    with pytest.raises(RowError) as refused:
        parse_line(line)
    assert refused.value.reason == "bad_row"
    assert message in str(refused.value)


def test_a_broken_line_does_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"audio": "a", "text": "b"}\r\n\n broken \n{"audio": "c", "text": "d"}')
    rows = dict(read_manifest(path))
    assert list(rows) == [1, 3, 4]
    assert isinstance(rows[3], RowError)
    assert rows[4] == Utterance(audio="c", text="d")


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff\n"])
def test_an_empty_manifest_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="has no row"):
        list(read_manifest(path))


def test_a_missing_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(read_manifest(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "audio", "url": "target.wav"}],
        [{"type": "audio", "audio_url": "target.wav"}],
        [{"type": "audio_url", "audio_url": "target.wav"}],
        [{"type": "audio_url", "audio_url": {"url": "target.wav"}}],
        {"type": "audio", "audio_url": "target.wav", "raw_audio": None, "offset": None, "row_id": 3},
    ],
)
def test_spellings_of_an_audio_part(content: Any) -> None:
    messages, _ = normalize_messages([{"role": "user", "content": "Hello."}, {"role": "assistant", "content": content}])
    assert messages == [USER, TARGET]


def test_a_scene_in_system_text_becomes_a_scene() -> None:
    """And what `start_index` points at stays the same message."""
    system = {"role": "system", "content": SCENE.format("Audio is recorded from a quiet room.")}
    messages, start = normalize_messages([system, USER, TARGET, USER, TARGET], start_index=4)
    assert messages == [
        {"role": "system", "content": [{"type": "text", "text": "Generate audio following instruction."}]},
        {"role": "scene", "content": [{"type": "text", "text": "Audio is recorded from a quiet room."}]},
        *[USER, TARGET, USER, TARGET],
    ]
    assert start == 5
    assert is_target(messages, start) == [False, True]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (SCENE.format("Audio is recorded from a quiet room.\n\nSPEAKER0: feminine\nSPEAKER1: masculine"), ""),
        (
            [
                {"type": "text", "text": "Generate audio following instruction.\n\n<|scene_desc_start|>\n"
                 "Audio is recorded from a quiet room.\n\nSPEAKER0: "},
                {"type": "audio", "audio_url": "reference0.wav"},
                {"type": "text", "text": "\nSPEAKER1: "},
                {"type": "audio", "audio_url": "reference1.wav"},
                {"type": "text", "text": "\n<|scene_desc_end|>"},
            ],
            "multi_speaker_clone",
        ),
    ],
)  # fmt: skip
def test_speakers_in_a_scene(content: Any, name: str) -> None:
    messages, _ = normalize_messages([{"role": "system", "content": content}, USER, TARGET])
    golden = {entry["name"]: entry["messages"][1] for entry in GOLDEN}
    if name:
        assert messages[1] == golden[name]
    else:
        assert [part["text"] for part in messages[1]["content"]] == [
            "Audio is recorded from a quiet room.",
            "SPEAKER0: feminine\nSPEAKER1: masculine",
        ]


def test_a_scene_alone_gets_the_usual_system_message() -> None:
    scene = {"role": "scene", "content": "A street."}
    only_scene = {"role": "system", "content": "<|scene_desc_start|>\nA street.\n<|scene_desc_end|>"}
    for first in (scene, only_scene):
        messages, start = normalize_messages([first, USER, TARGET], start_index=1)
        assert [message["role"] for message in messages] == ["system", "scene", "user", "assistant"]
        assert start == 2


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Say <|eot_id|> this."}, TARGET],
        [{"role": "user", "content": "Say <\u200b|eot_id|> this."}, TARGET],
        [
            USER,
            {"role": "assistant", "content": [{"type": "text", "text": "<|AUDIO_OUT|>"}, *TARGET["content"]]},
        ],
        [{"role": "user", "content": SCENE.format("A room.")}, TARGET],
        [{"role": "system", "content": "Do it.<|eot_id|>"}, USER, TARGET],
        [{"role": "system", "content": SCENE.format("A <|audio_bos|> room.")}, USER, TARGET],
        [{"role": "system", "content": "<|scene_desc_start|> never closed"}, USER, TARGET],
        [{"role": "system", "content": "<|scene_desc_end|>"}, USER, TARGET],
        [{"role": "system", "content": SCENE.format("A room.") + " and more"}, USER, TARGET],
        [{"role": "scene", "content": SCENE.format("A room.")}, USER, TARGET],
    ],
)
def test_control_tokens_are_refused(messages: Any) -> None:
    with pytest.raises(RowError) as refused:
        normalize_messages(messages)
    assert refused.value.reason == "control_token"


@pytest.mark.parametrize(
    ("messages", "reason", "message"),
    [
        ([USER], "no_target", "nothing to train on"),
        ([USER, TARGET, USER], "no_target", "nothing to train on"),
        ([USER, {"role": "assistant", "content": "Only text."}], "no_target", "nothing to train on"),
        (
            [{"role": "usr", "content": "Hi"}, TARGET],
            "bad_row",
            "messages[0] has the role 'usr'; did you mean 'user'",
        ),
        (
            [USER, {"role": "system", "content": "Late."}, TARGET],
            "bad_row",
            "system message must be the first",
        ),
        ([USER, {"role": "scene", "content": "Late."}, TARGET], "bad_row", "scene message must follow"),
        ([{"role": "user", "text": "Hi"}, TARGET], "bad_row", "messages[0]: the key 'text' is unknown"),
        ([{"role": "user", "content": " "}, TARGET], "empty_text", "messages[0] is empty"),
        ([{"role": "user", "content": []}, TARGET], "bad_row", "content must be a text or a list"),
        ([{"role": "user", "content": [{"type": "image"}]}, TARGET], "bad_row", "has the type 'image'"),
        (
            [{"role": "user", "content": [{"type": "text", "txt": ""}]}, TARGET],
            "bad_row",
            "did you mean 'text'",
        ),
        ([USER, {"role": "assistant", "content": [{"type": "audio"}]}], "bad_row", "needs the path"),
        (
            [USER, {"role": "assistant", "content": [{"type": "audio", "raw_audio": "UklGRg=="}]}],
            "bad_row",
            "raw_audio is not read",
        ),
        (["hello", TARGET], "bad_row", "messages[0] is not an object"),
        ([USER | {"recipient": "tool"}, TARGET], "bad_row", "recipient"),
    ],
)
def test_conversations_that_cannot_be_used(messages: Any, reason: str, message: str) -> None:
    with pytest.raises(RowError) as refused:
        normalize_messages(messages)
    assert refused.value.reason == reason
    assert message in str(refused.value)


@pytest.mark.parametrize("start", [-1, 2, 99])
def test_start_index_must_be_a_message(start: int) -> None:
    with pytest.raises(RowError, match="there are 2 messages"):
        normalize_messages([USER, TARGET], start)


def test_texts_are_normalised_once_a_message() -> None:
    content = [
        {"type": "text", "text": "It was “night” "},
        *TARGET["content"],
        {"type": "text", "text": "say this"},
    ]
    messages, _ = normalize_messages([{"role": "user", "content": content}, TARGET])
    assert [part.get("text") for part in messages[0]["content"]] == ['It was "night"', None, "say this."]
    assert normalize_messages(messages)[0] == messages


def test_the_words_of_the_target() -> None:
    own = {"role": "assistant", "content": [{"type": "text", "text": "My own words."}, *TARGET["content"]]}
    assert target_text([USER, TARGET]) == "Hello."
    assert target_text([USER, own]) == "My own words."
    assert len(audio_parts([USER, TARGET, USER, own])) == 2
