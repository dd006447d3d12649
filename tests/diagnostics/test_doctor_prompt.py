"""Prompts that differ between training and speaking, and tokenizers that break them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doctor_world import examined, failed, messages_of
from tiny_checkpoint import random_codes, tiny_prompter, tiny_tokenizer

from higgstune import BaseSpec
from higgstune.batch.dataset import Rendering
from higgstune.codec.base import WhisperFeatures
from higgstune.data.store import Row
from higgstune.diagnostics.examine import doctor
from higgstune.diagnostics.prompt import built_in_row, check_chat_template, check_same_prompt, check_tokens
from higgstune.families.base import Example
from higgstune.families.higgs_v2.family import FAMILY
from higgstune.families.higgs_v2.prompter import Prompter


def test_a_changed_chat_template_is_found(world: Path, base: Path) -> None:
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|eot_id|>", "<|eot_id|>\n"))
    report = examined(world, model=base, data=None)
    assert failed(report) == {"prompt"}
    assert "renders a training row differently" in messages_of(report, "prompt")
    template.write_text(template.read_text().replace("<|eot_id|>\n", "<|eot_id|>").replace("{%- endmacro -%}", ""))
    assert failed(doctor(BaseSpec(base))) == {"prompt"}


def test_a_checkpoint_without_a_chat_template_skips_the_comparison() -> None:
    tokenizer = tiny_tokenizer()
    row = built_in_row(8, 1024)
    assert check_chat_template(tokenizer, row, FAMILY.checks)[0].status == "ok"
    tokenizer.chat_template = None
    assert check_chat_template(tokenizer, row, FAMILY.checks)[0].status == "skipped"


def conversation(row: Row) -> Row:
    """A conversation with audio of the user, and assistant text before the target."""
    said = {"role": "user", "content": [{"type": "text", "text": "Repeat:"}, {"type": "audio", "url": "a.wav"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Here."}, {"type": "audio", "url": "b.wav"}]}
    context = [random_codes(5, seed=3)]
    return dataclasses.replace(row, messages=[said, answer], context_codes=context, context_sha256=["0"])


@pytest.mark.parametrize("change", [lambda row: row, conversation], ids=["utterance", "conversation"])
def test_a_prompt_that_differs_between_training_and_speaking_is_found(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Row], Row]
) -> None:
    _, prompter = tiny_prompter()
    row = change(built_in_row(8, 1024))
    assert check_same_prompt(prompter, row, FAMILY.checks)[0].status == "ok"
    speak = Prompter.prompt

    def other_codes(self: Prompter, *arguments: Any) -> Example:
        made = speak(self, *arguments)
        return dataclasses.replace(made, audio_input_ids=made.audio_input_ids[::-1])

    monkeypatch.setattr(Prompter, "prompt", other_codes)
    assert "other codes in speaking" in check_same_prompt(prompter, row, FAMILY.checks)[0].message

    def without_beginning(self: Prompter, *arguments: Any) -> Example:
        made = speak(self, *arguments)
        return dataclasses.replace(made, input_ids=made.input_ids[1:])

    monkeypatch.setattr(Prompter, "prompt", without_beginning)
    assert "position 0 differs" in check_same_prompt(prompter, row, FAMILY.checks)[0].message


class FixedFeatures:
    """Whisper features of any clip, and those of another encoder."""

    def __init__(self, value: float) -> None:
        self.value = value

    def read(self, sha256: str) -> WhisperFeatures:
        return WhisperFeatures(np.full((4, 3), self.value, dtype=np.float16), (4,))


def test_whisper_features_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    _, prompter = tiny_prompter()
    row = conversation(built_in_row(8, 1024))
    assert check_same_prompt(prompter, row, FAMILY.checks, Rendering(features=FixedFeatures(1.0)))[0].status == "ok"
    speak = Prompter.prompt

    def other_features(self: Prompter, *arguments: Any) -> Example:
        made = speak(self, *arguments)
        assert made.whisper_features is not None
        return dataclasses.replace(made, whisper_features=made.whisper_features + 1)

    monkeypatch.setattr(Prompter, "prompt", other_features)
    assert (
        "other Whisper features in speaking"
        in check_same_prompt(prompter, row, FAMILY.checks, Rendering(features=FixedFeatures(1.0)))[0].message
    )


def test_text_that_speaking_would_normalise_is_found() -> None:
    _, prompter = tiny_prompter()
    row = dataclasses.replace(built_in_row(8, 1024), text="The  sun rises in the east.")
    assert check_same_prompt(prompter, row, FAMILY.checks)[0].status == "failed"


def test_a_control_token_in_pieces_is_found() -> None:
    tokenizer = tiny_tokenizer()
    assert check_tokens(tokenizer, FAMILY.checks)[0].status == "ok"

    class Broken:
        def encode(self, text: str, **options: Any) -> list[int]:
            return tokenizer.encode(text.replace("<|eot_id|>", "eot"), **options)

        decode = staticmethod(tokenizer.decode)

    assert "<|eot_id|>" in check_tokens(Broken(), FAMILY.checks)[0].message
