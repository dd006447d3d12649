"""The forward pass with which the miniature is trained, against the packed one of the product."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from higgstune.batch.collate import pack
from higgstune.families.higgs_v2.packed import with_training_forward
from higgstune.families.higgs_v2.prompter import Prompter, SpecialIds
from higgstune.kernels.loss import label_counts

TOOLS = Path(__file__).parents[2] / "tools" / "demo"
TEXTS = ("Good morning, Anna.", "We saw seven birds near the river.", "The old clock is ten minutes slow.")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    found = runpy.run_path(str(TOOLS / "train_base.py"))
    sys.modules.pop("checkpoint", None)
    return found


def corpus_of(tool: Any, voice: str) -> tuple[Any, Any]:
    """Three clips whose words take 0.2 s each, and a fresh model."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    clips = []
    for text in TEXTS:
        count = len(text.split())
        words = np.array([(0.2 * i, 0.2 * (i + 1)) for i in range(count)])
        clips.append(tool["Clip"](text, voice, generator.integers(1024, size=(5 * count, 8)), words))
    tokenizer = tool["build_tokenizer"](TEXTS)
    model = tool["build_model"](tokenizer)
    return tool["Corpus"](clips, Prompter(tokenizer, SpecialIds.from_config(model.config))), model


@pytest.mark.parametrize(("context", "voice"), [(None, "hibari"), (2, "hibari"), (None, "awb")])
def test_its_losses_are_those_of_the_products_forward(tool: Any, context: int | None, voice: str) -> None:
    corpus, model = corpus_of(tool, voice)
    examples = [corpus.example(index, context) for index in range(2)]
    batch = tool["make_batch"](examples)
    assert batch.prefix > 8  # the common beginning is computed once
    with torch.no_grad():
        hidden, _ = tool["run_layers"](model, batch, batch.audio_ids)
        rows = hidden[batch.audio_rows]
        weights = model.audio_lm_head.weight.unflatten(0, (8, -1))
        found = [float(tool["_head_loss"](rows, w, t)) for w, t in zip(weights, batch.audio_targets.T, strict=True)]
        packed = pack([example for example, _ in examples])
        sums = with_training_forward(model)(**packed)
    counts = label_counts(packed, eos_id=model.config.audio_stream_eos_id)
    assert found == pytest.approx((sums["audio_loss"] / counts["audio"]).tolist(), abs=1e-4)


def test_heads_attend_to_the_word_that_comes_next(tool: Any) -> None:
    corpus, _ = corpus_of(tool, "hibari")
    example, alignment = corpus.example(0)
    tokens = corpus.prompter.tokenizer.convert_ids_to_tokens(example.input_ids)
    now, ahead = ([tokens[i] for i in alignment[:16, column]] for column in (0, 1))
    assert now == ["Good"] * 5 + ["Ġmorning"] * 5 + ["ĠAnna"] * 5 + ["<|eot_id|>"]
    assert ahead == ["Ġmorning"] * 5 + ["ĠAnna"] * 5 + ["<|eot_id|>"] * 6


def test_other_voices_have_no_loss_where_they_begin(tool: Any) -> None:
    corpus, _ = corpus_of(tool, "awb")
    first = {index: int((corpus.example(index)[0].audio_labels >= 0).any(axis=1).argmax()) for index in range(3)}
    assert first == {0: 16, 1: 16, 2: 1}  # two of three: the third has a scene of its own
    assert "Scotland" in corpus.example(2)[0].prompt
