"""`transformers.Trainer` with checkpoints that are complete, safe to read, and resumed exactly.

Overrides were checked with transformers 5.23.0; each says why it is needed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from typing_extensions import override

from higgstune.kernels.loss import Sums
from higgstune.model.adapter_folder import ADAPTER_WEIGHTS
from higgstune.peft_compat import PeftModel
from higgstune.training.checkpoint import (
    TRAINING_STATE,
    Checkpoint,
    new_checkpoint,
    optimizer_tensors,
    random_states,
    read_checkpoint,
    resuming,
    save_weights,
    set_optimizer,
    set_random_states,
    set_weights,
    trained_parameters,
    trained_state,
    under,
)
from higgstune.training.metrics import FiniteSteps, SkippedSteps, TrainingWindow
from higgstune.training.run_dir import ChosenStep
from higgstune.training.sample_eval import SampleEvaluation


class ResumableTrainer(Trainer):
    """Saves and restores all that the next steps depend on. Checked with transformers 5.23.0."""

    def __init__(
        self,
        *,
        packs_per_step: int,
        steps: FiniteSteps,
        sample_evaluation: SampleEvaluation | None,
        warmup_from: int,
        **options: Any,
    ) -> None:
        """`options` are `Trainer`'s; `packs_per_step` and `warmup_from` are noted in checkpoints."""
        self.packs_per_step = packs_per_step
        self._warmup_from = warmup_from
        self._steps = steps
        self._samples = sample_evaluation
        self._best: dict[str, Tensor] = {}  # trained weights of the step with the best samples
        self._window = TrainingWindow()
        self._resumed_from: Checkpoint | None = None  # until all of it is restored
        super().__init__(**options)
        self.add_callback(_Restoring(self))  # the last one

    @property
    def _plain_model(self) -> nn.Module:
        """The model without what accelerate puts around it."""
        assert isinstance(self.model, nn.Module)
        return self.model

    @property
    def _folder(self) -> Path:
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    @property
    def best_step(self) -> ChosenStep | None:
        """The evaluated step with the best samples; None where no samples were measured."""
        measured = self._samples is not None and self._samples.candidates.entries
        return self._samples.candidates.summary() if self._samples is not None and measured else None

    @property
    def spoken_clips(self) -> int:
        """How many clips each validation speaks."""
        return 0 if self._samples is None else len(self._samples.items)

    @property
    def ran_out_of_patience(self) -> bool:
        """Whether training has ended before its last step, because samples became no better."""
        exhausted = self._samples is not None and self._samples.candidates.exhausted
        return exhausted and self.state.global_step < self.state.max_steps

    def take_best(self) -> None:
        """Go back to the weights of the step with the best samples; all processes together."""
        parameters = {name: value for name, value in self._plain_model.named_parameters() if value.requires_grad}
        if self._best:
            set_weights(parameters, self._best)

    @override
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """As transformers 5.23.0's, whose warm-up begins with a rate of 0: a step that teaches nothing."""
        made = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if not made or not isinstance(scheduler, LambdaLR):
            return scheduler
        warmup = self.args.get_warmup_steps(num_training_steps)
        scheduler.lr_lambdas = [self._warming_up(factor, warmup) for factor in scheduler.lr_lambdas]
        rates = [rate * f(0) for rate, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = list(rates)
        return scheduler

    def _warming_up(self, factor: Callable[[int], float], warmup: int) -> Callable[[int], float]:
        """`factor` of the peak rate by step, counted in the warm-up from `warmup_from` instead of 0."""
        return lambda step: factor(step + self._warmup_from if step < warmup else step)

    def _over_ranks(self, values: Sums) -> Sums:
        if self.accelerator.num_processes == 1:
            return values
        # Sorted: what was read from a checkpoint, by one process, has another order than what a model gives.
        return {key: self.accelerator.reduce(values[key], reduction="sum") for key in sorted(values)}

    @override
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights alone, without the pickled arguments that transformers 5.23.0 writes beside them."""
        weights = trained_state(self._plain_model)
        if self.args.should_save:
            save_weights(self._plain_model, Path(output_dir or self._folder), weights)

    @override
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """All that an exact resume needs: see `training.checkpoint`. All processes take part.

        In place of transformers 5.23.0's, which pickles, and does not save what was not logged yet.
        """
        self._steps.read()
        assert self.lr_scheduler is not None
        optimizer = _unwrapped(self.optimizer)
        weights = trained_state(self._plain_model)
        tensors = {
            **under("optimizer", optimizer_tensors(optimizer, trained_parameters(self._plain_model))),
            **under("random", random_states()),
            **under("best", self._best),
            **under("window", self._over_ranks(self._window.tensors(loss=self._tr_loss / self.args.world_size))),
        }
        if self.args.should_save:
            notes = {
                "step": self.state.global_step,
                "processes": self.args.world_size,
                "packs_per_step": self.packs_per_step,
                "warmup_from": self._warmup_from,
                "skipped_steps": self._steps.skipped,
                "skipped_in_a_row": self._steps.in_a_row,
                "logged_at": self._globalstep_last_logged,
                "window_seconds": self._window.seconds,
                "rates": [group["lr"] for group in optimizer.param_groups],
                "scheduler": self.lr_scheduler.state_dict(),
                "candidates": self._samples.candidates.entries if self._samples is not None else [],
            }
            limit = self.args.save_total_limit
            with new_checkpoint(self._folder, self.state.global_step, notes, keep=limit) as folder:
                save_weights(self._plain_model, folder, weights)
                save_file({name: value.cpu() for name, value in tensors.items()}, folder / TRAINING_STATE)
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights, into an adapter that is on the model already; transformers 5.23.0 would add it once more.

        The rest is restored when training begins: see `_restore`.
        """
        with resuming(resume_from_checkpoint) as folder:
            self._resumed_from = Checkpoint.read(folder)
            if isinstance(self.model, PeftModel):
                set_weights(trained_parameters(self.model), load_file(folder / ADAPTER_WEIGHTS))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _restore(self) -> None:
        """What `Trainer` has made anew since the weights were loaded: optimizer, schedule, random numbers, sums."""
        checkpoint, self._resumed_from = self._resumed_from, None
        if checkpoint is None:
            return
        assert self.lr_scheduler is not None
        notes, optimizer = checkpoint.notes, _unwrapped(self.optimizer)
        rank, processes = self.args.process_index, self.args.world_size
        with resuming(checkpoint.folder):
            set_optimizer(optimizer, trained_parameters(self._plain_model), checkpoint.part("optimizer"))
            for group, rate in zip(optimizer.param_groups, notes["rates"], strict=True):
                group["lr"] = rate
            self.lr_scheduler.load_state_dict(notes["scheduler"])
            self._warmup_from = notes.get("warmup_from", 0)  # of checkpoints from before it was noted
            seed = self.args.seed + notes["step"] * processes
            set_random_states(checkpoint.part("random"), rank=rank, processes=processes, seed=seed)
            window = {name: value.to(self.args.device) for name, value in checkpoint.part("window").items()}
            self._tr_loss = window.pop("loss")  # the mean of all processes' losses, in each of them
            # The sums are over all processes, so that one of them has them.
            self._window = TrainingWindow.of(window if rank == 0 else {}, seconds=notes["window_seconds"])
            self._globalstep_last_logged = notes["logged_at"]
            self._steps.in_a_row = notes["skipped_in_a_row"]
            if self.args.should_save:
                SkippedSteps(self._folder).forget(after=notes["step"])
            self._restore_results(checkpoint)

    def _restore_results(self, checkpoint: Checkpoint) -> None:
        self._steps.skipped = checkpoint.notes["skipped_steps"]
        if self._samples is not None:
            self._samples.candidates.entries = list(checkpoint.notes.get("candidates", []))
            self._best = checkpoint.part("best")

    def is_complete_at(self, checkpoint: Path) -> bool:
        """Whether nothing is left to train after a checkpoint: it is of the last step, or patience had run out."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step >= state.max_steps or self._samples is None:
            return state.global_step >= state.max_steps
        self._samples.candidates.entries = list(read_checkpoint(checkpoint).get("candidates", []))
        return self._samples.candidates.exhausted

    def restore_complete(self, folder: Path) -> None:
        """Load a checkpoint after which nothing is left to train, in place of `train`. Raises as `train`."""
        self._load_from_checkpoint(str(folder))
        checkpoint, self._resumed_from = self._resumed_from, None
        assert checkpoint is not None
        self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        self._restore_results(checkpoint)
        self._steps.check_any_taken(of=self.state.global_step)

    def _check_steps(self) -> None:
        self._steps.read()
        if self.state.global_step >= self.state.max_steps:  # not where a signal or patience has ended training
            self._steps.check_any_taken(of=self.state.global_step)


class _Restoring(TrainerCallback):
    """Acts for the trainer where `Trainer` calls callbacks and nothing that could be overridden."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    @override
    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Nothing draws random numbers between this and the first step (transformers 5.23.0)."""
        state.compute_steps(args, state.max_steps)  # intervals are those of the arguments, not of the checkpoint
        self._trainer._restore()

    @override
    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Raises TrainingError when no step could be taken."""
        self._trainer._check_steps()


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)
