"""From a row of a code store to a training example."""

from collections.abc import Sequence

import numpy as np

from higgstune.data.store import Row
from higgstune.errors import DataError
from higgstune.prompt.example import Example, Prompter, TextTargets
from higgstune.prompt.template import DEFAULT_SCENE, Message, content_parts, speech_messages

TARGET: Message = {"role": "assistant", "content": [{"type": "audio", "url": "target"}]}


def row_conversation(row: Row) -> tuple[list[Message], list[np.ndarray], int | None]:
    """A row's messages, the codes of all their audio parts in order, and the first target message (None: the last).

    An utterance is written as generation asks for it: default system message, its scene (or the default one), its
    reference as an earlier turn, its text, its audio.
    """
    if row.messages is not None:
        return list(row.messages), _codes_in_order(row), row.start_index
    context, codes = [], [row.codes]
    if row.reference_codes is not None:
        context, codes = [(row.reference_text or "", "reference")], [row.reference_codes, row.codes]
    scene = DEFAULT_SCENE if row.scene is None else row.scene
    return [*speech_messages(row.text, scene=scene, context=context), TARGET], codes, None


def row_example(prompter: Prompter, row: Row, text_targets: TextTargets) -> Example:
    """A row as the model sees it in training. Raises DataError as `Prompter.example`."""
    messages, codes, target_from = row_conversation(row)
    return prompter.example(messages, codes, text_targets=text_targets, target_from=target_from)


class RowExamples:
    """The examples of one split for one stage, as a data set: built when they are asked for."""

    def __init__(self, rows: Sequence[Row], prompter: Prompter, text_targets: TextTargets) -> None:
        self.rows = rows
        self.prompter = prompter
        self.text_targets = text_targets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        try:
            return row_example(self.prompter, row, self.text_targets)
        except DataError as error:
            raise DataError(f"row {row.id} of the {row.split} split: {error}") from error


def _codes_in_order(row: Row) -> list[np.ndarray]:
    """Context and target codes as their parts stand in the conversation; the target is the last assistant audio."""
    assert row.messages is not None
    roles = [m["role"] for m in row.messages for part in content_parts(m) if part["type"] == "audio"]
    target = max(i for i, role in enumerate(roles) if role == "assistant")
    codes = list(row.context_codes)
    codes.insert(target, row.codes)
    return codes
