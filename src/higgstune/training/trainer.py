"""`transformers.Trainer` with what is special about Higgs Audio: data, loss, evaluation, whole checkpoints."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from higgstune.batch.loader import PackLoader
from higgstune.batch.packed import Packed, positions, tensors_to, without_waiting
from higgstune.batch.packing import PackSize
from higgstune.codec import Codec
from higgstune.model.forward import with_training_forward
from higgstune.model.load import ModelAndTokenizers
from higgstune.model.loss import LossWeights, Sums, add_sums, combine, label_counts, zero_sums
from higgstune.training.finite import FiniteSteps
from higgstune.training.metrics import check_possible, loss_metrics

_STAGING = "incomplete"  # where a checkpoint is written before it gets its name


class HiggsAudioTrainer(Trainer):
    """Trains a Higgs Audio model on `Example`s.

    It cannot be made without a model, its tokenizer and its codec: they come as one object.
    """

    # The loss is divided by the labelled cells of the whole optimizer step: see `get_batch_samples`.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        loaded: ModelAndTokenizers,
        args: TrainingArguments,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        model: PeftModel | None = None,
        weights: LossWeights | None = None,
        batch_tokens: int | None = None,
        full_learning_rate: float | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """`model` is `loaded.model` with an adapter; without it, `loaded.model` itself is trained.

        Examples are packed into one sequence without padding: as many as fit into `batch_tokens` positions, or, where
        that is not given, `args.per_device_train_batch_size` of them.

        Modules that an adapter trains in full (peft's `modules_to_save`) have `full_learning_rate` as their peak, where
        it is given.

        The data sets are map-style and give `Example`s.
        """
        with_training_forward(loaded.model)
        self.loaded = loaded
        self.weights = weights or LossWeights()
        self.full_learning_rate = full_learning_rate
        self._eos_id: int = loaded.config.audio_stream_eos_id
        self._window = _Window()
        self._steps = FiniteSteps()
        self._staging = False
        self._pack_size = PackSize(batch_tokens, args.per_device_train_batch_size)
        args.remove_unused_columns = False  # examples are objects, not columns
        args.logging_nan_inf_filter = False  # it would wait for the device in every step: see `FiniteSteps`
        args._n_gpu = min(1, args.n_gpu)  # several GPUs in one process would be DataParallel: use torchrun
        super().__init__(
            model=model if model is not None else loaded.model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=list(callbacks),
        )
        if eval_dataset is not None:
            self._loader(eval_dataset, seed=None)  # a clip that does not fit is told of now
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    @property
    def tokenizer(self) -> Any:
        """The text tokenizer of the checkpoint."""
        return self.loaded.tokenizer

    @property
    def audio_tokenizer(self) -> Codec:
        """The codec of the checkpoint."""
        return self.loaded.audio_tokenizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As `Trainer`'s, with groups of their own for modules that are trained in full."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        if self.full_learning_rate is not None:
            trained = self.model if model is None else model
            assert isinstance(trained, nn.Module)
            in_full = {id(p) for name, p in trained.named_parameters() if ".modules_to_save." in name}
            _split_groups(optimizer, in_full, self.full_learning_rate)
        return optimizer

    def get_train_dataloader(self) -> PackLoader:
        """Packs of the training split; each process has its own share of them and no other."""
        return self._loader(self.train_dataset, seed=self.args.seed, workers=self.args.dataloader_num_workers)

    def _loader(self, examples: Any, *, seed: int | None, workers: int = 0) -> PackLoader:
        return PackLoader(
            examples,
            self._pack_size,
            seed=seed,
            share_prefix=not _has_dropout(self.model),
            rank=self.args.process_index,
            processes=self.args.world_size,
            workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the count that `Trainer` makes knows neither pathways nor labelled positions."""
        return 0

    def _prepare_inputs(self, inputs: Packed) -> Packed:
        return tensors_to(inputs, self.args.device)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s; a loss that is no number stays out of the running sum, which it would spoil for good."""
        return super().training_step(*args, **kwargs).nan_to_num(0.0, 0.0, 0.0)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        self._steps.note(norm, self.optimizer)
        return norm

    def get_batch_samples(  # type: ignore[override]
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Sums | None]:
        """The micro-batches of one optimizer step, and their labelled cells, summed over all ranks."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        counts = add_sums([label_counts(batch, eos_id=self._eos_id) for batch in samples])
        return samples, self._over_ranks({key: without_waiting(value, device) for key, value in counts.items()})

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Packed,
        return_outputs: bool = False,
        num_items_in_batch: Sums | None = None,
    ) -> Any:
        """This micro-batch's share of the optimizer step's loss."""
        counts = label_counts(inputs, eos_id=self._eos_id)
        sums = model(**inputs)
        loss = combine(sums, num_items_in_batch or counts, self.weights)
        if num_items_in_batch is not None:
            # DDP averages gradients over ranks; the counts are already those of all ranks.
            loss = loss * self.accelerator.num_processes
        if model.training:
            self._window.add(sums, counts, tokens=positions(inputs))
        return (loss, sums) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the training window's own numbers to what is logged."""
        if "loss" in logs and self._window.sums:
            sums, counts, tokens = self._window.sums, self._window.counts, self._window.tokens
            sums = self._over_ranks(sums)
            counts = self._over_ranks(counts | {"tokens": torch.tensor(tokens, device=self.args.device)})
            seconds = time.monotonic() - self._window.since
            codes = (counts["audio"][0] - counts["audio_eos"][0]).item()
            logs |= {key: value for key, value in loss_metrics(sums, counts, self.weights).items() if key != "loss"}
            if self._steps.skipped:
                logs["skipped_steps"] = self._steps.skipped
            logs["tokens_per_second"] = counts["tokens"].item() / seconds
            logs["audio_seconds_per_second"] = codes / self.audio_tokenizer.frame_rate / seconds
            self._window = _Window()
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Losses over the whole validation split, each labelled cell counted once.

        Raises TrainingError when the audio loss is lower than unseen audio allows.
        """
        started = time.monotonic()
        assert self.model is not None
        model = self._wrap_model(self.model, training=False)
        model.eval()
        sums, counts = zero_sums(self.loaded.config.num_codebooks, self.args.device)
        with torch.no_grad():
            for batch in self._loader(self.eval_dataset if eval_dataset is None else eval_dataset, seed=None):
                inputs = self._prepare_inputs(batch)
                with self.accelerator.autocast():
                    sums = add_sums([sums, model(**inputs)])
                counts = add_sums([counts, label_counts(inputs, eos_id=self._eos_id)])
        metrics = loss_metrics(self._over_ranks(sums), self._over_ranks(counts), self.weights)
        named = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        self.log(named)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        self._window.since += time.monotonic() - started  # evaluation is not training time
        check_possible(metrics["code_loss"], step=self.state.global_step)
        return named

    def _over_ranks(self, values: Sums) -> Sums:
        if self.accelerator.num_processes == 1:
            return values
        return {key: self.accelerator.reduce(value, reduction="sum") for key, value in values.items()}

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _STAGING) if self._staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint under a temporary name and rename it: one that was cut off is never resumed from."""
        if self.args.should_save:
            shutil.rmtree(Path(self._get_output_dir(trial)) / _STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            folder = Path(self._get_output_dir(trial))
            os.replace(folder / _STAGING / name, folder / name)
            shutil.rmtree(folder / _STAGING)
            rotate_checkpoints(str(folder), self.args.save_total_limit)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter alone, as peft writes it; no pickled training arguments beside it."""
        folder = output_dir or self.args.output_dir
        assert folder is not None
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PeftModel):
            # "auto" would ask the hub about the base's vocabulary, which no adapter here changes.
            model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
        else:
            model.save_pretrained(folder, state_dict=state_dict)


class _Window:
    """What was trained since the last log, kept on the device so that no step waits for it."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.sums: Sums = {}
        self.counts: Sums = {}
        self.tokens = 0

    def add(self, sums: Sums, counts: Sums, *, tokens: int) -> None:
        detached = {key: value.detach() for key, value in sums.items()}
        self.tokens += tokens
        self.sums = add_sums([self.sums, detached]) if self.sums else detached
        self.counts = add_sums([self.counts, counts]) if self.counts else counts


def _split_groups(optimizer: torch.optim.Optimizer, chosen: set[int], learning_rate: float) -> None:
    """Move the chosen parameters (by `id`) into groups with this learning rate."""
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group(group | {"params": moved, "lr": learning_rate})


def _has_dropout(model: Any) -> bool:
    """Whether an adapter's dropout is on: it falls on each example's positions apart, so nothing can be shared."""
    configs = getattr(model, "peft_config", {})
    return any(config.lora_dropout > 0 for config in configs.values())
