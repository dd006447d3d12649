"""The forward pass with which the miniatures are trained, against the packed one of the product."""

import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import higgstune
from higgstune.batch.collate import pack
from higgstune.families import family_of, read_layout
from higgstune.kernels import IGNORE
from higgstune.kernels.loss import label_counts
from higgstune.model.load import load_model

TOOLS = Path(__file__).parents[2] / "tools" / "demo"
TEXTS = ("Good morning, Anna.", "We saw seven birds near the river.", "The old clock is ten minutes slow.")


ASSETS = Path(higgstune.__file__).parent / "demo" / "assets"
V2, TTS3 = "higgs_audio_v2", "higgs_tts_3"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    for name in ("checkpoint", V2, TTS3):  # only for this test
        monkeypatch.delitem(sys.modules, name, raising=False)
    return runpy.run_path(str(TOOLS / "train_base.py"))


def corpus_of(tool: Any, family: str, voice: str) -> tuple[Any, Any]:
    """Three clips whose words take 0.2 s each, and a fresh model."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    clips = []
    for text in TEXTS:
        count = len(text.split())
        words = np.array([(0.2 * i, 0.2 * (i + 1)) for i in range(count)])
        clips.append(tool["Clip"](text, voice, generator.integers(1024, size=(5 * count, 8)), words))
    module: Any = import_module(family)
    tokenizer = module.build_tokenizer(TEXTS)
    model = module.build_model(tokenizer)
    return tool["Corpus"](clips, module.prompter(tokenizer, model), module), model


@pytest.mark.parametrize("family", [V2, TTS3])
@pytest.mark.parametrize(("context", "voice"), [(None, "hibari"), (2, "hibari"), (None, "awb")])
def test_its_losses_are_those_of_the_products_forward(tool: Any, family: str, context: int | None, voice: str) -> None:
    corpus, model = corpus_of(tool, family, voice)
    examples = [corpus.example(index, context) for index in range(2)]
    batch = tool["make_batch"](examples)
    assert batch.prefix > (8 if family == V2 else 0)  # the common beginning is computed once
    with torch.no_grad():
        hidden, _ = tool["run_layers"](corpus.family, model, batch, batch.audio_ids)
        weights, rows = corpus.family.audio_weight(model), hidden[batch.audio_rows]
        found = [float(tool["_head_loss"](rows, w, t)) for w, t in zip(weights, batch.audio_targets.T, strict=True)]
        packed = pack([example for example, _ in examples])
        sums = family_of(model).pack_forward(model)(**packed)
    counts = label_counts(packed, eos_id=1025)
    assert found == pytest.approx((sums["audio_loss"] / counts["audio"]).tolist(), abs=1e-4)


@pytest.mark.parametrize(("family", "end"), [(V2, "<|eot_id|>"), (TTS3, "<|audio|>")])
def test_heads_attend_to_the_word_that_comes_next(tool: Any, family: str, end: str) -> None:
    corpus, _ = corpus_of(tool, family, "hibari")
    example, alignment = corpus.example(0)
    tokens = corpus.prompter.tokenizer.convert_ids_to_tokens([max(0, token) for token in example.input_ids])
    # The row before a code attends to its word. Higgs TTS 3 has no row before code 0.
    first = 0 if family == V2 else 1
    now, ahead = ([tokens[i] for i in column if i != IGNORE] for column in alignment.T)
    assert now == (["Good"] * 5 + ["Ġmorning"] * 5 + ["ĠAnna"] * 5 + [end])[first:]
    assert ahead == (["Ġmorning"] * 5 + ["ĠAnna"] * 5 + [end] * 6)[first:]
    assert (alignment[: len(now), 0] != IGNORE).all()


def first_labels(corpus: Any, context: int | None = None) -> dict[int, int]:
    """The first labelled frame of each clip."""
    return {
        index: int((corpus.example(index, context)[0].audio_labels >= 0).any(axis=1).argmax()) for index in range(3)
    }


def test_other_voices_have_no_loss_where_they_begin(tool: Any) -> None:
    corpus, _ = corpus_of(tool, V2, "awb")
    assert first_labels(corpus) == {0: 16, 1: 16, 2: 1}  # two of three: the third has a scene of its own
    assert "Scotland" in corpus.example(2)[0].prompt
    corpus, _ = corpus_of(tool, TTS3, "awb")
    assert first_labels(corpus) == {0: 16, 1: 16, 2: 16}  # no scenes
    example, _ = corpus.example(0, 1)
    assert example.prompt.startswith("<|tts|><|ref_text|>We saw")
    assert int((example.audio_labels >= 0).any(axis=1).argmax()) == 35 + 7  # after the reference


def test_the_second_miniature_is_written_as_the_release_and_read_again(tool: Any, tmp_path: Path) -> None:
    corpus, model = corpus_of(tool, TTS3, "hibari")
    tokenizer = corpus.prompter.tokenizer
    corpus.family.start_from(model, tokenizer, ASSETS / "base")
    corpus.family.save(model, tokenizer, tmp_path)
    assert not any("head" in key for key in read_layout(tmp_path).keys)
    read = load_model(tmp_path, dtype="float32", device="cpu")
    for (name, written), found in zip(model.state_dict().items(), read.state_dict().values(), strict=True):
        assert torch.equal(written.bfloat16().float(), found), name
    again, reopened = corpus.family.open_base(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert torch.equal(reopened.audio_table.weight, read.audio_table.weight)
    assert read.audio_table.weight.abs().max() > 0.1  # of the first miniature; drawn at random it would be 0.1
