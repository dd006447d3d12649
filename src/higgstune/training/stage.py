"""One stage of a run: trained or gone on with, saved, and proven."""

import gc
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from typing_extensions import override

from higgstune.batch.collate import Batch, PaddedCollator, pack, tensors_to
from higgstune.batch.dataset import RowExamples, probe_rows
from higgstune.batch.packing import PackSize
from higgstune.config.recipe import Recipe, Stage
from higgstune.data.store import CodeStore
from higgstune.errors import Interrupted
from higgstune.evaluation.clips import SAMPLES
from higgstune.evaluation.judges.base import Judges
from higgstune.families.base import Example
from higgstune.families.higgs_v2.packed import with_training_forward
from higgstune.files import writing
from higgstune.kernels.loss import LossWeights
from higgstune.kernels.memory import checkpoint_first
from higgstune.model.adapters import adapted_layers, add_lora, continue_lora, unload_adapter
from higgstune.model.compiled import Compile, compile_layers, is_worth_it
from higgstune.model.load import ModelAndTokenizers
from higgstune.planning.run_memory import RunMemory
from higgstune.training.callbacks import ProgressReport, StopSignals
from higgstune.training.checkpoint import newest_checkpoint, trained_state
from higgstune.training.distributed import Processes, shard, sharded_parameters
from higgstune.training.run_dir import RunFolder
from higgstune.training.sample_eval import Candidates, SampleEvaluation
from higgstune.training.save import adapter_card_of, save_adapter
from higgstune.training.setup import RunSetup
from higgstune.training.trainer import HiggsAudioTrainer
from higgstune.training.verify import probe_logits, verify_in_fresh_process, write_probe

_LOG = logging.getLogger(__name__)
_PROBE_CLIPS = 4
_COMPILED_WITH = 3  # clips
_LOOKED_AT = 16


@dataclass(frozen=True)
class Job:
    """What all stages of a run have in common."""

    run: RunFolder
    processes: Processes
    stop: StopSignals
    memory: RunMemory
    device: torch.device  # of this process
    loaded: ModelAndTokenizers
    store: CodeStore
    setup: RunSetup
    examples: Mapping[str, RowExamples]  # by split
    judges: Judges

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def sharded(self) -> bool:
        """Whether weights are spread over the processes; one alone has them all."""
        return self.recipe.parallel == "fsdp" and self.processes.count > 1


class _Compiling(TrainerCallback):
    """Compiles layers where enough steps are left for it."""

    def __init__(self, wanted: Compile, rows: RowExamples, size: PackSize) -> None:
        self.wanted = wanted
        self.rows = rows
        self.size = size

    @override
    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not is_worth_it(self.wanted, state.max_steps):  # of the whole stage: one that goes on does as it began
            return
        difference = compile_layers(kwargs["model"].train(), tensors_to(pack(self._clips()), args.device))
        if difference is None and self.wanted is True:
            _LOG.warning("compile: true has no effect in this stage; docs/training.md says where it has")

    def _clips(self) -> list[Example]:
        """A few short ones that fit into a pack."""
        shortest = sorted((self.rows[i] for i in range(min(_LOOKED_AT, len(self.rows)))), key=len)
        if self.size.tokens is None:
            return shortest[: min(_COMPILED_WITH, self.size.clips)]
        chosen = shortest[:_COMPILED_WITH]
        while len(chosen) > 1 and sum(map(len, chosen)) > self.size.tokens:
            chosen.pop()
        return chosen


