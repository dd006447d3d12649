"""Checks of the prompt: the same in training, in generation and in the checkpoint's chat template."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jinja2 import TemplateError

from higgstune.batch.dataset import PLAIN, TARGET, Rendering, row_conversation, row_example
from higgstune.data.messages import DEFAULT_SCENE, Message, content_parts, speech_messages
from higgstune.data.rules import NORMALIZED, TextRules
from higgstune.data.store import Row
from higgstune.diagnostics.report import Finding, naming
from higgstune.families.base import Audio, Checks, Example, Prompter, TextTargets

CHECK = "prompt"


def built_in_row(codebooks: int, codes: int, *, frames: int = 12, seed: int = 0) -> Row:
    """A row for checks without data: a sentence, a reference, and random codes."""
    draw = np.random.default_rng(seed)
    texts = ("The sun rises in the east.", "Good morning to you all, and to those who are still asleep.")
    target, reference = (draw.integers(0, codes, (length, codebooks)).astype(np.uint16) for length in (frames, 6))
    return Row(
        id=f"built-in sentence {seed}", text=texts[seed % 2], speaker=None, language=None, scene=None, split="train",
        duration=frames / 25, codes=target, reference_id=None, reference_text="It was the night before my birthday.",
        reference_codes=reference, messages=None, context_codes=[], start_index=None, audio_sha256="",
        recording_sha256="",
    )  # fmt: skip


def as_trained(
    prompter: Prompter, row: Row, rendering: Rendering = PLAIN, text_targets: TextTargets = "none"
) -> Example:
    """A row as a training example. Raises DataError."""
    return row_example(prompter, row, text_targets, rendering)


def as_spoken(prompter: Prompter, row: Row, rendering: Rendering = PLAIN, texts: TextRules = NORMALIZED) -> Example:
    """The prompt of generation for a row's last target. Raises DataError."""
    return prompter.prompt(*_speech_request(row, rendering, texts))


def check_same_prompt(
    prompter: Prompter, row: Row, checks: Checks, rendering: Rendering = PLAIN, texts: TextRules = NORMALIZED
) -> list[Finding]:
    """Check that training and generation have the same prompt before a row's target."""
    trained, spoken = as_trained(prompter, row, rendering), as_spoken(prompter, row, rendering, texts)
    problem = _first_difference(prompter, trained, spoken, checks.prompt_end)
    if problem is None:
        rows = len(spoken.audio_input_ids)
        text = f"row {row.id}: the {len(spoken)} tokens before the target are the same in training and speaking"
        return [Finding(CHECK, "ok", f"{text} ({rows} of them audio)")]
    advice = "speaking would use another prompt than training: prepare the data again with this version of Higgstune"
    return [Finding(CHECK, "failed", f"row {row.id}: {problem}", advice)]


def check_chat_template(tokenizer: Any, row: Row, checks: Checks) -> list[Finding]:
    """Check that the checkpoint's chat template renders the same prompts, for training and for generation."""
    if getattr(tokenizer, "chat_template", None) is None:
        return [Finding(CHECK, "skipped", "the checkpoint has no chat template to compare with")]
    messages, _, _ = row_conversation(row)
    request, _ = _speech_request(row)
    try:
        theirs = [
            tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False),
            tokenizer.apply_chat_template([dict(m) for m in _before_target(request)], tokenize=False,
                                          add_generation_prompt=True),
        ]  # fmt: skip
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        text = f"the checkpoint's chat template cannot render row {row.id}: {error}"
        return [Finding(CHECK, "failed", text, _TEMPLATE_ADVICE)]
    ours = [checks.render(messages, generation=False), checks.render(_before_target(request), generation=True)]
    if ours == [None, None]:
        text = "this family's prompts have no rendering to compare the checkpoint's chat template with"
        return [Finding(CHECK, "skipped", text)]
    for name, our, their in zip(("a training row", "a prompt to speak"), ours, theirs, strict=True):
        if our is not None and our != their:
            text = f"the checkpoint's chat template renders {name} differently: {_around_difference(our, their)}"
            return [Finding(CHECK, "failed", text, _TEMPLATE_ADVICE)]
    return [Finding(CHECK, "ok", "the checkpoint's chat template renders the same prompt")]


