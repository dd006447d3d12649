"""The prompt strings against the reference code's."""

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment

from higgstune.data.messages import speech_messages
from higgstune.errors import DataError
from higgstune.families.higgs_v2.prompt import native_chat_template, render

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "prompts.json").read_text())
NATIVE = [case for case in GOLDEN if not case["name"].startswith("boson_chatml/")]
CHATML = [case for case in GOLDEN if case["name"].startswith("boson_chatml/")]


def ids(case: dict[str, Any]) -> str:
    return case["name"]


@pytest.mark.parametrize("case", NATIVE, ids=ids)
def test_native_template_equals_the_reference(case: dict[str, Any]) -> None:
    assert render(case["messages"]) == case["rendered_training"]
    assert render(case["messages"], generation=True) == case["rendered_generation"]
    # The target is to be generated: without it the prompt is the same.
    assert render(case["messages"][:-1], generation=True) == case["rendered_generation"]


@pytest.mark.parametrize("case", CHATML, ids=ids)
def test_chatml_equals_the_reference(case: dict[str, Any]) -> None:
    assert render(case["messages"], template="chatml") == case["rendered_training"]


@pytest.mark.parametrize("case", NATIVE, ids=ids)
def test_the_shipped_jinja_template_writes_the_same(case: dict[str, Any]) -> None:
    template = Environment(autoescape=False).from_string(native_chat_template())
    assert template.render(messages=case["messages"]) == case["rendered_training"]
    prompt = template.render(messages=case["messages"][:-1], add_generation_prompt=True)
    assert prompt == case["rendered_generation"]


def test_generation_prompt_is_a_prefix_of_the_training_prompt_also_with_assistant_text() -> None:
    case = next(case for case in CHATML if case["name"].endswith("assistant_text_and_audio"))
    for template in ("native", "chatml"):
        trained = render(case["messages"], template=template)
        prompt = render(case["messages"], template=template, generation=True)
        assert prompt.endswith("The sun rises in the east.<|audio_out_bos|>")
        assert trained.startswith(prompt)


def test_reference_audio_is_rendered_as_codes_without_whisper() -> None:
    case = next(case for case in CHATML if case["name"].endswith("zero_shot_chatml_of_the_seed"))
    assert "birthday.<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>Please" in render(case["messages"])


def test_speech_messages_write_the_released_prompt() -> None:
    case = next(case for case in NATIVE if case["name"] == "voice_clone")
    messages = speech_messages(
        "The sun rises in the east.", context=[("It was the night before my birthday.", "reference.wav")]
    )
    assert render(messages, generation=True) == case["rendered_generation"]


@pytest.mark.parametrize(
    ("messages", "names"),
    [
        ([], "at least one message"),
        ([{"role": "tool", "content": "x"}], "'tool'"),
        ([{"role": "user", "content": 3}], "string or a list"),
        ([{"role": "user", "content": [{"type": "image"}]}], "text or audio"),
        ([{"role": "user", "content": "say <|eot_id|> now"}], r"<\|eot_id\|>"),
        ([{"role": "scene", "content": "a room"}], "right after the system message"),
    ],
)
def test_what_cannot_be_rendered_is_refused(messages: list[dict[str, Any]], names: str) -> None:
    with pytest.raises(DataError, match=names):
        render(messages)
