"""Splits by recording, and the choice of references."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from higgstune.data.entry import Entry
from higgstune.data.merge import resolve_references
from higgstune.data.splits import RecordingGroups

FRACTION = 0.05


def sha(name: object) -> str:
    """A hash that is spread like a real one."""
    import hashlib

    return hashlib.sha256(str(name).encode()).hexdigest()


def entry(recording: object, part: object = "", links: tuple[object, ...] = (), **values: Any) -> Entry:
    name = f"{recording}{part}"
    plain: dict[str, Any] = {
        "id": name,
        "text": f"Text of {name}.",
        "speaker": "one",
        "language": None,
        "scene": None,
        "duration": 1.0,
        "reference_id": None,
        "reference_text": None,
        "messages": None,
        "start_index": None,
        "audio_sha256": sha(name),
        "recording_sha256": sha(recording),
        "reference_sha256": None,
        "context_sha256": [],
        "target_recordings": [sha(recording)],
        "context_recordings": [sha(link) for link in links],
        "recording_samples": int(sha(recording)[:10], 16),  # each has its own length, so none are near-duplicates
        "recording_rate": 24_000,
        "recording_sketch": [1.0, 0.0],
        "source_key": name,
    }
    return Entry(**plain | values)


def split(new: list[Entry], stored: list[Entry] | None = None, fraction: float = FRACTION) -> dict[str, str]:
    """Splits by id after `new` rows have joined; rows that may not join are left out."""
    stored = stored or []
    groups = RecordingGroups(stored, new)
    entries = stored + [row for row in new if groups.join(row)]
    groups.decide(entries, fraction)
    return {row.id: str(row.split) for row in entries}


def test_about_the_fraction_is_held_out() -> None:
    splits = split([entry(n) for n in range(2_000)])
    assert 70 <= sum(value == "validation" for value in splits.values()) <= 130


def test_all_segments_of_a_recording_stay_together() -> None:
    splits = split([entry(n // 5, f"-{n % 5}") for n in range(500)], fraction=0.3)
    assert {"train", "validation"} == set(splits.values())
    for recording in range(100):
        assert len({splits[f"{recording}-{part}"] for part in range(5)}) == 1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.randoms(), st.floats(0.01, 0.99))
def test_order_does_not_matter_and_no_split_is_empty(recordings: list[int], random: Any, fraction: float) -> None:
    rows = [entry(recording, f"-{n}") for n, recording in enumerate(recordings)]
    splits = split(rows, fraction=fraction)
    random.shuffle(rows)
    assert split(rows, fraction=fraction) == splits
    assert "train" in splits.values()
    assert ("validation" in splits.values()) == (len(set(recordings)) > 1)


def test_no_validation_where_none_is_wanted() -> None:
    assert set(split([entry(n) for n in range(50)], fraction=0.0).values()) == {"train"}


@pytest.mark.parametrize("big", range(8))
def test_most_of_the_data_is_never_held_out(big: int) -> None:
    rows = [entry("big" * (big + 1), n) for n in range(99)] + [entry("small")]
    splits = split(rows, fraction=0.5)
    assert splits["small"] == "validation"


def test_stored_rows_keep_their_split() -> None:
    stored = [entry(n, split="validation" if n % 2 else "train") for n in range(20)]
    before = {row.id: row.split for row in stored}
    splits = split([entry(n) for n in range(20, 60)], stored)
    assert {row_id: splits[row_id] for row_id in before} == before


def test_the_second_recording_is_held_out_when_the_first_was_alone() -> None:
    first = entry("first")
    assert split([first]) == {"first": "train"}
    assert split([entry("second", n) for n in range(9)], [first])["second0"] == "validation"


def test_rows_with_a_target_as_context_share_its_split() -> None:
    rows = [entry(n, links=((n + 1) % 300 if n % 3 < 2 else n,)) for n in range(300)]
    splits = split(rows, fraction=0.3)
    assert "validation" in splits.values()
    for n in range(0, 300, 3):
        assert len({splits[str(n)], splits[str(n + 1)], splits[str(n + 2)]}) == 1


def test_a_voice_that_is_only_context_links_nothing() -> None:
    splits = split([entry(n, links=("voice",)) for n in range(300)], fraction=0.3)
    assert set(splits.values()) == {"train", "validation"}


def test_near_duplicates_share_a_split() -> None:
    """Equal length and nearly equal samples: a WAV and its FLAC."""
    rows = []
    for n in range(200):
        sketch = [float(sha((n, k))[:3] > "800") * 2 - 1 for k in range(16)]
        for suffix, error in (("wav", 0.0), ("flac", 1e-3)):
            values = {"recording_samples": 24_000, "recording_sketch": [value + error for value in sketch]}
            rows.append(entry(f"{n}.{suffix}", **values))
    splits = split(rows, fraction=0.3)
    assert set(splits.values()) == {"train", "validation"}
    assert all(splits[f"{n}.wav"] == splits[f"{n}.flac"] for n in range(200))


def test_a_row_between_two_splits_may_not_join() -> None:
    stored = [entry("a", split="train"), entry("b", split="validation")]
    bridge = entry("c", links=("a", "b"))
    splits = split([bridge, entry("d", links=("b",))], stored)
    assert "c" not in splits
    assert splits["d"] == "validation"


def test_a_context_voice_of_both_splits_may_not_become_a_target() -> None:
    stored = [entry("a", split="train", links=("voice",)), entry("b", split="validation", links=("voice",))]
    assert "voice" not in split([entry("voice")], stored)


def test_a_late_near_duplicate_moves_no_row() -> None:
    """The context of a stored row is a copy of another stored row's target; then the copy becomes a target itself."""
    same = {"recording_samples": 24_000, "recording_sketch": [1.0] * 16}
    stored = [entry("a", split="train", links=("copy",)), entry("b", split="validation", **same)]
    splits = split([entry("copy", **same)], stored)
    assert splits == {"a": "train", "b": "validation"}