_TEMPLATE_ADVICE = (
    "Higgstune uses the prompt of the released checkpoint: take chat_template.jinja from there; checkpoints that were "
    "trained with another template are not supported"
)


def check_tokens(tokenizer: Any, checks: Checks) -> list[Finding]:
    """Check that each control token is one id, alone and inside text, and decodes to itself."""
    broken = [token for token in checks.control_tokens if not _is_one_token(tokenizer, token)]
    if broken:
        text = f"the tokenizer does not keep {naming(broken)} as one token"
        advice = "use the tokenizer.json of the checkpoint: these tokens would be split into pieces of text"
        return [Finding(CHECK, "failed", text, advice)]
    return [Finding(CHECK, "ok", f"all {len(checks.control_tokens)} control tokens are single ids")]


def _speech_request(
    row: Row, rendering: Rendering = PLAIN, texts: TextRules = NORMALIZED
) -> tuple[Sequence[Message], list[Audio]]:
    """The conversation of `speak` for a row's last target, and the audio before it."""
    messages, audio, _ = row_conversation(row, rendering)
    if row.messages is None:
        scene = DEFAULT_SCENE if row.scene is None else row.scene
        said = texts.normalized(row.text)
        if row.reference_codes is None:
            return speech_messages(said, scene=scene), []
        if rendering.reference == "scene":
            return speech_messages(said, scene=scene, voice="reference"), audio[:1]
        words = texts.normalized(row.reference_text or "")
        return speech_messages(said, scene=scene, context=[(words, "reference")]), audio[:1]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and _audio_parts(message)]
    before = sum(_audio_parts(message) for message in messages[: turns[-1]])
    return messages[: turns[-1] + 1], audio[:before]


def _before_target(messages: Sequence[Message]) -> list[Message]:
    """The conversation without the target, which a chat template would render."""
    return list(messages[:-1]) if messages[-1] == TARGET else list(messages)


def _audio_parts(message: Message) -> int:
    return sum(part["type"] == "audio" for part in content_parts(message))


def _first_difference(prompter: Prompter, trained: Example, spoken: Example, prompt_end: str) -> str | None:
    ids, request = trained.input_ids, spoken.input_ids
    if int(request[-1]) != prompter.tokenizer.convert_tokens_to_ids(prompt_end):
        return f"the prompt to speak does not end with {prompt_end}"
    if len(request) > len(ids) or (ids[: len(request)] != request).any():
        shared = min(len(ids), len(request))
        odd = np.flatnonzero(ids[:shared] != request[:shared])
        place = int(odd[0]) if len(odd) else shared
        around = slice(max(0, place - 4), place + 4)
        texts = [prompter.tokenizer.decode([i for i in tokens[around].tolist() if i >= 0]) for tokens in (ids, request)]
        return f"position {place} differs: training has {texts[0]!r}, speaking {texts[1]!r}"
    if not np.array_equal(trained.audio_input_ids[: len(spoken.audio_input_ids)], spoken.audio_input_ids):
        return "the audio before the target has other codes in speaking than in training"
    features = spoken.whisper_features
    if features is not None and (
        trained.whisper_features is None or not np.array_equal(trained.whisper_features[: len(features)], features)
    ):
        return "the audio before the target has other Whisper features in speaking than in training"
    return None


def _around_difference(ours: str, theirs: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    around = slice(max(0, place - 20), place + 20)
    return f"character {place} differs: {theirs[around]!r}, Higgstune has {ours[around]!r}"


def _is_one_token(tokenizer: Any, token: str) -> bool:
    ids = tokenizer.encode(token, add_special_tokens=False)
    inside = tokenizer.encode(f"a {token}b", add_special_tokens=False)
    return len(ids) == 1 and inside.count(ids[0]) == 1 and tokenizer.decode(ids, skip_special_tokens=False) == token


def two_unequal(rows: Sequence[Row], frames: tuple[int, int] = (12, 7)) -> list[Row]:
    """Two rows, cut to a few frames, whose prompts are of unequal length if there are such."""
    longest = max(rows, key=lambda row: len(row.text))
    shortest = min(rows, key=lambda row: len(row.text))
    return [replace(row, codes=row.codes[:n]) for row, n in zip((longest, shortest), frames, strict=True)]
