"""Higgs TTS 3 against what its public implementations compute, and every wrong variant against the same values."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import Command
from torch import Tensor
from transformers.models.qwen3 import modeling_qwen3
from tts3 import FOLDER, NEEDED, golden

import higgstune
from higgstune.diagnostics.golden import compare
from higgstune.families.higgs_tts_3 import golden as golden_module
from higgstune.families.higgs_tts_3.delay import labels_of
from higgstune.families.higgs_tts_3.golden import Golden
from higgstune.families.higgs_tts_3.model import HiggsTTS3
from higgstune.families.sampling import Sampling
from higgstune.generate.added import lora_of
from higgstune.generate.engine import Engine, Job
from higgstune.kernels import IGNORE

pytestmark = NEEDED
CASE = "clone_with_text"
NAMES = (
    "prompts", "delay and labels", "loading", "refusals", "embeddings", "hidden states", "logits", "log-probabilities",
    "losses by codebook", "text loss", "padded as single", "packed as single", "greedy generation", "sampler",
    "all turns in one sequence", "adapter", "merged adapter", "merged tensors", "names of the release",
    "codes of the codec", "sound of the codec",
)  # fmt: skip


@pytest.fixture(scope="module")
def values() -> Golden:
    return golden()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_computed_is_what_public_implementations_compute(values: Golden, name: str) -> None:
    [check] = [check for check in values.checks() if check.name == name]
    [finding] = compare(check)
    assert finding.status == "ok", finding.message


@pytest.mark.parametrize("live", [False, True])
def test_the_engine_speaks_the_same_rows(live: bool) -> None:
    values = golden()  # whose adapter is not merged yet
    expected = values.values("generation")
    jobs = {name: Job(values.prompt(name), 200, seed=0, sampling=Sampling(temperature=0)) for name in values.cases}
    engine = Engine(values.model, slots=2, live=live)
    for name, clip in zip(jobs, engine.generate(list(jobs.values())), strict=True):
        np.testing.assert_array_equal(clip.codes, expected[f"{name}.codes"].numpy())
        assert not clip.hit_cap
    values.adapter()
    adapted = Engine(values.adapted, slots=3, live=live).generate(list(jobs.values()))
    with values.adapted.disable_adapter():
        mixed = Engine(values.adapted, slots=8)
    mixed.add_adapter("anna", lora_of(values.adapted))
    both = [replace(job, adapter=name) for job in jobs.values() for name in ("", "anna")]
    for index, clip in enumerate(mixed.generate(both)):
        name = list(jobs)[index // 2]
        found = adapted[index // 2].codes if index % 2 else expected[f"{name}.codes"].numpy()
        np.testing.assert_array_equal(clip.codes, found)
    alone = Engine(values.adapted, sync_logits=lambda logits: logits)  # by the model's own forward
    for job, clip in zip(jobs.values(), adapted, strict=True):
        np.testing.assert_array_equal(alone.generate([job])[0].codes, clip.codes)


def test_every_check_is_named_above(values: Golden) -> None:
    assert tuple(check.name for check in values.checks()) == NAMES


def test_doctor_proves_an_installation(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    report = higgstune.doctor(golden_values=FOLDER)
    assert report.passed, report.text()
    assert len(report.of("golden", "ok")) == len(NAMES)
    assert all("largest difference" in finding.message for finding in report.of("golden"))
    monkeypatch.setattr(HiggsTTS3, "embed_rows", without_sum)
    code, out, _ = command("doctor", "--golden", str(FOLDER))
    assert code == 1
    assert "failed   golden: embeddings" in out


def test_doctor_says_what_a_folder_lacks(tmp_path: Path) -> None:
    [finding] = higgstune.doctor(golden_values=tmp_path).of("golden", "failed")
    assert "has no folder checkpoint" in finding.message


# The table of wrong variants in the README of the values: how far the logits are off.


def without_sum(model: HiggsTTS3, rows: Tensor) -> Tensor:
    first = torch.arange(model.config.num_codebooks) * model.config.codebook_size
    return model.audio_table(rows + first).mean(-2)


def off_by(values: Golden, inputs: Tensor | None = None, at: slice = slice(None)) -> float:
    """The largest difference of the logits of `CASE` whose inputs are these embeddings."""
    inputs = values.forward[f"{CASE}.inputs_embeds"] if inputs is None else inputs
    expected = values.forward[f"{CASE}.logits"]
    with torch.no_grad():
        hidden = values.model.model(inputs_embeds=inputs[None]).last_hidden_state[0, -len(expected) :]
        logits = values.model.audio_logits(hidden).unflatten(-1, (8, -1))
    return (logits - expected)[at].abs().max().item()


def embedded(values: Golden, ids: Tensor, rows: Tensor) -> Tensor:
    with torch.no_grad():
        return values.model.embed(ids, ids < 0, rows)


@pytest.fixture
def inputs(values: Golden) -> tuple[Tensor, Tensor, Tensor]:
    """Ids of the prompt, rows in its slots, and the rows of the target that are fed."""
    forward = values.forward
    return forward[f"{CASE}.prompt_ids"], forward[f"{CASE}.slot_rows"], forward[f"{CASE}.rows"][:-1]


def test_the_right_variant(values: Golden, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    ids, slots, rows = inputs
    full = torch.cat((ids, torch.full((len(rows),), -100)))
    assert off_by(values, embedded(values, full, torch.cat((slots, rows)))) < 1e-5


def change_theta(model: Any, patch: pytest.MonkeyPatch) -> None:
    rotary = model.model.rotary_emb
    size = 2 * len(rotary.inv_freq)
    patch.setitem(rotary._buffers, "inv_freq", 1.0 / 10_000 ** (torch.arange(0, size, 2) / size))


def leave_out_norms(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in model.model.layers:
        patch.setattr(layer.self_attn.q_norm, "forward", lambda x: x)
        patch.setattr(layer.self_attn.k_norm, "forward", lambda x: x)


def round_rotary(model: Any, patch: pytest.MonkeyPatch) -> None:
    plain = modeling_qwen3.apply_rotary_pos_emb
    patch.setattr(
        modeling_qwen3, "apply_rotary_pos_emb",
        lambda q, k, cos, sin: plain(q, k, cos.bfloat16().float(), sin.bfloat16().float()),
    )  # fmt: skip


@pytest.mark.parametrize(("spoil", "expected"), [(change_theta, 2.5), (leave_out_norms, 0.70), (round_rotary, 0.005)])
def test_a_wrong_model_is_off(
    values: Golden, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., None], expected: float
) -> None:
    spoil(values.model, monkeypatch)
    assert off_by(values) > 0.9 * expected


def test_a_wrong_prompt_is_off(values: Golden, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    ids, slots, rows = inputs
    tail = torch.full((len(rows),), -100)
    full, both = torch.cat((ids, tail)), torch.cat((slots, rows))
    codes = torch.from_numpy(values.turns(CASE)[1].codes)  # type: ignore[union-attr]
    slot = int((ids < 0).nonzero()[0])
    plain = torch.cat((ids[:slot], tail.new_full((len(codes),), -100), ids[slot + len(slots) :], tail))
    assert off_by(values, embedded(values, plain, torch.cat((codes, rows)))) == pytest.approx(4.0, rel=0.1)
    words = int((ids == values.prompter.tokenizer.convert_tokens_to_ids("<|ref_text|>")).nonzero())
    without = torch.cat((full[:words], full[slot - 1 :]))
    assert off_by(values, embedded(values, without, both)) == pytest.approx(4.2, rel=0.1)
    asr = full.clone()
    asr[0] = values.prompter.tokenizer.convert_tokens_to_ids("<|asr|>")
    assert off_by(values, embedded(values, asr, both)) == pytest.approx(1.1, rel=0.1)
    started = torch.cat((slots, torch.full((1, 8), 1024), rows))
    longer = torch.cat((full, tail[:1]))
    assert off_by(values, embedded(values, longer, started)) == pytest.approx(8.5, rel=0.1)


def test_a_mean_over_codebooks_is_off(
    values: Golden, inputs: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, slots, rows = inputs
    monkeypatch.setattr(HiggsTTS3, "embed_rows", without_sum)
    full = torch.cat((ids, torch.full((len(rows),), -100)))
    assert off_by(values, embedded(values, full, torch.cat((slots, rows)))) == pytest.approx(7.9, rel=0.1)


def mean_loss(values: Golden, labels: Tensor) -> float:
    logits = values.forward[f"{CASE}.logits"]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE).item()


def test_wrong_labels_give_another_loss(values: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = values.forward[f"{CASE}.rows"]
    labels = torch.from_numpy(labels_of(rows.numpy()))
    assert mean_loss(values, labels) == pytest.approx(0.385, abs=5e-3)
    assert mean_loss(values, rows) == pytest.approx(1.488, rel=0.02)  # BOC in the loss
    unshifted = values.forward[f"{CASE}.logits"][1:].flatten(0, 1)
    assert F.cross_entropy(unshifted, labels[:-1].flatten(), ignore_index=IGNORE).item() > 3
    monkeypatch.setattr(golden_module, "labels_of", lambda rows, entries="": np.asarray(rows))
    [check] = [check for check in values.checks() if check.name == "losses by codebook"]
    assert compare(check)[0].status == "failed"