def paired(rows: list[Entry], seed: int = 0) -> dict[str, str | None]:
    resolve_references(rows, "same_speaker", seed)
    return {row.id: row.reference_id for row in rows}


def test_a_reference_is_another_recording_of_the_speaker_in_the_split() -> None:
    rows = [
        entry(n // 3, f"-{n % 3}", speaker=f"s{n % 4}", split="validation" if n // 3 % 5 == 0 else "train")
        for n in range(240)
    ]
    by_id = {row.id: row for row in rows}
    for row_id, reference in paired(rows).items():
        row, other = by_id[row_id], by_id[str(reference)]
        assert (row.speaker, row.split) == (other.speaker, other.split)
        assert row.recording_sha256 != other.recording_sha256
        assert row.text != other.text


def test_the_same_recording_is_the_reference_without_another() -> None:
    rows = [entry("long", n, split="train") for n in range(10)]
    assert all(reference not in (None, row_id) for row_id, reference in paired(rows).items())
    rows.append(entry("short", split="train"))
    references = paired(rows)
    assert all(references[f"long{n}"] == "short" for n in range(10))


def test_equal_texts_are_not_paired() -> None:
    rows = [entry(n, split="train", text="Same.") for n in range(5)]
    assert set(paired(rows).values()) == {None}


def test_pairs_are_seeded_and_stable() -> None:
    rows = [entry(n, split="train") for n in range(50)]
    first = paired(rows)
    assert paired(rows[::-1]) == first
    assert paired(rows, seed=1) != first
    assert len(set(first.values())) > 20


def test_what_pairing_counts() -> None:
    rows = [
        entry("a", split="train"),
        entry("b", split="train"),
        entry("alone", split="train", speaker="two"),
        entry("c", split="validation"),
        entry("nameless", split="train", speaker=None),
        entry("own", split="train", reference_sha256=sha("a")),
        entry("talk", split="train", messages=[]),
    ]
    pairing = resolve_references(rows, "same_speaker", 0)
    assert (pairing.paired, pairing.explicit, pairing.one_clip_speakers, pairing.without_speaker) == (
        2,
        1,
        2,
        1,
    )
    references = {row.id: row.reference_id for row in rows}
    assert references["own"] == "a"
    assert references["alone"] is references["c"] is references["nameless"] is references["talk"] is None
    assert resolve_references(rows, "none", 0).paired == 0
    assert [row.reference_id for row in rows if row.reference_id] == ["a"]