def train_stage(job: Job, stage: Stage, start_from: Path | None) -> dict[str, Any]:
    """Train, save and prove one stage; the base is left as it was, but where it is sharded.

    Raises Interrupted (a checkpoint is kept), TrainingError, VerificationError, WorkError.
    """
    recipe, loaded, run = job.recipe, job.loaded, job.run
    torch.manual_seed(recipe.seed)  # the adapter's start, the same for the same recipe
    model = _with_adapter(job, stage, start_from)
    again = job.processes.broadcast(job.memory.checkpointed(stage))  # by what is free, which is not the same for all
    checkpoint_first(loaded.model.model.layers, again)
    if job.sharded:
        shard(model, job.device)
    train_rows, validation_rows = (
        job.examples[name].with_targets(stage.text_targets) for name in ("train", "validation")
    )
    found = newest_checkpoint(run.stage_folder(stage) / "checkpoints") if run.is_main else None
    checkpoint = job.processes.broadcast(found)  # the same for all, also where one of them reads a file wrongly
    writer = _writer(job, stage)
    listening = _listening(job, stage, writer)
    evaluate = len(validation_rows) > 0 or listening is not None
    trainer = HiggsAudioTrainer(
        loaded,
        _training_arguments(job, stage, evaluate=evaluate, evaluate_first=evaluate and checkpoint is None),
        train_dataset=train_rows,
        eval_dataset=validation_rows if evaluate else None,
        model=model,
        weights=LossWeights(stage.text_weight, stage.audio_weight, stage.codebook_weights),
        batch_tokens=stage.pack_size.tokens,
        packs_per_step=run.packs_per_step(stage),
        full_learning_rate=stage.rate_of_full_modules,
        listening=listening,
        callbacks=_callbacks(job, stage, writer),
    )
    if job.processes.count > 1:  # each draws a dropout of its own
        torch.manual_seed(recipe.seed + job.processes.rank)
    with job.memory.explained(stage):
        _train_or_resume(trainer, checkpoint)
    steps = trainer.state.global_step
    try:
        job.stop.end_training()
    except Interrupted as interrupted:
        raise Interrupted(
            interrupted.number, f"after step {steps} of {stage.name}, which is kept; go on with --resume"
        ) from None
    result: dict[str, Any] = {
        "kind": stage.kind,
        "steps": steps,
        "layers": len(adapted_layers(model)),
        "compiled": loaded.model.compiler_stance is not None,
        "checkpointed_layers": min(again, loaded.config.num_hidden_layers),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "sharded_parameters": sharded_parameters(model),
        # Without `Trainer`'s last line: its means are of this process alone, which may have gone on with the stage.
        "history": [entry for entry in trainer.state.log_history if "train_runtime" not in entry],
    }
    if listening is not None and listening.candidates.entries:
        result["stopped_early"] = listening.candidates.exhausted and steps < trainer.state.max_steps
        result["chosen"] = _choose(trainer, listening.candidates, recipe.evaluation.which)
    del trainer  # a second base has to fit beside it: gradients and moments go, which stand in circles
    gc.collect()
    _save_and_prove(job, stage, model, train_rows, result)
    if not job.sharded:
        unload_adapter(model)
    return result


def _with_adapter(job: Job, stage: Stage, start_from: Path | None) -> PeftModel:
    recipe, base = job.recipe, job.loaded.model
    with_training_forward(base)
    conditioning, attention = job.setup.conditioning, job.setup.attention
    if start_from is None:
        return add_lora(base, recipe.lora, stage.kind, conditioning, attention)
    return continue_lora(base, start_from, recipe.lora, stage.kind, conditioning, attention)


def _save_and_prove(job: Job, stage: Stage, model: PeftModel, rows: RowExamples, result: dict[str, Any]) -> None:
    """Write the adapter, load it in a fresh process, compare, and note in `result` how that came out."""
    run = job.run
    if not (run.is_main or job.sharded):
        return
    probe = run.stage_folder(stage) / "verify" / "probe.safetensors"
    batch = _probe_batch(job.store, rows, job.loaded)
    logits = probe_logits(model, batch)
    weights = trained_state(model)
    if run.is_main:
        card = adapter_card_of(job.recipe, job.loaded, job.store, job.setup, run.state["stages"] | {stage.name: result})
        with writing(run.adapter(stage), "its checkpoints are kept", again="go on with --resume"):
            write_probe(batch, logits, probe)
            save_adapter(run.adapter(stage), model, card, weights)
    if not job.sharded:
        _free(model)
    verification = verify_in_fresh_process(
        adapter=run.adapter(stage),
        checkpoint=job.loaded.checkpoint,
        revision=job.loaded.revision,
        dtype=str(job.loaded.model.dtype).removeprefix("torch."),
        device=str(job.device),
        probe=probe,
        quantize=job.recipe.model.quantize,
        among=job.processes if job.sharded else None,
    )
    if not job.sharded:
        torch.nn.Module.to(job.loaded.model, job.device)
    result["verification"] = asdict(verification)


