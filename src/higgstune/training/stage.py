"""One stage of a run: trained or resumed, saved, and verified."""

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from typing_extensions import override

from higgstune.batch.collate import Batch, PaddedCollator, pack, tensors_to
from higgstune.batch.dataset import RowExamples, probe_rows
from higgstune.batch.packing import PackSize
from higgstune.config.recipe import Compile, Recipe, Stage
from higgstune.data.store import CodeStore
from higgstune.errors import Interrupted
from higgstune.evaluation.clips import SAMPLES
from higgstune.evaluation.judges.base import Judges
from higgstune.evaluation.verdict import Evidence, chance_of, judge
from higgstune.families.base import Example
from higgstune.files import writing
from higgstune.kernels.loss import LossWeights
from higgstune.kernels.memory import checkpoint_first
from higgstune.model.adapters import adapted_layers, add_lora, continue_lora, unload_adapter
from higgstune.model.compiled import compile_layers, is_worth_it
from higgstune.model.load import ModelAndTokenizers
from higgstune.peft_compat import PeftModel
from higgstune.planning.run_memory import RunMemory
from higgstune.training.callbacks import LossWatch, ProgressReport, StopSignals, show_verdict
from higgstune.training.checkpoint import newest_checkpoint, trained_state
from higgstune.training.distributed import Processes, shard, sharded_parameters
from higgstune.training.run_dir import ChosenStep, RunFolder, StageResult, TrainedStage
from higgstune.training.sample_eval import SampleEvaluation
from higgstune.training.save import adapter_card_of, save_adapter
from higgstune.training.setup import RunSetup
from higgstune.training.trainer import HiggsAudioTrainer
from higgstune.training.verify import Verification, probe_logits, verify_in_fresh_process, write_probe

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LOG = logging.getLogger(__name__)
_PROBE_CLIPS = 4
_COMPILED_WITH = 3  # clips
_COMPILE_CANDIDATES = 16  # clips, of which the shortest are taken


@dataclass(frozen=True)
class Job:
    """What all stages of a run have in common, but for the base."""

    run: RunFolder
    processes: Processes
    stop: StopSignals
    memory: RunMemory
    device: torch.device  # of this process
    store: CodeStore
    setup: RunSetup
    examples: Mapping[str, RowExamples]  # by split
    judges: Judges

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def sharded(self) -> bool:
        """Whether weights are spread over the processes."""
        return is_sharded_run(self.recipe, self.processes)


def is_sharded_run(recipe: Recipe, processes: Processes) -> bool:
    """Whether weights are spread over the processes; one alone has all of them."""
    return recipe.parallel == "fsdp" and processes.count > 1


class _Compiling(TrainerCallback):
    """Compiles layers where enough steps are left for it."""

    def __init__(self, wanted: Compile, rows: RowExamples, size: PackSize) -> None:
        self.wanted = wanted
        self.rows = rows
        self.size = size

    @override
    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not is_worth_it(self.wanted, state.max_steps):  # of the whole stage: one that resumes does as it did before
            return
        difference = compile_layers(kwargs["model"].train(), tensors_to(pack(self._clips()), args.device))
        if difference is None and self.wanted is True:
            _LOG.warning("compile: true has no effect in this stage; docs/training.md says where it has")

    def _clips(self) -> list[Example]:
        """A few short ones that fit into a pack."""
        shortest = sorted((self.rows[i] for i in range(min(_COMPILE_CANDIDATES, len(self.rows)))), key=len)
        if self.size.tokens is None:
            return shortest[: min(_COMPILED_WITH, self.size.clips)]
        chosen = shortest[:_COMPILED_WITH]
        while len(chosen) > 1 and sum(map(len, chosen)) > self.size.tokens:
            chosen.pop()
        return chosen


