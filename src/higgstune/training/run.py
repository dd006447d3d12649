"""A recipe as one job: its stages in order, resumable, each proven by loading what it saved."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

import higgstune
from higgstune.batch.padded import Batch, PaddedCollator
from higgstune.data.store import CodeStore
from higgstune.errors import CheckpointError, ConfigError, DataError
from higgstune.model.adapters import (
    RUN_STATE,
    adapted_layers,
    adapter_card,
    adapter_conditioning,
    add_lora,
    check_directions,
    continue_lora,
    find_adapter,
    unload_adapter,
)
from higgstune.model.conditioning import add_conditioning
from higgstune.model.forward import with_training_forward
from higgstune.model.layout import read_json
from higgstune.model.load import ModelAndTokenizers, choose_device, load_model_and_tokenizers
from higgstune.model.loss import LossWeights
from higgstune.planning.at_training import RunMemory
from higgstune.planning.layers import checkpoint_first
from higgstune.prompt.example import Prompter, SpecialIds
from higgstune.prompt.rows import RowExamples, telling_split
from higgstune.training.metrics import check_possible
from higgstune.training.progress import ProgressReport
from higgstune.training.recipe import Recipe, Stage, load_recipe, save_recipe
from higgstune.training.save import adapter_card_of, save_adapter
from higgstune.training.setting import Setting, check_packs, find_setting
from higgstune.training.trainer import HiggsAudioTrainer
from higgstune.training.verify import verify_in_fresh_process, write_probe

RECIPE_FILE = "recipe.yaml"
_BEGUN = (RECIPE_FILE, RUN_STATE)  # a run that was killed in its first moment has left no more than these
_PROBE_CLIPS = 4


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: Path
    adapter: Path  # of the last stage
    stages: dict[str, Any]  # by name: steps, layers, parameters, last losses, verification


def train(recipe: Recipe | str | Path, out: str | Path, *, resume: bool = False) -> RunResult:
    """Train a recipe into the run folder `out`; with `resume`, go on where an earlier run of it stopped.

    Raises ConfigError (the folder is in use, or the recipe is another one than it began with), DataError,
    CheckpointError, TrainingError (what is seen cannot be), VerificationError (what was saved is not what was trained).
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    processes = _Processes(cpu=choose_device(_device(recipe.model.device)).type == "cpu")
    run = _Run(Path(out), recipe, is_main=processes.is_main)
    if run.is_main:
        run.check(resume=resume)
    memory = RunMemory(recipe)  # before anything is loaded: what is free then is what training may take
    store = CodeStore.open(recipe.data.store)
    settings = recipe.model
    loaded = load_model_and_tokenizers(
        settings.checkpoint,
        codec=settings.codec,
        revision=settings.revision,
        dtype=settings.dtype,
        device=_device(settings.device),
        quantize=settings.quantize,
    )
    check_store(store, loaded)
    _check_codebook_weights(recipe, loaded.config.num_codebooks)
    adapter = _first_adapter(recipe, loaded)
    setting = find_setting(recipe, store, loaded)
    _check_same_encoder(adapter, setting)
    add_conditioning(loaded.model, setting.conditioning)
    check_directions(loaded.model, recipe.lora, setting.conditioning, setting.attention)
    prompter = Prompter(loaded.tokenizer, SpecialIds.from_config(loaded.config))
    examples = {
        name: RowExamples(store.split(name), prompter, "none", setting.rendering) for name in ("train", "validation")
    }
    check_packs(recipe, list(examples.values()))
    if run.is_main:
        memory.warn()
    # Only now is the folder taken: a wrong store or checkpoint must not leave a run that cannot go on.
    if run.is_main:
        run.begin()
    processes.wait()
    run.read()
    for stage in recipe.stages:
        if not run.has_finished(stage):
            run.finished(stage, _train_stage(run, stage, loaded, store, examples, adapter, setting, memory))
            processes.wait()  # the next stage begins from what the first process has written
        adapter = run.adapter(stage)
    assert adapter is not None
    run.close()
    return RunResult(run.folder, adapter, run.state["stages"])


