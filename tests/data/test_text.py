"""Text normalisation: its changes, texts that it leaves unchanged, and that twice is the same as once."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from higgstune.data.text import clean_text, find_control_tokens, is_speakable, normalize_text

TRICKY = st.sampled_from(list("[laugh] SPEAKER0<|eot_id|>\u200b\u0301e…\u200d\n\r\x1c\u3000 .'\"，《》—“”؟\ufeff"))


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("Hello there", "Hello there."),
        ("Hello there.", "Hello there."),
        ("in being comparatively modern,", "in being comparatively modern,"),
        ("  Two \t spaces  ", "Two spaces."),
        ("“Curly” ‘quotes’ – and — dashes…", "\"Curly\" 'quotes' - and - dashes..."),
        ("non\u00a0breaking\u202fspace", "non breaking space."),
        ("zero\u200bwidth\ufeff and soft\u00adhyphen", "zerowidth and softhyphen."),
        (
            "[SPEAKER0] Hello there.\r\n\r\n[SPEAKER1] Good morning",
            "[SPEAKER0] Hello there.\n[SPEAKER1] Good morning.",
        ),
        ("e\u0301te\u0301", "été."),
        ("你好，世界。", "你好, 世界."),
        ("「はい」と言った", '"はい"と言った.'),
        ("كيف حالك؟", "كيف حالك؟"),
        ("नमस्ते दुनिया।", "नमस्ते दुनिया।"),
        ("Oh [laugh] no", "Oh <SE>[Laughter]</SE> no."),
        ("Bravo [applause]", "Bravo <SE>[Applause]</SE>"),
        ('He said "yes"', 'He said "yes"'),
        ("a bell\x07 rings\x00", "a bell rings."),
        ("", ""),
        (" \n ", ""),
        ("...", "..."),
    ],
)
def test_changes(written: str, normal: str) -> None:
    assert normalize_text(written) == normal


@pytest.mark.parametrize(
    "text",
    [
        "می\u200cخواهم.",  # the non-joiner is spelling
        "क्\u200dष.",
        "col·lecció.",
        "« bonjour ».",
        "20 °C (about 68 °F).",
        "Straße, naïve, smörgåsbord.",
        "ভালো আছি।",
    ],
)
def test_unchanged_texts(text: str) -> None:
    assert normalize_text(text) == text


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(st.characters(codec=None), max_size=40), st.text(TRICKY, max_size=40)))
def test_twice_is_once(text: str) -> None:
    once = normalize_text(text)
    assert normalize_text(once) == once
    assert unicodedata.is_normalized("NFC", once)
    once.encode("utf-8")
    assert clean_text(once) == once


def test_half_a_surrogate_pair_goes() -> None:
    assert normalize_text("a\ud800b") == "ab."


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("hello", []),
        ("<|eot_id|>", ["<|eot_id|>"]),
        ("a <|AUDIO_OUT|> b <|scene_desc_start|>", ["<|AUDIO_OUT|>", "<|scene_desc_start|>"]),
        ("<|<|eot_id|>|>", ["<|eot_id|>"]),
        ("<|reserved_special_token_5|>", ["<|reserved_special_token_5|>"]),
        ("3 <| 4 |> 5", []),
        ("<||>", []),
        ("<SE>[Laughter]</SE>", []),
    ],
)
def test_control_tokens(text: str, tokens: list[str]) -> None:
    assert find_control_tokens(text) == tokens


def test_a_control_token_can_appear_by_normalisation() -> None:
    assert find_control_tokens(clean_text("<\u200b|eot_id|>")) == ["<|eot_id|>"]


@pytest.mark.parametrize(("text", "speakable"), [("5", True), ("[SPEAKER0]", False), ("你", True), ("—!?", False)])
def test_speakable_texts(text: str, speakable: bool) -> None:
    assert is_speakable(text) is speakable