def train_stage(job: Job, stage: Stage, base: ModelAndTokenizers, start_from: Path | None) -> StageResult:
    """Train, save and verify one stage. Afterwards the base is as it was, but where it is sharded.

    Raises Interrupted (a checkpoint is kept), TrainingError, VerificationError, WorkError.
    """
    seed = job.recipe.seed

    # 1. Add the adapter, which starts the same for the same recipe.
    torch.manual_seed(seed)
    model = _with_adapter(job, stage, base, start_from)

    # 2. Choose the layers to recompute, and spread the weights over the processes.
    recomputed = job.processes.broadcast(job.memory.checkpointed(stage))  # free memory differs between processes
    checkpoint_first(base.family.layers(base.model), recomputed)
    if job.sharded:
        shard(model, job.device)

    # 3. Train, or resume from the newest checkpoint.
    checkpoint = _newest_checkpoint(job, stage)
    trainer = _trainer(job, stage, base, model, resumes=checkpoint is not None)
    if job.processes.count > 1:  # each draws a dropout of its own
        torch.manual_seed(seed + job.processes.rank)
    with job.memory.explain_out_of_memory(stage):
        _train_or_resume(trainer, checkpoint)
    _end_training(job, stage, trainer.state.global_step)

    # 4. Choose the step that the stage ends with.
    trained = TrainedStage(
        kind=stage.kind,
        steps=trainer.state.global_step,
        layers=len(adapted_layers(model)),
        compiled=getattr(base.model, "compiler_stance", None) is not None,
        checkpointed_layers=min(recomputed, base.spec.layers),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        sharded_parameters=sharded_parameters(model),
        # Without `Trainer`'s last entry: its means are of this process alone, which may have resumed the stage.
        history=[entry for entry in trainer.state.log_history if "train_runtime" not in entry],
        stopped_early=trainer.ran_out_of_patience,
        chosen=_choose(trainer, job.recipe.evaluation.which),
    )
    evidence = _evidence(job, stage, trainer, trained, base.spec.classes)
    del trainer  # memory for a second base: gradients and moments are freed, which are part of reference cycles
    gc.collect()

    # 5. Save the adapter, and verify it in a fresh process.
    verification = _save_and_verify(job, stage, base, model, trained)
    if not job.sharded:
        unload_adapter(model)
    # 6. Judge whether it is usable.
    proof = verification
    evidence = replace(evidence, changes_base=proof.changes_base, modules=proof.modules, idle=proof.idle)
    verdict = job.processes.broadcast(judge(evidence))
    if job.run.is_main:
        show_verdict(stage.name, verdict)
    return StageResult(**vars(trained), verification=verification, verdict=verdict)


def _evidence(job: Job, stage: Stage, trainer: HiggsAudioTrainer, trained: TrainedStage, classes: int) -> Evidence:
    """What the verdict takes from training, to which the verification adds."""
    stages, chosen, planned = job.recipe.stages, trained.chosen, trainer.state.max_steps
    before = [done.history for done in job.run.state.stages.values()]
    return Evidence(
        stage=stage,
        path=f"stages.{stages.index(stage)}",
        is_last=stage is stages[-1],
        step=trained.steps if chosen is None else chosen.step,
        planned_steps=planned,
        warmup_steps=trainer.args.get_warmup_steps(planned),
        history=trained.history,
        base_history=[*before, trained.history][0],
        chance=chance_of(classes),
        spoken={} if chosen is None else next((c.measures for c in chosen.candidates if c.step == chosen.step), {}),
        clips=trainer.spoken_clips,
    )


def _with_adapter(job: Job, stage: Stage, base: ModelAndTokenizers, start_from: Path | None) -> PeftModel:
    base.family.pack_forward(base.model)
    lora, conditioning, attention = job.recipe.lora, job.setup.conditioning, job.setup.attention
    if start_from is None:
        return add_lora(base.model, lora, stage.trains, conditioning, attention)
    return continue_lora(base.model, start_from, lora, stage.trains, conditioning, attention)


def _newest_checkpoint(job: Job, stage: Stage) -> Path | None:
    """The first process's choice, also where another one cannot read a file."""
    folder = job.run.stage_folder(stage) / "checkpoints"
    return job.processes.broadcast(newest_checkpoint(folder) if job.run.is_main else None)


def _trainer(job: Job, stage: Stage, base: ModelAndTokenizers, model: PeftModel, *, resumes: bool) -> HiggsAudioTrainer:
    train_rows, validation_rows = (
        job.examples[name].with_targets(stage.text_targets) for name in ("train", "validation")
    )
    writer = _writer(job, stage)
    samples = _sample_evaluation(job, stage, base, writer)
    evaluate = len(validation_rows) > 0 or samples is not None
    return HiggsAudioTrainer(
        base,
        _training_arguments(job, stage, base, evaluate=evaluate, evaluate_first=evaluate and not resumes),
        train_dataset=train_rows,
        eval_dataset=validation_rows if evaluate else None,
        model=model,
        weights=LossWeights(stage.text_weight, stage.audio_weight, stage.codebook_weights),
        batch_tokens=stage.pack_size.tokens,
        packs_per_step=job.run.packs_per_step(stage),
        full_learning_rate=stage.rate_of_full_modules,
        warmup_from=job.run.state.warmup_from,
        sample_evaluation=samples,
        callbacks=_callbacks(job, stage, writer),
    )


def _train_or_resume(trainer: HiggsAudioTrainer, checkpoint: Path | None) -> None:
    if checkpoint is not None and trainer.is_complete_at(checkpoint):
        trainer.restore_complete(checkpoint)  # `Trainer.train` would take one more step
        return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressReport):
                callback.close()


def _end_training(job: Job, stage: Stage, steps: int) -> None:
    """Raises Interrupted where a signal has ended training."""
    try:
        job.stop.end_training()
    except Interrupted as interrupted:
        raise Interrupted(
            interrupted.number, f"after step {steps} of {stage.name}, which is kept; resume with --resume"
        ) from None


