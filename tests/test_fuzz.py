"""Readers of files from strangers on generated input: they succeed or raise the one error that they document.

The same checks run for hours in fuzz/, guided by coverage; what was found there stands here as examples.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from hostile_input import (
    FORMATS,
    RECIPE,
    ROWS,
    SAMPLES,
    audio_seeds,
    check_audio,
    check_recipe,
    check_source,
    recipe_seeds,
    rf64,
    source_folder,
    source_seeds,
    wav,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from recordings import speech, write

from higgstune.data.audio import read_audio
from higgstune.data.rejection import RowError

quick = settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

WORDS = [
    *{key for row in [*ROWS, *SAMPLES] for key in row},
    *(
        "role",
        "content",
        "type",
        "url",
        "user",
        "assistant",
        "system",
        "scene",
        "text",
        "audio",
        "a.wav",
        "../secret.wav",
    ),
    *("out/secret.wav", "/etc/hostname", "..", "\0", "<|audio_eos|>", "\ud800", "\u0301" * 99, "Hello.", "id", "misc"),
]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=12,
)


@st.composite
def changed(draw: st.DrawFn, whole: Any) -> Any:
    """A copy of plain data with one or two of its values replaced, dropped or added."""
    copy = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 2))):
        places = list(containers(copy))
        node = places[draw(st.integers(0, len(places) - 1))]
        if isinstance(node, dict):
            key = draw(st.sampled_from([*node, *WORDS[:12]]))
        else:
            key = draw(st.integers(0, max(len(node) - 1, 0)))
            node.extend([None] * (not node))
        if draw(st.booleans()):
            node[key] = draw(values)
        elif isinstance(node, dict):
            node.pop(key, None)
    return copy


def containers(node: Any) -> Iterator[Any]:
    if isinstance(node, dict | list):
        yield node
        for part in node.values() if isinstance(node, dict) else node:
            yield from containers(part)


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of some files with bytes changed, put in, cut out, or its end cut off."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(content)))
        cut = draw(st.integers(0, 40))
        content[place : place + cut] = draw(st.binary(max_size=12))
    return bytes(content[: draw(st.sampled_from([len(content), len(content) // 2, 60]))])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_folder(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize(
    ("number", "found"), list(enumerate([(5, 3), (2, 0), (3, 1), (1, 1), (1, 0), (1, 2)])), ids=str
)
def test_a_whole_source_of_each_kind_is_read(source: Path, number: int, found: tuple[int, int]) -> None:
    """The seeds reach what is behind the readers, and no row reaches the recording outside."""
    name, content = list(source_seeds())[number]
    assert check_source(source, name, content) == found


@quick
@given(name=st.sampled_from(FORMATS), content=st.binary(max_size=300))
@example(name="manifest.jsonl", content=b"[" * 10_000)
@example(name="data.json", content=b'[{"messages": ' + b"[" * 900 + b"]" * 900 + b"}]")
@example(name="metadata.json", content=b'{"samples": [{"audio_file": "a.wav", "transcript_file": "a.wav"}]}')
@example(name="metadata.csv", content=b"a|\xff\n\0|x\n")
def test_sources_of_any_bytes(source: Path, name: str, content: bytes) -> None:
    check_source(source, name, content)


@quick
@given(rows=changed(ROWS))
def test_manifests_with_a_few_odd_values(source: Path, rows: Any) -> None:
    check_source(source, "manifest.jsonl", "\n".join(map(json.dumps, rows)).encode())


@quick
@given(rows=changed([row for row in ROWS if "messages" in row]))
def test_chatml_with_a_few_odd_values(source: Path, rows: Any) -> None:
    check_source(source, "data.json", json.dumps(rows).encode())


@quick
@given(data=changed({"samples": SAMPLES}))
def test_samples_with_a_few_odd_values(source: Path, data: Any) -> None:
    check_source(source, "metadata.json", json.dumps(data).encode())


@quick
@given(lines=st.lists(st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=5).map("|".join), max_size=5))
def test_tables_of_odd_cells(source: Path, lines: list[str]) -> None:
    check_source(source, "metadata.csv", "\n".join(lines).encode(errors="surrogatepass"))


@pytest.mark.parametrize("content", list(recipe_seeds()), ids=["yaml", "json", "merge"])
def test_a_whole_recipe_is_read(folder: Path, content: bytes) -> None:
    assert check_recipe(folder, content, [])


@quick
@given(content=damaged(list(recipe_seeds())))
@example(content=b"seed: 0b_")
@example(content=b"a: !!bool x")
@example(content=b"a: &a [*a]")
@example(content=b"\xff\xfe")
def test_recipes_of_damaged_yaml(folder: Path, content: bytes) -> None:
    check_recipe(folder, content, [])


@quick
@given(tree=changed(RECIPE))
def test_recipes_with_a_few_odd_values(folder: Path, tree: Any) -> None:
    check_recipe(folder, json.dumps(tree).encode(), [])


@quick
@given(
    key=st.lists(st.sampled_from(["stages", "0", "1", "lora", "r", "seed", "", "data", "9" * 30]), max_size=4),
    value=st.text(max_size=20) | values.map(json.dumps),
)
@example(key=["stages", "9" * 5_000], value="1")
def test_overrides_of_any_text(folder: Path, key: list[str], value: str) -> None:
    check_recipe(folder, json.dumps(RECIPE).encode(), [f"{'.'.join(key)}={value}"])


@pytest.fixture(scope="module")
def recordings(folder: Path) -> list[bytes]:
    return list(audio_seeds(folder))


def test_a_whole_recording_of_each_format_is_read(folder: Path, recordings: list[bytes]) -> None:
    assert [check_audio(folder, content) for content in recordings] == [True] * 15


@quick
@given(data=st.data(), part=st.none() | st.tuples(st.floats(), st.floats()))
def test_damaged_recordings(folder: Path, recordings: list[bytes], data: st.DataObject, part: Any) -> None:
    check_audio(folder, data.draw(damaged(recordings)), *(part or (None, None)))


@quick
@given(
    rate=st.integers(0, 2**32 - 1) | st.sampled_from([8_000, 48_000]),
    channels=st.integers(0, 65535) | st.just(1),
    bits=st.sampled_from([0, 4, 8, 16, 24, 32, 64, 65535]),
    tag=st.sampled_from([1, 2, 3, 6, 7, 17, 49, 85, 0xFFFE]),
    data_size=st.none() | st.integers(0, 2**32 - 1),
    extra=st.binary(max_size=40),
)
def test_headers_of_any_numbers(folder: Path, **fields: Any) -> None:
    check_audio(folder, wav(**fields))


@quick
@given(size=st.integers(0, 2**64 - 1))
@example(size=4 << 40)
def test_rf64_of_any_length(folder: Path, size: int) -> None:
    check_audio(folder, rf64(data_size=size))


def test_a_seek_that_ends_elsewhere_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in an MP3 with a damaged frame: libsndfile sought behind its end, and said so."""
    path = write(tmp_path / "a.mp3", speech(0.5))
    assert len(read_audio(path, 0.1, 0.2)[0]) == 1_600
    seek = soundfile.SoundFile.seek
    monkeypatch.setattr(soundfile.SoundFile, "seek", lambda file, frames: seek(file, frames) + 9_999)
    with pytest.raises(RowError, match="sample 1600 cannot be found"):
        read_audio(path, 0.1, 0.2)
