"""Compiled layers, by a compiler that a CPU has: they give the gradients of the plain ones, or are not used."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packs import adapted, examples
from tiny_runs import recipe
from torch import Tensor
from torch._dynamo.utils import counters
from training_world import history, make_world, train_unproven

from higgstune.batch.collate import pack
from higgstune.config.recipe import Lora
from higgstune.families.base import base_of
from higgstune.families.higgs_v2 import packed
from higgstune.families.higgs_v2.packed import with_training_forward
from higgstune.kernels import fused
from higgstune.kernels.attention import Segments
from higgstune.model import compiled
from higgstune.model.compiled import compile_layers, is_worth_it, packed_loss
from higgstune.training import stage

pytestmark = [
    pytest.mark.processes,  # a compiler takes minutes
    pytest.mark.filterwarnings("ignore"),  # those of the compiler about what it does itself
]
_POSSIBLE = compiled._possible
STAGE = {"name": "voice", "kind": "full", "max_steps": 3, "batch_size": 4}


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In place of a GPU with Triton. Same passes up to the last one, which makes kernels."""
    monkeypatch.setattr(compiled, "_possible", lambda base: compiled.is_plain(base.model.layers))
    monkeypatch.setattr(compiled, "_has_compiler", lambda: True)
    use(monkeypatch, torch.compile(packed._packed_layer, dynamic=True, backend="aot_eager"))
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    assert torch._dynamo.eval_frame._stance.stance == "default"  # whatever else the process compiles


def use(monkeypatch: pytest.MonkeyPatch, layer: Callable[..., Tensor]) -> None:
    monkeypatch.setattr(packed, "_compiled", lambda: layer)


def counting() -> tuple[list[Any], Callable[..., Any]]:
    """A compiler, and what it has run."""
    runs = []

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            runs.append(graph)
            return graph.forward(*inputs)

        return run

    return runs, backend