def _choose(trainer: HiggsAudioTrainer, which: Literal["best", "last"]) -> ChosenStep | None:
    """The evaluated step that the stage ends with, whose weights are in the model then; None without samples."""
    best = trainer.best_step
    if best is None:
        return None
    if which == "last":
        return replace(best, step=trainer.state.global_step, rule="the last step")
    if not best.healthy:
        _LOG.warning(
            "no evaluated step meets all conditions (%s): step %d breaks the fewest. Listen to it before you use it",
            best.rule, best.step,
        )  # fmt: skip
    trainer.take_best()
    return best


def _save_and_verify(
    job: Job, stage: Stage, base: ModelAndTokenizers, model: PeftModel, trained: TrainedStage
) -> Verification:
    """Save the adapter, load it in a fresh process, and compare; the result, in all processes."""
    verification = None
    if job.run.is_main or job.sharded:
        verification = _saved_and_verified(job, stage, base, model, trained)
    shared = job.processes.broadcast(verification)
    assert shared is not None
    return shared


def _saved_and_verified(
    job: Job, stage: Stage, base: ModelAndTokenizers, model: PeftModel, trained: TrainedStage
) -> Verification:
    run = job.run
    probe = run.stage_folder(stage) / "verify" / "probe.safetensors"
    batch = _probe_batch(job, base)
    logits = probe_logits(model, batch)
    weights = trained_state(model)
    if run.is_main:
        card = adapter_card_of(job.recipe, base, job.store, job.setup, run.state.stages | {stage.name: trained})
        with writing(run.adapter(stage), "its checkpoints are kept", again="resume with --resume"):
            write_probe(batch, logits, probe)
            save_adapter(run.adapter(stage), model, card, weights)
    if not job.sharded:
        _free(model)
    verification = verify_in_fresh_process(
        adapter=run.adapter(stage),
        checkpoint=base.checkpoint,
        revision=base.revision,
        dtype=str(base.model.dtype).removeprefix("torch."),
        device=str(job.device),
        probe=probe,
        quantize=job.recipe.model.quantize,
        among=job.processes if job.sharded else None,
    )
    if not job.sharded:
        torch.nn.Module.to(base.model, job.device)
    return verification


def _training_arguments(
    job: Job, stage: Stage, base: ModelAndTokenizers, *, evaluate: bool, evaluate_first: bool
) -> TrainingArguments:
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
        bf16=base.model.dtype == torch.bfloat16,
        use_cpu=job.device.type == "cpu",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # of rotary embeddings, which nothing changes
        dataloader_pin_memory=job.device.type == "cuda",
        seed=recipe.seed,
        report_to=[name for name in recipe.report_to if name != "tensorboard"],
        disable_tqdm=True,
    )


def _sample_evaluation(
    job: Job, stage: Stage, base: ModelAndTokenizers, writer: "SummaryWriter | None"
) -> SampleEvaluation | None:
    if job.recipe.evaluation.clips == 0:
        return None
    return SampleEvaluation(
        base,
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


def _writer(job: Job, stage: Stage) -> "SummaryWriter | None":
    if "tensorboard" not in job.recipe.report_to or not job.run.is_main:
        return None
    from torch.utils.tensorboard import SummaryWriter  # takes long to import

    return SummaryWriter(log_dir=str(job.run.stage_folder(stage) / "tensorboard"))


def _callbacks(job: Job, stage: Stage, writer: "SummaryWriter | None") -> list[TrainerCallback]:
    watch = LossWatch(stage, f"stages.{job.recipe.stages.index(stage)}")
    callbacks: list[TrainerCallback] = [ProgressReport(stage.name), watch, job.stop]
    if not job.sharded:
        rows = job.examples["train"].with_targets(stage.text_targets)
        callbacks.append(_Compiling(job.recipe.compile, rows, stage.pack_size))
    if writer is not None:
        # Given its writer, the callback writes into the stage's folder; by itself it would hide below the checkpoints.
        callbacks.append(TensorBoardCallback(writer))
    return callbacks


def _probe_batch(job: Job, base: ModelAndTokenizers) -> Batch:
    """A few clips, with labelled transcripts whatever the stage's labels are, so that text logits are compared too."""
    splits = [(name, job.store.split(name)) for name in ("validation", "train")]
    examples = job.examples["train"]
    _, rows = probe_rows(splits, examples.rendering)
    probe = RowExamples(rows, examples.prompter, base.family.info.text_targets[0], examples.rendering)
    collate = PaddedCollator.of(base.spec)
    return collate([probe[i] for i in range(min(_PROBE_CLIPS, len(probe)))])


def _free(model: PeftModel) -> None:
    if torch.cuda.is_available():
        model.to("cpu")
        torch.cuda.empty_cache()