def _train_or_resume(trainer: HiggsAudioTrainer, checkpoint: Path | None) -> None:
    if checkpoint is not None and trainer.ended_at(checkpoint):
        trainer.take_over(checkpoint)  # `Trainer.train` would take one more step
        return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressReport):
                callback.close()


def _choose(trainer: HiggsAudioTrainer, candidates: Candidates, which: Literal["best", "last"]) -> dict[str, Any]:
    """Which evaluated step the stage ends with, and why; its weights are in the model then."""
    told = candidates.told()
    if which == "last":
        return told | {"step": trainer.state.global_step, "rule": "the last step"}
    if not told["healthy"]:
        _LOG.warning(
            "no evaluated step meets all conditions (%s): step %d breaks the fewest. Listen before you use it",
            told["rule"], told["step"],
        )  # fmt: skip
    trainer.take_best()
    return told


def _training_arguments(job: Job, stage: Stage, *, evaluate: bool, evaluate_first: bool) -> TrainingArguments:
    recipe = job.recipe
    return TrainingArguments(
        output_dir=str(job.run.stage_folder(stage) / "checkpoints"),
        max_steps=stage.max_steps if stage.max_steps is not None else -1,
        num_train_epochs=stage.epochs if stage.epochs is not None else 1.0,
        per_device_train_batch_size=stage.pack_size.clips,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.scheduler,
        warmup_steps=stage.warmup_steps,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        logging_steps=recipe.log_steps,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=recipe.eval_steps,
        eval_on_start=evaluate_first,
        save_steps=recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
        bf16=job.loaded.model.dtype == torch.bfloat16,
        use_cpu=job.device.type == "cpu",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # of rotary embeddings, which nothing changes
        dataloader_pin_memory=job.device.type == "cuda",
        seed=recipe.seed,
        report_to=[name for name in recipe.report_to if name != "tensorboard"],
        disable_tqdm=True,
    )


def _listening(job: Job, stage: Stage, writer: SummaryWriter | None) -> SampleEvaluation | None:
    if job.recipe.evaluation.clips == 0:
        return None
    return SampleEvaluation(
        job.loaded,
        job.store,
        job.recipe.evaluation,
        job.run.stage_folder(stage) / SAMPLES,
        reference_place=job.recipe.data.reference,
        judges=job.judges,
        processes=job.processes,
        together=job.sharded,
        features=job.setup.rendering.features,
        writer=writer,
    )


def _writer(job: Job, stage: Stage) -> SummaryWriter | None:
    if "tensorboard" not in job.recipe.report_to or not job.run.is_main:
        return None
    return SummaryWriter(log_dir=str(job.run.stage_folder(stage) / "tensorboard"))


def _callbacks(job: Job, stage: Stage, writer: SummaryWriter | None) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [ProgressReport(stage.name), job.stop]
    if not job.sharded:
        rows = job.examples["train"].with_targets(stage.text_targets)
        callbacks.append(_Compiling(job.recipe.compile, rows, stage.pack_size))
    if writer is not None:
        # Given its writer, the callback writes into the stage's folder; by itself it would hide below the checkpoints.
        callbacks.append(TensorBoardCallback(writer))
    return callbacks


def _probe_batch(store: CodeStore, examples: RowExamples, loaded: ModelAndTokenizers) -> Batch:
    """A few clips; their transcripts are labelled whatever the stage does, so that text logits are compared too."""
    splits = [(name, store.split(name)) for name in ("validation", "train")]
    _, rows = probe_rows(splits, examples.rendering)
    probe = RowExamples(rows, examples.prompter, "transcript", examples.rendering)
    collate = PaddedCollator(pad_id=loaded.config.pad_token_id or 0, stream_eos=loaded.config.audio_stream_eos_id)
    return collate([probe[i] for i in range(min(_PROBE_CLIPS, len(probe)))])


def _free(model: PeftModel) -> None:
    if torch.cuda.is_available():
        model.to("cpu")
        torch.cuda.empty_cache()