def check_store(store: CodeStore, loaded: ModelAndTokenizers) -> None:
    """Raises DataError unless the store has training rows, encoded by the checkpoint's codec."""
    if store.info.codec_revision != loaded.audio_tokenizer.revision:
        raise DataError(
            f"{store.folder} was encoded by the codec {store.info.codec} (revision {store.info.codec_revision}); this "
            f"checkpoint speaks through {loaded.codec} (revision {loaded.audio_tokenizer.revision}): prepare the data "
            "with that codec, or name the store's codec in the recipe (model.codec)"
        )
    if not len(store.split("train")):
        raise DataError(f"{store.folder} has no training rows")


def _first_adapter(recipe: Recipe, loaded: ModelAndTokenizers) -> Path | None:
    """Where the first stage goes on from. Raises CheckpointError for an adapter that speaks another codec's codes."""
    if recipe.init_adapter is None:
        return None
    folder = find_adapter(recipe.init_adapter)
    trained_with = adapter_card(folder).get("codec_revision")
    if trained_with not in (None, loaded.audio_tokenizer.revision):
        raise CheckpointError(
            f"init_adapter {folder} was trained on codes of another codec (revision {trained_with}) than "
            f"{loaded.codec} (revision {loaded.audio_tokenizer.revision})"
        )
    return folder


def _check_same_encoder(adapter: Path | None, setting: Setting) -> None:
    """Raises CheckpointError for an adapter to go on from that hears through another Whisper encoder."""
    trained_with = None if adapter is None else adapter_conditioning(adapter).whisper
    now = setting.conditioning.whisper
    if trained_with is not None and now is not None and trained_with.revision != now.revision:
        raise CheckpointError(
            f"init_adapter {adapter} was trained to hear through {trained_with.checkpoint} (revision "
            f"{trained_with.revision}), the store has features of {now.checkpoint} (revision {now.revision})"
        )


def _check_codebook_weights(recipe: Recipe, codebooks: int) -> None:
    for stage in recipe.stages:
        if stage.codebook_weights is not None and len(stage.codebook_weights) != codebooks:
            raise ConfigError(
                f"stage {stage.name} has {len(stage.codebook_weights)} codebook_weights, the checkpoint {codebooks} "
                "codebooks: give one weight for each"
            )


class _Processes:
    """The processes of a run: one, or those of torchrun."""

    def __init__(self, *, cpu: bool) -> None:
        state = PartialState(cpu=cpu)
        self.is_main = state.is_main_process
        # Collectives give up after minutes; the proof of a large model, read from a slow disk, may take longer.
        patience = timedelta(days=1)
        self._group = torch.distributed.new_group(timeout=patience, backend="gloo") if state.use_distributed else None

    def wait(self) -> None:
        """Until all are here."""
        if self._group is not None:
            torch.distributed.barrier(self._group)


