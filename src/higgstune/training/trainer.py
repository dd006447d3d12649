"""`transformers.Trainer` with what is special about Higgs Audio: data, loss, evaluation.

Overrides were checked with transformers 5.23.0; those of private methods say why they are needed.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from typing_extensions import override

from higgstune.batch.collate import Packed, count_tokens, tensors_to
from higgstune.batch.loader import PackLoader, Prefetched
from higgstune.batch.packing import PackSize
from higgstune.codec import Codec
from higgstune.config.expression import LOSS
from higgstune.environment import to_device_async
from higgstune.kernels.loss import LossWeights, Sums, add_sums, combine, label_counts, zero_sums
from higgstune.model.load import ModelAndTokenizers
from higgstune.peft_compat import PeftModel
from higgstune.training.checkpoint import trained_state
from higgstune.training.distributed import is_sharded
from higgstune.training.metrics import FiniteSteps, SkippedSteps, TrainingWindow, check_possible, loss_metrics
from higgstune.training.resume import ResumableTrainer
from higgstune.training.sample_eval import SampleEvaluation

_LOG = logging.getLogger(__name__)


class HiggsAudioTrainer(ResumableTrainer):
    """Trains a Higgs Audio model on `Example`s.

    It needs a model with its tokenizer and its codec, which come as one object.
    """

    # The loss is divided by the label entries of the whole optimizer step: see `get_batch_samples`.
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
        packs_per_step: int | None = None,
        full_learning_rate: float | None = None,
        warmup_from: int = 1,
        sample_evaluation: SampleEvaluation | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """`model` is `loaded.model` with an adapter; without it, `loaded.model` itself is trained.

        Examples are packed into one sequence without padding: as many as fit into `batch_tokens` tokens, or, where
        that is not given, `args.per_device_train_batch_size` of them. An optimizer step takes `packs_per_step` of all
        processes together; where that is not given, `args.gradient_accumulation_steps` of each.

        The first step of a warm-up of n steps has `warmup_from` / n of the peak rate.

        `full_learning_rate` is the peak rate of modules that an adapter trains in full (peft's `modules_to_save`).

        With `sample_evaluation`, each validation also speaks, and the weights of the step that sounds best are kept
        for `take_best`.

        The data sets are map-style and give `Example`s.
        """
        loaded.family.pack_forward(loaded.model)
        self.loaded = loaded
        self.weights = weights or LossWeights()
        self.full_learning_rate = full_learning_rate
        self._eos_id = loaded.spec.stream_eos
        self._rest: Prefetched | None = None  # of an epoch in which training was resumed
        self._pack_size = PackSize(batch_tokens, args.per_device_train_batch_size)
        packs_per_step = packs_per_step or args.gradient_accumulation_steps * args.world_size
        args.gradient_accumulation_steps = -(-packs_per_step // args.world_size)
        args.remove_unused_columns = False  # examples are objects, not columns
        args.logging_nan_inf_filter = False  # it would wait for the device in every step: see `FiniteSteps`
        args._n_gpu = min(1, args.n_gpu)  # several GPUs in one process would be DataParallel: use torchrun
        super().__init__(
            model=model if model is not None else loaded.model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=list(callbacks),
            packs_per_step=packs_per_step,
            steps=FiniteSteps(self._note_skipped),
            sample_evaluation=sample_evaluation,
            warmup_from=warmup_from,
        )
        self.is_distributed_loading_by_transformers = is_sharded(model)  # its name for: do not wrap this model
        if eval_dataset is not None:
            self._loader(eval_dataset, seed=None)  # raises now for a clip that does not fit
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

    @override
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

    @override
    def get_train_dataloader(self) -> PackLoader:
        """Packs of the training split; each process has its own share of them and no other."""
        loader = self._loader(self.train_dataset, seed=self.args.seed, per_step=self.packs_per_step)
        self._packs = loader.packs
        if loader.packs.idle and self.args.should_save:
            _LOG.warning(
                "%d of %d processes have nothing to do: a step has fewer packs than that. Lower batch_tokens, or use "
                "fewer processes", loader.packs.idle, self.args.world_size,
            )  # fmt: skip
        return loader

    def _loader(self, examples: Any, *, seed: int | None, per_step: int | None = None) -> PackLoader:
        return PackLoader(
            examples,
            self._pack_size,
            seed=seed,
            share_prefix=not _has_dropout(self.model),
            rank=self.args.process_index,
            processes=self.args.world_size,
            per_step=per_step,
            pin_memory=self.args.dataloader_pin_memory,
        )

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s; a loss that is not finite is left out of the running sum, which it would spoil for good."""
        return super().training_step(*args, **kwargs).nan_to_num(0.0, 0.0, 0.0)

    @override
    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """As transformers 5.23.0's, which cannot move a sharded model; that one is on its devices already."""
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """As transformers 5.23.0's, which reads a `distributed_config` that only its own sharding sets."""
        model: Any = self.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    @override
    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As transformers 5.23.0's, which shows the norm to nobody else before the optimizer steps."""
        norm = super()._clip_grad_norm(model)
        self._steps.note(norm, self.optimizer, step=self.state.global_step)
        return norm

    def _note_skipped(self, step: int) -> None:
        if self.args.should_save:
            name = getattr(self.train_dataset, "row_id", str)
            indices = [index for pack in self._packs.of_step(step) for index in pack]
            SkippedSteps(self._folder).add(step + 1, [name(index) for index in indices])

    @override
    def get_batch_samples(  # type: ignore[override]
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Sums | None]:
        """The micro-batches of one optimizer step on the device, and their label entries, summed over all ranks."""
        samples, _ = super().get_batch_samples(self._prefetched(epoch_iterator), num_batches, device)
        if not samples:
            return samples, None
        counts = add_sums([label_counts(batch, eos_id=self._eos_id) for batch in samples])
        counts = self._over_ranks({key: to_device_async(value, device) for key, value in counts.items()})
        return [tensors_to(batch, device) for batch in samples], counts

    def _prefetched(self, packs: Iterator[Packed]) -> Prefetched:
        """The packs of an epoch. To resume within one, `Trainer` makes a loader of parts of ours, without a thread."""
        if isinstance(packs, Prefetched):
            self._rest = None
            return packs
        if self._rest is None or self._rest.source is not packs:
            self._rest = Prefetched(packs)
        return self._rest

    @override
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
            tokens = torch.full((), count_tokens(inputs), device=self.args.device)  # a fill: no copy to wait for
            self._window.add(sums, counts | {"tokens": tokens})
        return (loss, sums) if return_outputs else loss

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the training window's own numbers to what is logged."""
        if "loss" in logs and self._window.sums:
            sums, counts = self._over_ranks(self._window.sums), self._over_ranks(self._window.counts)
            codes = (counts["audio"][0] - counts["audio_eos"][0]).item()
            logs |= {key: value for key, value in loss_metrics(sums, counts, self.weights).items() if key != "loss"}
            if self._steps.skipped:
                logs["skipped_steps"] = self._steps.skipped
            logs["tokens_per_second"] = counts["tokens"].item() / self._window.seconds
            logs["audio_seconds_per_second"] = codes / self.audio_tokenizer.frame_rate / self._window.seconds
            self._window = TrainingWindow()
        super().log(logs, start_time)

    @override
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Losses over the whole validation split, each label entry counted once, and measures of the samples.

        Raises TrainingError when the audio loss is lower than unseen audio allows.
        """
        started = time.monotonic()
        model = self._plain_model.eval()
        named = self._losses(model, self.eval_dataset if eval_dataset is None else eval_dataset, metric_key_prefix)
        if self._samples is not None:
            named |= self._evaluate_samples(self._samples, named, metric_key_prefix)
        self.log(named)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        self._window.pause(time.monotonic() - started)  # evaluation is not training time
        check_possible(named.get(f"{metric_key_prefix}_code_loss", math.nan), step=self.state.global_step)
        if self._samples is not None and self._samples.candidates.exhausted:
            self.control.should_training_stop = True
        return named

    def _losses(self, model: nn.Module, examples: Any, prefix: str) -> dict[str, float]:
        """Of a split, which may have no rows."""
        if not len(examples):
            return {}
        sums, counts = zero_sums(self.loaded.spec.num_codebooks, self.args.device)
        with torch.no_grad():
            for batch in self._loader(examples, seed=None):
                inputs = tensors_to(batch, self.args.device)
                with self.accelerator.autocast():
                    sums = add_sums([sums, model(**inputs)])
                counts = add_sums([counts, label_counts(inputs, eos_id=self._eos_id)])
        self._reshard()
        metrics = loss_metrics(self._over_ranks(sums), self._over_ranks(counts), self.weights)
        return {f"{prefix}_{key}": value for key, value in metrics.items()}

    def _reshard(self) -> None:
        if is_sharded(self.model):  # after a forward pass without a backward one, FSDP leaves its root gathered
            self.model.reshard()  # type: ignore[union-attr, operator]

    def _evaluate_samples(
        self, samples: SampleEvaluation, losses: Mapping[str, float], prefix: str
    ) -> dict[str, float]:
        """Measures of what the model speaks now; keeps its weights where no step before was better."""
        started = time.monotonic()
        with self.accelerator.autocast():
            measures = samples.evaluate(self._plain_model, self.state.global_step)
        self._reshard()
        loss = {LOSS: losses[f"{prefix}_{LOSS}"]} if losses else {}
        if samples.candidates.add(self.state.global_step, measures | loss):
            # Copies: on a CPU the state is the parameters themselves, which are trained on.
            self._best = {name: value.clone() for name, value in trained_state(self._plain_model).items()}
        seconds = {"sample_seconds": time.monotonic() - started}
        return {f"{prefix}_{key}": value for key, value in (measures | seconds).items()}


def _split_groups(optimizer: torch.optim.Optimizer, chosen: set[int], learning_rate: float) -> None:
    """Move the chosen parameters (by `id`) into groups with this learning rate."""
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group(group | {"params": moved, "lr": learning_rate})


def _has_dropout(model: Any) -> bool:
    """Whether an adapter's dropout is on: it falls on each example by itself, so nothing can be shared."""
    configs = getattr(model, "peft_config", {})
    return any(config.lora_dropout > 0 for config in configs.values())
