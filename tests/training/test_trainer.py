"""The trainer: nothing leaks, accumulation and padding change nothing, frozen means frozen."""

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_values import Golden
from tiny_checkpoint import tiny_prompter
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import CODES, arguments, example, loaded_and_prompter, trainer

from higgstune.batch.collate import pack, shifted_targets
from higgstune.config.recipe import Lora
from higgstune.errors import TrainingError
from higgstune.families.base import Example
from higgstune.families.higgs_v2.packed import with_training_forward
from higgstune.kernels.loss import IGNORE, LossWeights, add_sums, combine, head_sums, label_counts
from higgstune.model.adapters import adapted_layers, add_lora
from higgstune.training.checkpoint import SEAL
from higgstune.training.trainer import HiggsAudioTrainer

EOS = CODES + 1


def test_golden_losses() -> None:
    """Sums and counts of `golden/base`, through the collator's own shift."""
    golden = Golden("base")
    labels = golden.values["expected_audio_labels"]  # [rows, K] over all segments of the batch
    logits = golden.values["audio_logits"]
    starts = [*golden.values["audio_out_ids_start"].tolist(), len(labels)]
    losses, counts = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.long)
    for start, end in itertools.pairwise(starts):
        rows = end - start
        segment = Example("", np.zeros(rows, int), np.ones(rows, bool), np.zeros((rows, 8), int),
                          np.full(rows, IGNORE), labels[start:end].numpy())  # fmt: skip
        targets = shifted_targets(segment)
        audio = torch.from_numpy(targets["audio_targets"])
        rows_that_predict = logits[start:end][targets["audio_positions"]].flatten(1)
        losses += head_sums(rows_that_predict, torch.eye(rows_that_predict.shape[1]), audio, eos_id=33)["loss"]
        counts += (audio != IGNORE).sum(0)
    assert counts.tolist() == golden.values["expected_codebook_label_count"].tolist()
    torch.testing.assert_close(losses, golden.values["expected_codebook_loss_sum"], atol=1e-4, rtol=1e-6)