class _Run:
    """The run's folder: `recipe.yaml`, `run.json`, and a folder for each stage."""

    def __init__(self, folder: Path, recipe: Recipe, *, is_main: bool) -> None:
        self.folder = folder
        self.recipe = recipe
        self.state: dict[str, Any] = {"status": "running", "higgstune": higgstune.__version__, "stages": {}}
        self.is_main = is_main  # the one of several processes that writes

    def check(self, *, resume: bool) -> None:
        """Raises ConfigError when the folder cannot be taken or gone on with; writes nothing."""
        if not (self.folder / RUN_STATE).exists():
            if self.folder.is_dir() and any(not p.name.startswith(_BEGUN) for p in self.folder.iterdir()):
                raise ConfigError(f"{self.folder} exists and is no run: give another --out")
            return
        self.read()
        if self.state["status"] == "finished":
            adapter = self.folder / str(self.state.get("adapter"))
            raise ConfigError(
                f"the run {self.folder} is finished and is not overwritten: its adapter is {adapter}; give another "
                "--out to train again"
            )
        if not resume:
            raise ConfigError(
                f"the run {self.folder} was begun already: continue it with --resume, or give another --out"
            )
        begun_with = load_recipe(self.folder / RECIPE_FILE)
        changed = _differences(begun_with.model_dump(mode="json"), self.recipe.model_dump(mode="json"))
        if changed:
            raise ConfigError(
                f"the run {self.folder} was begun with another recipe ({', '.join(changed)} differ): continue it with "
                f"{self.folder / RECIPE_FILE}, or give another --out"
            )

    def read(self) -> None:
        """What the folder says of the run."""
        self.state = read_json(self.folder / RUN_STATE, "it is no run's folder without it")

    def begin(self) -> None:
        """Take the folder, unless the run has it already."""
        if (self.folder / RUN_STATE).exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_recipe(self.recipe, self.folder / RECIPE_FILE)
        self._save()

    def _save(self) -> None:
        if self.is_main:
            temporary = self.folder / (RUN_STATE + ".tmp")
            temporary.write_text(json.dumps(self.state, indent=2), encoding="utf-8")
            os.replace(temporary, self.folder / RUN_STATE)

    def stage_folder(self, stage: Stage) -> Path:
        return self.folder / stage.name

    def adapter(self, stage: Stage) -> Path:
        return self.stage_folder(stage) / "adapter"

    def has_finished(self, stage: Stage) -> bool:
        return stage.name in self.state["stages"]

    def finished(self, stage: Stage, result: dict[str, Any]) -> None:
        self.state["stages"][stage.name] = result
        self.state["adapter"] = self.adapter(stage).relative_to(self.folder).as_posix()
        self._save()

    def close(self) -> None:
        self.state["status"] = "finished"
        self._save()


def _train_stage(
    run: _Run,
    stage: Stage,
    loaded: ModelAndTokenizers,
    store: CodeStore,
    examples: Mapping[str, RowExamples],
    start_from: Path | None,
    setting: Setting,
    memory: RunMemory,
) -> dict[str, Any]:
    """Train, save and prove one stage; the base is left as it was."""
    recipe = run.recipe
    torch.manual_seed(recipe.seed)  # the adapter's start, the same for the same recipe
    with_training_forward(loaded.model)
    if start_from is None:
        model = add_lora(loaded.model, recipe.lora, stage.kind, setting.conditioning, setting.attention)
    else:
        model = continue_lora(
            loaded.model, start_from, recipe.lora, stage.kind, setting.conditioning, setting.attention
        )
    checkpoint_first(loaded.model.model.layers, memory.checkpointed(stage))
    train_rows, validation_rows = (examples[name].with_targets(stage.text_targets) for name in ("train", "validation"))
    folder = run.stage_folder(stage)
    trainer = HiggsAudioTrainer(
        loaded,
        _training_arguments(recipe, stage, folder, loaded, evaluate=len(validation_rows) > 0),
        train_dataset=train_rows,
        eval_dataset=validation_rows if len(validation_rows) else None,
        model=model,
        weights=LossWeights(stage.text_weight, stage.audio_weight, stage.codebook_weights),
        batch_tokens=stage.pack_size.tokens,
        full_learning_rate=stage.rate_of_full_modules,
        callbacks=_callbacks(recipe, stage, folder, is_main=run.is_main),
    )
    with memory.explained(stage):
        _train_or_resume(trainer, _newest_checkpoint(folder))
    evaluated_at = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if len(validation_rows) and trainer.state.global_step not in evaluated_at:
        check_possible(trainer.evaluate()["eval_code_loss"], step=trainer.state.global_step)
    result: dict[str, Any] = {
        "kind": stage.kind,
        "steps": trainer.state.global_step,
        "layers": len(adapted_layers(model)),
        "checkpointed_layers": min(memory.checkpointed(stage), loaded.config.num_hidden_layers),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "history": trainer.state.log_history,
    }
    if run.is_main:
        probe = folder / "verify" / "probe.safetensors"
        probe.parent.mkdir(parents=True, exist_ok=True)
        write_probe(model, _probe_batch(store, train_rows, loaded), probe)
        results = run.state["stages"] | {stage.name: result}
        save_adapter(run.adapter(stage), model, adapter_card_of(recipe, loaded, store, setting, results))
        device = str(next(model.parameters()).device)
        del trainer
        _free(model)  # a second base has to fit beside it
        verification = verify_in_fresh_process(
            adapter=run.adapter(stage),
            checkpoint=loaded.checkpoint,
            revision=loaded.revision,
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            device=device,
            probe=probe,
            quantize=recipe.model.quantize,
        )
        torch.nn.Module.to(loaded.model, device)
        result["verification"] = asdict(verification)
    unload_adapter(model)
    return result


