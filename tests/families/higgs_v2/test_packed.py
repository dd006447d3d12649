"""Packed training against the native forward, one example at a time: the same losses, the same gradients."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packs import CODES, D_MODEL, adapted, examples
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from tiny_checkpoint import random_codes, tiny_prompter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from higgstune.batch.collate import PaddedCollator, pack
from higgstune.batch.dataset import TARGET
from higgstune.batch.loader import PackLoader, example_lengths
from higgstune.batch.packing import PackSize
from higgstune.codec.base import WhisperFeatures
from higgstune.config.recipe import Lora
from higgstune.data.messages import speech_messages
from higgstune.errors import CheckpointError
from higgstune.families.base import Example, base_of
from higgstune.families.higgs_v2.packed import with_training_forward
from higgstune.families.higgs_v2.prompter import Prompter
from higgstune.kernels.fused import linear, linears
from higgstune.kernels.loss import IGNORE, head_sums, label_counts
from higgstune.model.adapters import add_lora


def native_loss(model: PeftModel, example: Example) -> Tensor:
    """Sums of both losses by the native forward and the plainest of formulas, from a batch of one."""
    base = base_of(model)
    batch = PaddedCollator(pad_id=1, stream_eos=CODES + 1)([example])
    inputs = {k: v for k, v in batch.items() if not k.endswith(("_positions", "_targets"))}
    hidden = base.model(**inputs, use_cache=False).last_hidden_state[0]
    rows = np.flatnonzero(example.audio_mask)
    predicted = base.audio_lm_head(hidden[rows - 1]).view(len(rows), 8, -1)
    audio = sum(
        F.cross_entropy(predicted[:, k].float(), torch.from_numpy(example.audio_labels[:, k]), reduction="sum")
        for k in range(8)
    )
    text = F.cross_entropy(
        base.text_lm_head(hidden[:-1]).float(), torch.from_numpy(example.text_labels[1:]), reduction="sum"
    )
    return audio + 0.3 * text


def gradients(model: PeftModel, losses: Iterator[Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES: dict[str, Callable[[], tuple[PeftModel, Prompter]]] = {
    "full": lambda: adapted("full", torch.float64),
    "text": lambda: adapted("text", torch.float64),
    "conditioned": lambda: adapted("full", torch.float64, conditioned=True),
    "dora": lambda: adapted("full", torch.float64, lora=Lora(r=4, dora=True)),
    "rslora": lambda: adapted("full", torch.float64, lora=Lora(r=4, rslora=True)),
    "float32": lambda: adapted("full", torch.float32),
}


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_packed_losses_and_gradients_are_the_sum_of_the_single_examples(case: str, share_prefix: bool) -> None:
    model, prompter = CASES[case]()
    made = examples(prompter, whisper=case == "conditioned")
    expected_loss, expected = gradients(model, (native_loss(model, example) for example in made))
    with_training_forward(base_of(model))
    batch = pack(made, share_prefix=share_prefix)
    sums = model(**batch)
    loss, found = gradients(model, iter([sums["audio_loss"].sum() + 0.3 * sums["text_loss"]]))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_what_all_begin_with_is_computed_once() -> None:
    _, prompter = tiny_prompter(codes=CODES)
    made = [example for example in examples(prompter) if "Hi." not in example.prompt]
    batch = pack(made)
    shared = batch["shared_at"].shape[1]
    texts = [example.input_ids[: shared + 1].tolist() for example in made]
    assert shared > 10
    assert all(text[:shared] == texts[0][:shared] for text in texts)
    assert len({text[shared] for text in texts}) > 1
    positions = sum(len(example) for example in made)
    assert len(batch["position_ids"]) == positions
    assert len(batch["from_sequence"]) == positions - (len(made) - 1) * shared


def test_no_audio_and_no_whole_example_is_ever_shared() -> None:
    _, prompter = tiny_prompter(codes=CODES)
    one = examples(prompter)[0]
    batch = pack([one, one, one])
    assert batch["shared_at"].shape[1] == np.flatnonzero(one.audio_mask)[0]


def test_examples_do_not_see_each_other() -> None:
    model, prompter = adapted("full", torch.float32)
    with_training_forward(base_of(model))
    first, second, other = examples(prompter)[:3]
    with torch.no_grad():
        both, changed, alone = (model(**pack(made)) for made in ([first, second], [other, second], [second]))
        others = [model(**pack([example])) for example in (first, other)]
    for packed, companion in ((both, others[0]), (changed, others[1])):
        for key in ("audio_loss", "text_loss"):
            torch.testing.assert_close(packed[key], alone[key] + companion[key], rtol=1e-5, atol=1e-4)


def test_pieces_of_the_heads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompter = adapted("full", torch.float64)
    with_training_forward(base_of(model))
    batch = pack(examples(prompter))

    def run() -> tuple[float, dict[str, Tensor]]:
        sums = model(**batch)
        return gradients(model, iter([sums["audio_loss"].sum() + sums["text_loss"]]))

    loss, expected = run()
    monkeypatch.setattr("higgstune.kernels.loss._MAX_LOGITS", 3000)
    in_pieces, found = run()
    assert in_pieces == pytest.approx(loss, rel=1e-6)  # losses are float32
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_the_heads_sums_are_those_of_plain_formulas() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 5), torch.randn(3 * 7, 5)
    targets = torch.randint(0, 7, (9, 3))
    targets[::2, 0] = IGNORE
    logits = (hidden @ weight.T).view(9, 3, 7)
    targets[1] = logits[1].argmax(-1)  # at least one hit for each head
    sums = head_sums(hidden, weight, targets, eos_id=6)
    for k in range(3):
        losses = F.cross_entropy(logits[:, k], targets[:, k], reduction="none")
        torch.testing.assert_close(sums["loss"][k], losses.sum())
        torch.testing.assert_close(sums["eos_loss"][k], losses[targets[:, k] == 6].sum())
        assert sums["hits"][k] == (logits[:, k].argmax(-1) == targets[:, k]).sum() > 0


class NothingWaits(TorchDispatchMode):
    """Fails on what would make a GPU wait: values read by the host, shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "masked_scatter", "is_nonzero", "equal.default")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in self.WAITING):
            raise AssertionError(f"{func} waits for the device")
        if "index" in str(func):
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            assert all(x.dtype != torch.bool for x in tensors), f"{func} with a mask waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("conditioned", [False, True])
def test_nothing_in_forward_and_backward_waits_for_the_device(conditioned: bool) -> None:
    model, prompter = adapted("full", torch.float32, conditioned=conditioned)
    with_training_forward(base_of(model))
    batch = pack(examples(prompter, whisper=conditioned))
    with NothingWaits():
        sums = model(**batch)
        (sums["audio_loss"].sum() + sums["text_loss"]).backward()
    with pytest.raises(AssertionError, match="waits"), NothingWaits():
        native_loss(model, examples(prompter)[0])