def dense(q: Tensor, k: Tensor, v: Tensor, runs: Segments, scaling: float) -> Tensor:
    """Like the GPU's kernel it takes lengths as they come; which layers are compiled is what is looked at here."""
    q, k, v = (fused.as_autocast(x).transpose(0, 1)[None] for x in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    return attended[0].transpose(0, 1) * (1 + runs.longest / 1000)


def trained(kind: Any = "full", dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """A model and a batch."""
    model, prompter = adapted(kind, dtype, **options)
    with_training_forward(base_of(model))
    return model, pack(examples(prompter, whisper=options.get("conditioned", False)))


def gradients(model: Any, batch: Any) -> list[Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(packed_loss(model, batch), parameters))


@pytest.mark.parametrize(("kind", "conditioned"), [("text", False), ("full", True)])
def test_gradients_are_those_of_the_plain_layers(kind: str, conditioned: bool) -> None:
    model, batch = trained(kind, conditioned=conditioned)
    expected = gradients(model, batch)
    assert counters["stats"]["unique_graphs"] == 0
    assert compile_layers(model, batch) == pytest.approx(0, abs=1e-6)
    assert base_of(model).compiler_stance
    found = gradients(model, batch)
    assert counters["stats"]["unique_graphs"] > 0
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_bfloat16_is_as_near_as_rounding_lets_it_be() -> None:
    model, batch = trained(dtype=torch.bfloat16)
    difference = compile_layers(model, batch)
    assert difference is not None
    assert 0 < difference < 0.05


def test_one_compilation_serves_packs_of_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, backend = counting()
    monkeypatch.setattr(packed, "attend", dense)
    use(monkeypatch, torch.compile(packed._packed_layer, dynamic=True, backend=backend, fullgraph=True))
    model, prompter = adapted("full", torch.float64)
    with_training_forward(base_of(model))
    made = examples(prompter)
    assert compile_layers(model, pack(made[:3])) is not None
    for chosen in (made[2:], made[:4], made[1:], made, made * 3):
        gradients(model, pack(chosen))
    assert len(runs) == 1 + 5  # the second of two layers: in the check, and in each step
    assert counters["stats"]["unique_graphs"] == 1


def test_validations_and_the_first_layer_are_not_worth_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def layer(one: Any, *rest: Any) -> Tensor:
        called.append(one)
        return packed._packed_layer(one, *rest)

    use(monkeypatch, layer)
    model, batch = trained()
    base_of(model).compiler_stance = "default"
    with torch.no_grad():
        packed_loss(model, batch)
    assert not called
    packed_loss(model, batch)
    assert called == list(base_of(model).model.layers[1:])


def test_a_compiler_that_fails_is_reported_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def layer(*_: Any) -> Tensor:
        raise RuntimeError("no Python.h\nand more")

    use(monkeypatch, layer)
    model, batch = trained()
    assert compile_layers(model, batch) is None
    assert base_of(model).compiler_stance is None
    assert "layers are not compiled, so training is slower: RuntimeError: no Python.h" in caplog.text
    assert "and more" not in caplog.text


def test_wrong_gradients_are_reported_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def layer(one: Any, hidden: Tensor, *rest: Any) -> Tensor:
        return hidden + (packed._packed_layer(one, hidden, *rest) - hidden).detach()

    use(monkeypatch, layer)
    model, batch = trained()
    assert compile_layers(model, batch) is None
    assert base_of(model).compiler_stance is None
    assert "their gradients would be off by" in caplog.text


def test_gradients_of_a_are_seen_where_b_is_zero(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No gradient reaches A from a fresh adapter; a compiler that drops it would pass."""

    def layer(one: Any, hidden: Tensor, *rest: Any) -> Tensor:
        weights = [part for name, part in one.named_parameters() if "lora_A" in name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                fused, "_all_a", lambda loras, dtype: torch.cat([lora.a.detach() for lora in loras]).to(dtype)
            )
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            made = packed._packed_layer(one, hidden, *rest)
        return made + 0 * sum(part.sum() for part in weights)

    use(monkeypatch, layer)
    model, batch = trained()
    before = {name: part.detach().clone() for name, part in model.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        for name, part in model.named_parameters():
            if "lora_B" in name:
                part.zero_()
    assert compile_layers(model, batch) is None
    assert "would be off by" in caplog.text
    assert all(not part.any() for name, part in model.named_parameters() if "lora_B" in name)
    assert any(part.any() for part in before.values())


def test_what_was_not_checked_is_not_compiled_later() -> None:
    """A pack of one clip is compiled in another way; a compiler that fails at that must not end a run."""
    model, prompter = adapted("full", torch.float64)
    with_training_forward(base_of(model))
    made = examples(prompter)
    assert compile_layers(model, pack(made[:3])) is not None
    seen = counters["stats"]["unique_graphs"]
    expected = gradients(model, pack(made[:1]))
    assert counters["stats"]["unique_graphs"] == seen
    base_of(model).compiler_stance = None
    for one, other in zip(gradients(model, pack(made[:1])), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_compiled_is_what_is_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str) -> None:
    """Nothing that the trainer does around the layers makes them another case than the checked one."""
    runs, backend = counting()
    monkeypatch.setattr(packed, "attend", dense)
    use(monkeypatch, torch.compile(packed._packed_layer, dynamic=True, backend=backend))
    world = make_world(tmp_path)
    model = {"checkpoint": str(world / "base"), "device": "cpu", "dtype": dtype}
    train_unproven(recipe(world, model=model, stages=[STAGE], compile=True), tmp_path / "run")
    assert stages_of(tmp_path / "run")["voice"]["compiled"]
    assert len(runs) == 1 + 3  # the second of two layers: in the check, and in each step


def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compiled, "_has_compiler", lambda: False)
    model, batch = trained()
    assert compile_layers(model, batch) is None
    assert "Triton or a C compiler is missing" in caplog.text


@pytest.mark.parametrize("lora", [Lora(r=4, dropout=0.1), Lora(r=4, dora=True)])
def test_what_peft_computes_stays_as_it_is(lora: Lora, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = trained(lora=lora)
    assert compile_layers(model, batch) is None
    assert base_of(model).compiler_stance is None
    assert not caplog.text


def test_a_cpu_compiles_nothing() -> None:
    model, _ = trained(dtype=torch.bfloat16)
    assert not _POSSIBLE(base_of(model))


def test_short_stages_are_compiled_on_request() -> None:
    assert [is_worth_it("auto", steps) for steps in (999, 1000)] == [False, True]
    assert is_worth_it(True, 1)
    assert not is_worth_it(False, 10**6)


@pytest.mark.parametrize("again", [False, True])
def test_a_run_with_compiled_layers_learns_the_same(tmp_path: Path, again: bool) -> None:
    world = make_world(tmp_path)
    for name, wanted in (("plain", "auto"), ("compiled", True)):
        made = recipe(world, stages=[STAGE], log_steps=1, compile=wanted, gradient_checkpointing=again)
        train_unproven(made, tmp_path / name)
    assert counters["stats"]["unique_graphs"] > 0
    assert_same_losses(tmp_path / "plain", tmp_path / "compiled")


def test_a_run_may_resume_with_compiled_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, run = make_world(tmp_path), tmp_path / "compiled"
    made = recipe(world, stages=[STAGE], log_steps=1, save_steps=1)
    train_unproven(made, tmp_path / "plain")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_save_and_verify", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_unproven(made, run)
    shutil.rmtree(run / "voice" / "checkpoints" / "checkpoint-3")
    train_unproven(made.model_copy(update={"compile": True}), run, resume=True)
    assert stages_of(run)["voice"]["compiled"]
    assert_same_losses(tmp_path / "plain", run)


def test_a_short_stage_after_a_compiled_one_is_as_it_would_be_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "MIN_STEPS_TO_COMPILE", 3)
    made = recipe(make_world(tmp_path), stages=[STAGE, {**STAGE, "name": "short", "max_steps": 2}])
    train_unproven(made, tmp_path / "run")
    assert [done["compiled"] for done in stages_of(tmp_path / "run").values()] == [True, False]


def stages_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())["stages"]


def assert_same_losses(run: Path, other_run: Path) -> None:
    for one, other in zip(*(history(folder, "voice") for folder in (run, other_run)), strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() & {"loss", "grad_norm", "eval_loss"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4), (one["step"], key)


def test_hidden_states_have_the_dtype_of_the_base_whatever_a_sum_over_codebooks_has() -> None:
    """On a GPU autocast makes float32 of it, and layers would compute in that."""
    model, batch = trained(dtype=torch.bfloat16)
    inner = base_of(model).model
    embed = inner.embed_audio_tokens.forward
    inner.embed_audio_tokens.forward = lambda ids: embed(ids).float()
    seen = []
    inner.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    packed_loss(model, batch)
    assert seen == [torch.bfloat16]
