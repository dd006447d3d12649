"""`transformers.Trainer` with what is special about Higgs Audio: data, loss, evaluation, whole checkpoints."""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from typing_extensions import override

from higgstune.batch.collate import Packed, positions, tensors_to
from higgstune.batch.loader import PackLoader, Prefetched
from higgstune.batch.packing import PackSize
from higgstune.codec import Codec
from higgstune.config.expression import LOSS
from higgstune.environment import to_device_async
from higgstune.errors import CheckpointError
from higgstune.families.higgs_v2.packed import with_training_forward
from higgstune.files import write_file
from higgstune.kernels.loss import LossWeights, Sums, add_sums, combine, label_counts, zero_sums
from higgstune.model.adapter_folder import ADAPTER_WEIGHTS
from higgstune.model.load import ModelAndTokenizers
from higgstune.training.checkpoint import (
    new_checkpoint,
    optimizer_tensors,
    part,
    random_states,
    read_checkpoint,
    set_optimizer,
    set_random_states,
    set_weights,
    trained_parameters,
    trained_state,
    under,
)
from higgstune.training.distributed import is_sharded
from higgstune.training.metrics import SKIPPED_STEPS, FiniteSteps, check_possible, loss_metrics
from higgstune.training.sample_eval import SampleEvaluation