def test_bfloat16_keeps_what_lora_has_learnt() -> None:
    """An update far below the spacing of bfloat16 around the weights reaches the output all the same."""
    model, _ = tiny_prompter(codes=CODES)
    layer: Any = (
        base_of(add_lora(model.to(torch.bfloat16), Lora(r=4, alpha=8), "full")).model.layers[0].self_attn.q_proj
    )
    half = torch.randn(5, 32, dtype=torch.bfloat16)
    x = torch.cat((half, -half), dim=1)  # the weights, all 1, give nothing: what comes out is the update alone
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)
        layer.lora_B.default.weight.normal_(std=1e-3)
        update = 2 * x.float() @ layer.lora_A.default.weight.T @ layer.lora_B.default.weight.T
        assert (linear(x, layer).float() - update).norm() < 0.02 * update.norm()


def test_layers_in_one_go_may_have_ranks_of_their_own_and_outputs_that_nothing_uses() -> None:
    torch.manual_seed(0)
    pattern = {"rank_pattern": {"1": 2}, "alpha_pattern": {"2": 9}}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "1", "2"], **pattern)
    bare = nn.Sequential(*(nn.Linear(16, width, bias=False) for width in (16, 8, 24)))
    layers: Any = inject_adapter_in_model(config, bare).double()
    for layer in layers:
        nn.init.normal_(layer.lora_B.default.weight)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    found, expected = linears(x, list(layers)), [layer(x) for layer in layers]
    torch.testing.assert_close(tuple(found), tuple(expected))
    assert [len(layer.lora_A.default.weight) for layer in layers] == [4, 2, 4]
    of = [x, *(weight for weight in layers.parameters() if weight.requires_grad)]
    one, other = (
        torch.autograd.grad((y[0].square() + 3 * y[2].square().sum()).sum(), of, materialize_grads=True)
        for y in (found, expected)
    )
    torch.testing.assert_close(one, other)


def test_native_calls_stay_native() -> None:
    model, prompter = tiny_prompter(codes=CODES)
    batch = PaddedCollator(pad_id=1, stream_eos=CODES + 1)(examples(prompter))
    inputs = {k: v for k, v in batch.items() if not k.endswith(("_positions", "_targets"))}
    with torch.no_grad():
        before = model(**inputs).logits
        after = with_training_forward(with_training_forward(model))(**inputs).logits
    assert torch.equal(before, after)