def _train_or_resume(trainer: HiggsAudioTrainer, checkpoint: Path | None) -> None:
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint is not None else None
    if state is not None and state.global_step >= state.max_steps:
        # It was stopped after its last step; `Trainer.train` would take one more.
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state
        return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressReport):
                callback.close()


def _training_arguments(
    recipe: Recipe, stage: Stage, folder: Path, loaded: ModelAndTokenizers, *, evaluate: bool
) -> TrainingArguments:
    device = loaded.model.device
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=stage.max_steps if stage.max_steps is not None else -1,
        num_train_epochs=stage.epochs if stage.epochs is not None else 1.0,
        per_device_train_batch_size=stage.pack_size.clips,
        gradient_accumulation_steps=stage.gradient_accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.scheduler,
        warmup_steps=stage.warmup_steps,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        logging_steps=recipe.log_steps,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=recipe.eval_steps,
        eval_on_start=evaluate,
        save_steps=recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
        bf16=loaded.model.dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,
        dataloader_num_workers=recipe.data.workers,
        dataloader_pin_memory=device.type == "cuda",
        seed=recipe.seed,
        report_to=[name for name in recipe.report_to if name != "tensorboard"],
        disable_tqdm=True,
    )


def _callbacks(recipe: Recipe, stage: Stage, folder: Path, *, is_main: bool) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [ProgressReport(stage.name)]
    if "tensorboard" in recipe.report_to and is_main:
        # Given its writer, the callback writes into the stage's folder; by itself it would hide below the checkpoints.
        callbacks.append(TensorBoardCallback(SummaryWriter(log_dir=str(folder / "tensorboard"))))
    return callbacks


def _newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a stage; one that was cut off while it was written has no such name."""
    found = sorted((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return found[-1] if found else None


def _probe_batch(store: CodeStore, examples: RowExamples, loaded: ModelAndTokenizers) -> Batch:
    """A few clips; their transcripts are labelled whatever the stage does, so that text logits are compared too."""
    splits = [(name, store.split(name)) for name in ("validation", "train")]
    _, rows = telling_split(splits, examples.rendering)
    probe = RowExamples(rows, examples.prompter, "transcript", examples.rendering)
    collate = PaddedCollator(pad_id=loaded.config.pad_token_id or 0, stream_eos=loaded.config.audio_stream_eos_id)
    return collate([probe[i] for i in range(min(_PROBE_CLIPS, len(probe)))])


def _free(model: PeftModel) -> None:
    if torch.cuda.is_available():
        model.to("cpu")
        torch.cuda.empty_cache()


def _device(name: str) -> str:
    """Under torchrun each process has its own GPU. Raises ConfigError for one that `Trainer` would not take."""
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank and torch.cuda.is_available() and name in ("auto", "cuda"):
        return f"cuda:{local_rank}"
    if name.startswith("cuda:") and name != "cuda:0":
        raise ConfigError(f"model.device: {name}: choose the GPU with CUDA_VISIBLE_DEVICES and say cuda")
    return name


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