def fresh_code_losses(*, shifted: bool, steps: int) -> list[float]:
    """Train on new random codes in every step; the loss over codes of each step."""
    model, prompter = tiny_prompter(codes=CODES)
    with_training_forward(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        batch = pack([example(prompter, 24, seed=1000 * step + i) for i in range(4)])
        if not shifted:  # as the public trainers did: each position predicts the frame that it has just read
            batch["audio_positions"] = batch["audio_positions"] + 1
        sums, counts = model(**batch), label_counts(batch, eos_id=EOS)
        optimizer.zero_grad()
        combine(sums, counts, LossWeights(text=0)).backward()
        optimizer.step()
        codes = (sums["audio_loss"] - sums["audio_eos_loss"]).sum() / (counts["audio"] - counts["audio_eos"]).sum()
        losses.append(codes.item())
    return losses


def test_nothing_leaks_fresh_random_codes_cannot_be_learnt() -> None:
    last = fresh_code_losses(shifted=True, steps=250)[-50:]
    assert sum(last) / 50 >= math.log(CODES) - 0.05


def test_without_the_shift_the_same_loss_falls_far_below_what_is_possible() -> None:
    last = fresh_code_losses(shifted=False, steps=250)[-50:]
    assert sum(last) / 50 < 0.5 * math.log(CODES)


def gradients(batches: list[list[Example]], weights: LossWeights) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one optimizer step over micro-batches."""
    loaded, _ = loaded_and_prompter()
    torch.manual_seed(0)
    model = add_lora(with_training_forward(loaded.model), Lora(r=4), "full")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    collated = [pack(batch) for batch in batches]
    counts = add_sums([label_counts(batch, eos_id=EOS) for batch in collated])
    total = 0.0
    for batch in collated:
        loss = combine(model(**batch), counts, weights)
        loss.backward()
        total += loss.item()
    return total, [p.grad for p in model.parameters() if p.grad is not None]


def test_accumulation_padding_and_order_change_neither_loss_nor_gradients() -> None:
    _, prompter = loaded_and_prompter()
    clips = [example(prompter, frames, seed=frames, text="Hello. " * frames) for frames in (3, 11, 5, 8)]
    weights = LossWeights(text=0.7, audio=1.3, codebooks=[8, 4, 2, 1, 1, 1, 1, 1])
    whole, expected = gradients([clips], weights)
    for split in ([clips[:1], clips[1:]], [[c] for c in clips], [clips[::-1]], [clips[2:], clips[:2]]):
        loss, found = gradients(split, weights)
        assert loss == pytest.approx(whole, abs=1e-5)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_trainer_gives_the_same_adapter_for_accumulation_and_for_one_batch(tmp_path: Path) -> None:
    runs = []
    for name, batch_size, accumulation in (("a", 4, 1), ("b", 1, 4), ("c", 2, 2)):
        run = trainer(
            tmp_path / name, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
            max_grad_norm=1e9,
        )  # fmt: skip
        run.train()
        logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        weights = torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad])
        runs.append((logged, weights))
    for logged, weights in runs[1:]:
        assert logged == pytest.approx(runs[0][0], abs=1e-4)
        torch.testing.assert_close(weights, runs[0][1], atol=1e-4, rtol=1e-3)


def digest(parameters: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for name, p in parameters.items()}


def test_a_text_stage_leaves_every_audio_parameter_as_it_was(tmp_path: Path) -> None:
    run = trainer(tmp_path, kind="text")
    audio = {n: p for n, p in run.model.named_parameters() if "audio" in n}
    assert len(audio) == 2 * (3 + 2) + 2  # audio_mlp and two norms in each layer, the table, the head
    before, text_before = digest(audio), digest(dict(run.model.named_parameters()))
    assert not any(p.requires_grad for p in audio.values())
    run.train()
    assert all(p.grad is None for p in audio.values())
    assert digest(audio) == before
    changed = {n for n, d in digest(dict(run.model.named_parameters())).items() if d != text_before[n]}
    assert changed
    assert all("lora_" in name for name in changed)
    assert all(layer.startswith("model.layers.") for layer in adapted_layers(run.model))
    assert len(adapted_layers(run.model)) == 2 * 7


def test_the_audio_loss_reaches_the_text_pathway_through_the_frozen_audio_modules(tmp_path: Path) -> None:
    run = trainer(tmp_path, kind="text", weights=LossWeights(text=0.0, audio=1.0), max_steps=2)
    run.train()
    moved = [p for n, p in run.model.named_parameters() if "lora_B" in n and p.abs().sum() > 0]
    assert any(True for _ in moved)
    mlp = [n for n, p in run.model.named_parameters() if ".mlp." in n and "lora_B" in n and p.abs().sum() > 0]
    assert mlp  # text tokens affect audio through the shared attention


def test_what_is_logged(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    first = next(entry for entry in run.state.log_history if "loss" in entry)
    for key in ("audio_loss", "text_loss", "code_loss", "eos_loss", "tokens_per_second", "audio_seconds_per_second"):
        assert math.isfinite(first[key])
    assert {f"audio_loss_{k}" for k in range(8)} <= first.keys()
    assert first["audio_loss"] == pytest.approx(sum(first[f"audio_loss_{k}"] for k in range(8)) / 8, rel=1e-5)
    assert first["loss"] == pytest.approx(first["audio_loss"] + first["text_loss"], rel=1e-4)


def test_an_impossible_validation_loss_stops_the_run_and_says_what_to_suspect(tmp_path: Path) -> None:
    _, prompter = loaded_and_prompter()
    clips = [example(prompter, 6, seed=0)]
    run = trainer(
        tmp_path, kind=None, data=clips, eval_dataset=clips, max_steps=200, learning_rate=5e-3, eval_strategy="steps",
        eval_steps=20, per_device_train_batch_size=1,
    )  # fmt: skip
    with pytest.raises(TrainingError, match="validation clips are in the training data"):
        run.train()
    assert run.state.global_step < 200


def test_a_trainer_without_tokenizers_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        HiggsAudioTrainer(args=arguments(tmp_path), train_dataset=[])  # type: ignore[call-arg]
    run = trainer(tmp_path)
    assert run.tokenizer is run.loaded.tokenizer
    assert run.audio_tokenizer is run.loaded.audio_tokenizer


def test_gradient_checkpointing_and_bf16_autocast_train(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", max_steps=2)
    plain.train()
    saving = trainer(
        tmp_path / "saving", max_steps=2, activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    saving.train()
    losses = [[e["loss"] for e in run.state.log_history if "loss" in e] for run in (plain, saving)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    half = trainer(tmp_path / "half", max_steps=2, bf16=True)
    half.train()
    half_losses = [e["loss"] for e in half.state.log_history if "loss" in e]
    assert half_losses == pytest.approx(losses[0], rel=0.05)


def test_checkpoints_hold_nothing_pickled_and_the_newest_stay(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert {path.suffix for path in tmp_path.glob("checkpoint-*/*")} <= {".json", ".safetensors", ".md"}


@pytest.mark.parametrize("kind", ["full", None])
def test_a_checkpoint_is_resumed_from_exactly_with_an_adapter_and_without(tmp_path: Path, kind: str | None) -> None:
    whole = trainer(tmp_path / "a", kind=kind, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer(tmp_path / "b", kind=kind, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (name, value), (_, expected) in zip(
        resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert torch.equal(value, expected), name


def rates(run: Any) -> list[float]:
    return [entry["learning_rate"] / 1e-3 for entry in run.state.log_history if "learning_rate" in entry]


@pytest.mark.parametrize(
    ("warmup", "scheduler", "expected"),
    [
        (2, "linear", [1 / 2, 1, 1, 1 / 2]), (2, "constant_with_warmup", [1 / 2, 1, 1, 1]),
        (0, "linear", [1, 3 / 4, 1 / 2, 1 / 4]), (8, "cosine", [1 / 8, 2 / 8, 3 / 8, 4 / 8]),
    ],
)  # fmt: skip
def test_no_step_of_a_warm_up_has_a_rate_of_zero(
    tmp_path: Path, warmup: int, scheduler: str, expected: list[float]
) -> None:
    run = trainer(tmp_path, warmup_steps=warmup, lr_scheduler_type=scheduler)
    run.train()
    assert rates(run) == pytest.approx(expected)
    if warmup:
        before = trainer(tmp_path, warmup_steps=warmup, lr_scheduler_type=scheduler, warmup_from=0)
        before.train()
        assert rates(before)[:warmup] == pytest.approx([0, *expected[:3]][:warmup])


def test_a_checkpoint_from_before_resumes_with_its_own_warm_up(tmp_path: Path) -> None:
    settings = {"warmup_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "a", warmup_from=0, **settings)
    whole.train()
    old = tmp_path / "a" / "checkpoint-2"
    notes = json.loads((old / SEAL).read_text())
    assert notes.pop("warmup_from") == 0
    (old / SEAL).write_text(json.dumps(notes))
    resumed = trainer(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(old))
    assert rates(resumed) == rates(whole)
    for (name, value), expected in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(value, expected), name


class CountedReads(TorchDispatchMode):
    """Counts values that the host reads: on a GPU it waits for each."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select"))
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_but_whether_the_one_before_was_finite(tmp_path: Path) -> None:
    _, prompter = loaded_and_prompter()
    data = [example(prompter, 5 + i % 4, seed=i) for i in range(20)]  # one epoch: a new one may read
    reads = {}
    for steps in (3, 9):
        run = trainer(tmp_path / str(steps), data=data, max_steps=steps, logging_steps=100)
        with CountedReads() as counted:
            run.train()
        reads[steps] = counted.reads
    assert reads[9] - reads[3] == 6