def test_a_padded_batch_with_targets_is_refused() -> None:
    model, prompter = tiny_prompter(codes=CODES)
    batch = PaddedCollator(pad_id=1, stream_eos=CODES + 1)(examples(prompter))
    with pytest.raises(ValueError, match="pack the examples"):
        with_training_forward(model)(**batch)


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"attention_dropout": 0.1}])
def test_an_architecture_that_is_not_computed_is_refused(change: dict[str, Any]) -> None:
    model, _ = tiny_prompter(codes=CODES)
    model.config.update(change)
    with pytest.raises(CheckpointError, match="supports only silu without attention dropout"):
        with_training_forward(model)


def test_the_loader_gives_every_example_once_and_mutes_what_fills_up() -> None:
    _, prompter = tiny_prompter(codes=CODES)
    made = examples(prompter)
    expected = label_counts(pack(made), eos_id=CODES + 1)
    counts, batches = None, 0
    for rank in range(2):
        loader = PackLoader(made, PackSize(clips=1), seed=3, rank=rank, processes=2)
        for batch in loader:
            found = label_counts(batch, eos_id=CODES + 1)
            counts = found if counts is None else {key: counts[key] + found[key] for key in found}
            batches += 1
    assert batches == 6  # five examples in two processes
    assert counts is not None
    assert all(torch.equal(counts[key], expected[key]) for key in expected)


def test_a_loader_takes_no_random_number_from_training() -> None:
    """Dropout would be another one after each validation."""
    _, prompter = tiny_prompter(codes=CODES)
    before = torch.get_rng_state()
    assert len(list(PackLoader(examples(prompter)[:2], PackSize(clips=1), seed=0))) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_a_muted_batch_has_a_loss_and_gradients_of_zero() -> None:
    model, prompter = adapted("full", torch.float32)
    with_training_forward(base_of(model))
    loader = PackLoader(examples(prompter)[:1], PackSize(clips=1), seed=None, rank=1, processes=2)
    (batch,) = loader
    assert (batch["audio_targets"] != IGNORE).sum() == 0
    sums = model(**batch)
    loss, found = gradients(model, iter([sums["audio_loss"].sum() + sums["text_loss"]]))
    assert loss == 0
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    assert all(not gradient.any() for gradient in found.values())


def test_lengths_are_known_from_shapes_alone() -> None:
    _, prompter = tiny_prompter(codes=CODES)
    features = np.zeros((7, D_MODEL), dtype=np.float16)
    reference, target = random_codes(4, 1, codes=CODES), random_codes(9, 2, codes=CODES)
    voice = [*speech_messages("Good morning.", voice="r"), TARGET]
    turn = [*speech_messages("Hello.", context=[("Hi.", "r")]), TARGET]
    conversations = [
        (voice, [WhisperFeatures(features, (3, 4)), target]),
        (voice, [reference, target]),
        (turn, [reference, target]),
    ]
    expected = [len(prompter.example(messages, audio)) for messages, audio in conversations]
    shapes: list[Any] = [
        (
            messages,
            [
                item if isinstance(item, WhisperFeatures) else np.broadcast_to(np.uint16(0), item.shape)
                for item in audio
            ],
        )
        for messages, audio in conversations
    ]
    assert prompter.lengths(shapes) == expected
    assert example_lengths([prompter.example(*conversations[0])]).tolist() == expected[:1]


def test_two_targets_and_labels_in_what_is_shared() -> None:
    model, prompter = adapted("full", torch.float64)
    opening = [*speech_messages("Say two things, as I do."), TARGET, *speech_messages("And now?", scene=None)[1:]]
    ends = [
        {"role": "assistant", "content": [{"type": "text", "text": "Well."}, {"type": "audio", "url": "t"}]},
        TARGET,
    ]
    made = [
        prompter.example([*opening, end], [random_codes(5, 1, codes=CODES), random_codes(4 + i, i, codes=CODES)],
                         text_targets="transcript", target_from=2)
        for i, end in enumerate(ends)
    ]  # fmt: skip
    expected_loss, expected = gradients(model, (native_loss(model, example) for example in made))
    with_training_forward(base_of(model))
    batch = pack(made)
    assert (batch["text_positions"] < batch["shared_at"].shape[1]).any()
    sums = model(**batch)
    loss, found = gradients(model, iter([sums["audio_loss"].sum() + 0.3 * sums["text_loss"]]))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_fsdp_finds_the_layers() -> None:
    model, _ = tiny_prompter(codes=CODES)
    with_training_forward(model)
    names = {type(part).__name__ for part in model.modules()}
    assert set(model._no_split_modules) == {type(layer).__name__ for layer in model.model.layers} <= names
