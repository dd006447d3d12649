"""Steps with gradients that are not finite change nothing, and too many of them end the run."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import example, loaded_and_prompter, trainer

from higgstune.errors import TrainingError
from higgstune.training.metrics import FiniteSteps


def world() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    parameter = torch.nn.Parameter(torch.ones(3))
    return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=True)


def take(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: FiniteSteps, value: float) -> None:
    parameter.grad = torch.full((3,), value)
    steps.note(parameter.grad.norm(), optimizer, step=0)
    optimizer.step()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments(value: float) -> None:
    (a, plain), (b, careful) = world(), world()
    steps, clean = FiniteSteps(print), FiniteSteps(print)
    for gradient in (1.0, 2.0):
        take(a, plain, clean, gradient)
    for gradient in (1.0, value, 2.0, 3.0):
        take(b, careful, steps, gradient)
    take(a, plain, clean, 3.0)
    assert torch.equal(a, b)
    for key, state in plain.state[a].items():
        assert torch.equal(state, careful.state[b][key]), key
    assert steps.skipped == 1
    assert clean.skipped == 0


def test_ten_in_a_row_end_the_run_and_nine_do_not() -> None:
    parameter, optimizer = world()
    steps = FiniteSteps(print)
    for gradient in [*[float("nan")] * 9, 1.0, *[float("nan")] * 10]:
        take(parameter, optimizer, steps, gradient)
    with pytest.raises(TrainingError, match="10 steps in a row are not finite"):
        take(parameter, optimizer, steps, 1.0)


def spoil_step(run: Any, which: int) -> Callable[..., Any]:
    """The trainer's loss, no number in one of its steps."""
    compute, count = run.compute_loss, 0

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return compute(*args, **kwargs) * (float("nan") if count == which else 1.0)

    return spoiled


def test_the_trainer_leaves_the_step_out_and_says_so(tmp_path: Path) -> None:
    _, prompter = loaded_and_prompter()
    data = [example(prompter, 5 + i, seed=i) for i in range(6)]
    run = trainer(tmp_path, data=data, max_steps=4)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    run.compute_loss = spoil_step(run, 2)
    run.train()
    after = {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert all(math.isfinite(losses[step]) for step in (0, 2, 3))
    assert math.isfinite(run.state.log_history[-1]["train_loss"])
    logged = [entry.get("skipped_steps", 0) for entry in run.state.log_history if "loss" in entry]
    assert logged == [0, 0, 1, 1]  # known one step late