_LOG = logging.getLogger(__name__)
_STATE = "training.safetensors"  # in a checkpoint: optimizer, random numbers, what was not logged yet


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
        packs_per_step: int | None = None,
        full_learning_rate: float | None = None,
        listening: SampleEvaluation | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """`model` is `loaded.model` with an adapter; without it, `loaded.model` itself is trained.

        Examples are packed into one sequence without padding: as many as fit into `batch_tokens` positions, or, where
        that is not given, `args.per_device_train_batch_size` of them. An optimizer step takes `packs_per_step` of all
        processes together; where that is not given, `args.gradient_accumulation_steps` of each.

        Modules that an adapter trains in full (peft's `modules_to_save`) have `full_learning_rate` as their peak, where
        it is given.

        With `listening`, each validation also speaks, and the weights of the step that sounds best are kept for
        `take_best`.

        The data sets are map-style and give `Example`s.
        """
        with_training_forward(loaded.model)
        self.loaded = loaded
        self.weights = weights or LossWeights()
        self.full_learning_rate = full_learning_rate
        self._eos_id: int = loaded.config.audio_stream_eos_id
        self._listening = listening
        self._best: dict[str, Tensor] = {}  # weights of the best step that was listened to, by the names they have
        self._window = _Window()
        self._resumed: Prefetched | None = None  # the rest of an epoch that was resumed
        self._steps = FiniteSteps(self._note_skipped)
        self._found: tuple[dict[str, Any], dict[str, Tensor]] | None = None  # in the checkpoint that is gone on from
        self._pack_size = PackSize(batch_tokens, args.per_device_train_batch_size)
        self.packs_per_step = packs_per_step or args.gradient_accumulation_steps * args.world_size
        args.gradient_accumulation_steps = -(-self.packs_per_step // args.world_size)
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
        self.is_distributed_loading_by_transformers = is_sharded(model)  # its name for: do not wrap this model
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
    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the count that `Trainer` makes knows neither pathways nor labelled positions."""
        return 0

    @override
    def _prepare_inputs(self, inputs: Packed) -> Packed:
        return tensors_to(inputs, self.args.device)

    @override
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s. Raises TrainingError as well when no step could be taken."""
        output = super().train(*args, **kwargs)
        self._steps.read()
        if self.state.global_step >= self.state.max_steps:  # and not where it was asked to stop
            self._steps.check_any_taken(of=self.state.global_step)
        return output

    def ended_at(self, checkpoint: Path) -> bool:
        """Whether nothing is to be trained after a checkpoint: it is of the last step, or patience had run out."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step >= state.max_steps or self._listening is None:
            return state.global_step >= state.max_steps
        self._listening.candidates.entries = list(read_checkpoint(checkpoint).get("candidates", []))
        return self._listening.candidates.exhausted

    def take_over(self, checkpoint: Path) -> None:
        """The weights and the state of a checkpoint after which there is nothing to train.

        Raises as `train`.
        """
        self._load_from_checkpoint(str(checkpoint))
        assert self._found is not None
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self._steps.skipped = self._found[0]["skipped_steps"]
        self._take_over_best(*self._found)
        self._found = None
        self._steps.check_any_taken(of=self.state.global_step)

    @override
    def _init_training_state(self, max_steps: int, *args: Any) -> Any:
        place = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)  # how often is what the arguments say now, not the checkpoint
        return place

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s; a loss that is no number stays out of the running sum, which it would spoil for good."""
        return super().training_step(*args, **kwargs).nan_to_num(0.0, 0.0, 0.0)

    @override
    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_sharded(model):  # which is where it belongs
            super()._move_model_to_device(model, device)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """As `Trainer`'s, which asks the model for a configuration that sharding here does not leave."""
        model: Any = self.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    @override
    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        self._steps.note(norm, self.optimizer, step=self.state.global_step)
        return norm

    def _note_skipped(self, step: int) -> None:
        """Keep which clips a step was left out with, for a look at them."""
        if self.args.should_save:
            indices = [index for pack in self._packs.of_step(step) for index in pack]
            name = getattr(self.train_dataset, "row_id", str)
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / SKIPPED_STEPS, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step + 1, "clips": [name(index) for index in indices]}) + "\n")

    def _forget_skipped(self, *, after: int) -> None:
        """Steps that will be taken again are noted again."""
        path = self._folder / SKIPPED_STEPS
        if self.args.should_save and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a kill may have left half a line
            write_file(path, "".join(line for line in whole if json.loads(line)["step"] <= after))

    @override
    def get_batch_samples(  # type: ignore[override]
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Sums | None]:
        """The micro-batches of one optimizer step, and their labelled cells, summed over all ranks."""
        samples, _ = super().get_batch_samples(self._ahead(epoch_iterator), num_batches, device)
        if not samples:
            return samples, None
        counts = add_sums([label_counts(batch, eos_id=self._eos_id) for batch in samples])
        return samples, self._over_ranks({key: to_device_async(value, device) for key, value in counts.items()})

    def _ahead(self, packs: Iterator[Any]) -> Iterator[Any]:
        """The packs, prefetched. Where `Trainer` resumes within an epoch it makes a loader from parts of ours, which
        skips packs, but has no thread.
        """
        if isinstance(packs, Prefetched):
            self._resumed = None
            return packs
        if self._resumed is None or self._resumed.source is not packs:
            self._resumed = Prefetched(packs)
        return self._resumed

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
            tokens = torch.full((), positions(inputs), device=self.args.device)  # a fill: no copy to wait for
            self._window.add(sums, counts | {"tokens": tokens})
        return (loss, sums) if return_outputs else loss

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the training window's own numbers to what is logged."""
        if "loss" in logs and self._window.sums:
            sums, counts = self._over_ranks(self._window.sums), self._over_ranks(self._window.counts)
            seconds = time.monotonic() - self._window.since
            codes = (counts["audio"][0] - counts["audio_eos"][0]).item()
            logs |= {key: value for key, value in loss_metrics(sums, counts, self.weights).items() if key != "loss"}
            if self._steps.skipped:
                logs["skipped_steps"] = self._steps.skipped
            logs["tokens_per_second"] = counts["tokens"].item() / seconds
            logs["audio_seconds_per_second"] = codes / self.audio_tokenizer.frame_rate / seconds
            self._window = _Window()
        super().log(logs, start_time)

    @override
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Losses over the whole validation split, each labelled cell counted once; and what is spoken, measured.

        Raises TrainingError when the audio loss is lower than unseen audio allows.
        """
        started = time.monotonic()
        assert self.model is not None
        model = self._wrap_model(self.model, training=False)
        model.eval()
        named = self._losses(model, self.eval_dataset if eval_dataset is None else eval_dataset, metric_key_prefix)
        if self._listening is not None:
            named |= self._listen(self._listening, named, metric_key_prefix)
        self.log(named)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        self._window.since += time.monotonic() - started  # evaluation is not training time
        check_possible(named.get(f"{metric_key_prefix}_code_loss", math.nan), step=self.state.global_step)
        if self._listening is not None and self._listening.candidates.exhausted:
            self.control.should_training_stop = True
        return named

    def _losses(self, model: nn.Module, examples: Any, prefix: str) -> dict[str, float]:
        """Of a split, which may have no rows."""
        if not len(examples):
            return {}
        sums, counts = zero_sums(self.loaded.config.num_codebooks, self.args.device)
        with torch.no_grad():
            for batch in self._loader(examples, seed=None):
                inputs = self._prepare_inputs(batch)
                with self.accelerator.autocast():
                    sums = add_sums([sums, model(**inputs)])
                counts = add_sums([counts, label_counts(inputs, eos_id=self._eos_id)])
        self._reshard()
        metrics = loss_metrics(self._over_ranks(sums), self._over_ranks(counts), self.weights)
        return {f"{prefix}_{key}": value for key, value in metrics.items()}

    def _reshard(self) -> None:
        if is_sharded(self.model):  # after a forward pass without a backward one, FSDP leaves its root gathered
            self.model.reshard()  # type: ignore[union-attr, operator]

    def _listen(self, listening: SampleEvaluation, losses: Mapping[str, float], prefix: str) -> dict[str, float]:
        """What was spoken, measured; keeps the weights where nothing before sounded better."""
        assert isinstance(self.model, nn.Module)
        started = time.monotonic()
        with self.accelerator.autocast():
            measures = listening.listen(self.model, self.state.global_step)
        self._reshard()
        loss = {LOSS: losses[f"{prefix}_{LOSS}"]} if losses else {}
        if listening.candidates.add(self.state.global_step, measures | loss):
            # Copies: on a CPU the state is the parameters themselves, which are trained on.
            self._best = {name: value.clone() for name, value in trained_state(self.model).items()}
        seconds = {"sample_seconds": time.monotonic() - started}
        return {f"{prefix}_{key}": value for key, value in (measures | seconds).items()}

    def take_best(self) -> None:
        """Go back to the weights of the step that sounded best; all processes together."""
        parameters = {name: value for name, value in self.model.named_parameters() if value.requires_grad}  # type: ignore[union-attr]
        if self._best:
            set_weights(parameters, self._best)

    def _take_over_best(self, notes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if self._listening is not None:
            self._listening.candidates.entries = list(notes.get("candidates", []))
            self._best = part("best", tensors)

    def _over_ranks(self, values: Sums) -> Sums:
        if self.accelerator.num_processes == 1:
            return values
        # Sorted: what was read from a checkpoint, by one process, has another order than what a model gives.
        return {key: self.accelerator.reduce(values[key], reduction="sum") for key in sorted(values)}

    @property
    def _folder(self) -> Path:
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    @override
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Everything that going on exactly needs: see `training.checkpoint`. All processes take part."""
        self._steps.read()
        assert isinstance(self.model, nn.Module)
        assert self.lr_scheduler is not None
        optimizer = _plain(self.optimizer)
        weights = trained_state(self.model)
        tensors = {
            **under("optimizer", optimizer_tensors(optimizer, trained_parameters(self.model))),
            **under("random", random_states()),
            **under("best", self._best),
            **under("window", self._over_ranks(self._window.tensors(loss=self._tr_loss / self.args.world_size))),
        }
        if self.args.should_save:
            notes = {
                "step": self.state.global_step,
                "processes": self.args.world_size,
                "packs_per_step": self.packs_per_step,
                "skipped_steps": self._steps.skipped,
                "skipped_in_a_row": self._steps.in_a_row,
                "logged_at": self._globalstep_last_logged,
                "window_seconds": time.monotonic() - self._window.since,
                "rates": [group["lr"] for group in optimizer.param_groups],
                "scheduler": self.lr_scheduler.state_dict(),
                "candidates": self._listening.candidates.entries if self._listening is not None else [],
            }
            limit = self.args.save_total_limit
            with new_checkpoint(self._folder, self.state.global_step, notes, keep=limit) as folder:
                self._save(str(folder), state_dict=weights)
                save_file({name: value.cpu() for name, value in tensors.items()}, folder / _STATE)
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with _named(resume_from_checkpoint) as folder:
            self._found = read_checkpoint(folder), load_file(folder / _STATE)
            if isinstance(self.model, PeftModel):
                set_weights(trained_parameters(self.model), load_file(folder / ADAPTER_WEIGHTS))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self._found is not None
        assert isinstance(self.model, nn.Module)
        assert self.lr_scheduler is not None
        notes, tensors = self._found
        optimizer = _plain(self.optimizer)
        with _named(checkpoint):
            set_optimizer(optimizer, trained_parameters(self.model), part("optimizer", tensors))
            for group, rate in zip(optimizer.param_groups, notes["rates"], strict=True):
                group["lr"] = rate
            self.lr_scheduler.load_state_dict(notes["scheduler"])

    @override
    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Also what the loop keeps beside it, which is made anew between the loading of weights and this."""
        if checkpoint is None:
            return
        assert self._found is not None
        notes, tensors = self._found
        self._found = None
        rank, processes = self.args.process_index, self.args.world_size
        with _named(checkpoint):
            seed = self.args.seed + notes["step"] * processes
            set_random_states(part("random", tensors), rank=rank, processes=processes, seed=seed)
            window = {name: value.to(self.args.device) for name, value in part("window", tensors).items()}
            self._tr_loss = window.pop("loss")  # the mean of all processes' losses, in each of them
            if rank == 0:  # sums over all processes
                self._window = _Window.of(window)
            self._window.since = time.monotonic() - notes["window_seconds"]
            self._globalstep_last_logged = notes["logged_at"]
            self._steps.skipped = notes["skipped_steps"]
            self._steps.in_a_row = notes["skipped_in_a_row"]
            self._forget_skipped(after=notes["step"])
            self._take_over_best(notes, tensors)

    @override
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

    def add(self, sums: Sums, counts: Sums) -> None:
        detached = {key: value.detach() for key, value in sums.items()}
        self.sums = add_sums([self.sums, detached]) if self.sums else detached
        self.counts = add_sums([self.counts, counts]) if self.counts else counts

    def tensors(self, loss: Tensor) -> dict[str, Tensor]:
        """All of it, and the loss as `Trainer` sums it up, for a checkpoint."""
        return {"loss": loss, **under("sums", self.sums), **under("counts", self.counts)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "_Window":
        """From what `tensors` gave."""
        window = cls()
        window.sums, window.counts = part("sums", tensors), part("counts", tensors)
        return window


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


@contextmanager
def _named(checkpoint: str) -> Iterator[Path]:
    """The folder of a checkpoint, which errors about its content name."""
    try:
        yield Path(checkpoint)
    except (CheckpointError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint} cannot be gone on from: {error}") from error


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
