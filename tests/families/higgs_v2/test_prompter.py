"""Positions and labels of an example: the table of docs/prompt.md."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoint import random_codes, tiny_prompter, tiny_tokenizer

from higgstune.batch.collate import PaddedCollator
from higgstune.batch.dataset import TARGET
from higgstune.data.messages import speech_messages
from higgstune.errors import DataError
from higgstune.families.base import Example
from higgstune.families.higgs_v2.delay import build_frames
from higgstune.families.higgs_v2.prompter import Prompter, SpecialIds
from higgstune.kernels import IGNORE

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "prompts.json").read_text())
MODEL, PROMPTER = tiny_prompter()
TOKENIZER = PROMPTER.tokenizer


def case(name: str) -> list[dict[str, Any]]:
    return next(c["messages"] for c in GOLDEN if c["name"].endswith(name))


def labelled_text(example: Example) -> str:
    labels = example.text_labels[example.text_labels != IGNORE]
    return TOKENIZER.decode(labels, skip_special_tokens=False)


CLONE_TRANSCRIPT = "The sun rises in the east.<|eot_id|><|audio_out_bos|><|audio_eos|><|eot_id|>"


@pytest.mark.parametrize(
    ("name", "targets", "expected"),
    [
        ("voice_clone", "transcript", CLONE_TRANSCRIPT),
        ("voice_clone", "none", ""),
        (
            "multi_speaker_scene",
            "transcript",
            "[SPEAKER0] Hello there.\n[SPEAKER1] Good morning.<|eot_id|><|audio_out_bos|><|audio_eos|><|eot_id|>",
        ),
        (
            "assistant_text_and_audio",
            "assistant",
            "The sun rises in the east.<|audio_out_bos|><|audio_eos|><|eot_id|>",
        ),
        (
            "assistant_text_and_audio",
            "transcript",
            "Say the sun rises in the east.<|eot_id|><|audio_out_bos|><|audio_eos|><|eot_id|>",
        ),
        (
            "zero_shot_chatml_of_the_seed",
            "assistant",
            "The sun rises in the east.<|audio_out_bos|><|audio_eos|><|eot_id|>",
        ),
    ],
)
def test_text_labels_are_those_of_the_table(name: str, targets: Any, expected: str) -> None:
    messages = case(name)
    audios = json.dumps(messages).count('"type": "audio"')
    codes = [random_codes(3 + i, seed=i) for i in range(audios)]
    assert labelled_text(PROMPTER.example(messages, codes, text_targets=targets)) == expected


def test_only_the_targets_audio_is_labelled_and_rows_stand_in_order() -> None:
    reference, target = random_codes(5, seed=1), random_codes(7, seed=2)
    example = PROMPTER.example(case("/voice_clone"), [reference, target], text_targets="transcript")
    rows, labels = build_frames(target)
    assert (example.audio_labels[: 5 + 9] == IGNORE).all()
    np.testing.assert_array_equal(example.audio_labels[5 + 9 :], labels)
    np.testing.assert_array_equal(example.audio_input_ids[: 5 + 9], build_frames(reference)[0])
    np.testing.assert_array_equal(example.audio_input_ids[5 + 9 :], rows)
    # Placeholders: T + 2 audio tokens, then 7 delay tokens.
    ids = PROMPTER.ids
    run = example.input_ids[example.audio_mask][5 + 9 :]
    assert run.tolist() == [ids.audio_token] * 9 + [ids.audio_delay_token] * 7
    assert (example.text_labels[example.audio_mask] == IGNORE).all()


def test_earlier_turns_can_be_targets_too() -> None:
    codes = [random_codes(4, seed=i) for i in range(3)]
    example = PROMPTER.example(case("multi_turn"), codes, text_targets="transcript", target_from=5)
    assert (example.audio_labels != IGNORE).sum() == 2 * 8 * 5
    assert labelled_text(example).startswith("Second part.<|eot_id|>")
    assert "Third part.<|eot_id|>" in labelled_text(example)
    assert "First" not in labelled_text(example)


def test_the_generation_prompt_is_the_beginning_of_the_training_example() -> None:
    request = speech_messages("The sun rises in the east.", context=[("Hello there.", "reference.wav")])
    reference, target = random_codes(5, seed=1), random_codes(7, seed=2)
    prompt = PROMPTER.prompt(request, [reference])
    example = PROMPTER.example([*request, TARGET], [reference, target])
    np.testing.assert_array_equal(example.input_ids[: len(prompt)], prompt.input_ids)
    np.testing.assert_array_equal(example.audio_input_ids[: 5 + 9], prompt.audio_input_ids)
    assert prompt.input_ids[-1] == TOKENIZER.convert_tokens_to_ids("<|audio_out_bos|>")
    assert (prompt.text_labels == IGNORE).all()


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.text(st.characters(codec="utf-8", exclude_characters="<|"), min_size=1, max_size=30).filter(str.strip),
)
@settings(deadline=None, max_examples=40)
def test_label_entries_are_what_arithmetic_says(frames: list[int], text: str) -> None:
    examples = [
        PROMPTER.example([*speech_messages(text), TARGET], [random_codes(t, seed=t)], text_targets="transcript")
        for t in frames
    ]
    batch = PaddedCollator(pad_id=1, stream_eos=1025)(examples)
    assert (batch["audio_targets"] != IGNORE).sum() == sum(8 * (t + 1) for t in frames)
    # A row without a label is not computed: row 0 is all BOS, and all others carry one.
    assert len(batch["audio_targets"]) == sum(t + 8 for t in frames)
    spoken = len(TOKENIZER(text.strip(), add_special_tokens=False)["input_ids"])
    assert len(batch["text_targets"]) == len(frames) * (spoken + 4)
    # Each target stands one position after the one that predicts it, in the same example.
    length = batch["input_ids"].shape[1]
    flat = batch["input_ids"].flatten()
    assert (flat[batch["text_positions"] + 1] == batch["text_targets"]).all()
    assert ((batch["audio_positions"] % length) < length - 1).all()


@pytest.mark.parametrize(
    ("messages", "codes", "targets", "names"),
    [
        ("no_scene", 0, "none", "1 audio parts and got codes for 0"),
        ("audio_understanding", 1, "none", "no target to train on"),
        ("no_scene", 1, "assistant", "use text_targets: transcript"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(messages: str, codes: int, targets: Any, names: str) -> None:
    given_codes = [random_codes(3, seed=0)] * codes
    with pytest.raises(DataError, match=names):
        PROMPTER.example(case(messages), given_codes, text_targets=targets)


def test_codes_of_another_codec_are_refused() -> None:
    with pytest.raises(DataError, match="8 codebooks"):
        PROMPTER.example(case("no_scene"), [np.zeros((3, 4), dtype=np.uint16)])


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Prompter(Slow(), SpecialIds.from_config(MODEL.config))
    assert Prompter(tiny_tokenizer(), PROMPTER.ids).tokenizer.is_fast
