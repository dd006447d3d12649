"""A recipe as one job: its stages in order, each resumable, and verified by loading what it saved."""

import gc
import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from higgstune.batch.dataset import RowExamples
from higgstune.config.recipe import Recipe, Stage, load_recipe
from higgstune.config.trackers import check_installed
from higgstune.data.store import CodeStore
from higgstune.environment import choose_device, choose_dtype, versions
from higgstune.errors import CheckpointError, ConfigError, DataError, HiggstuneError, WorkError
from higgstune.evaluation.items import only_language
from higgstune.evaluation.judges import check_languages, load_judges
from higgstune.evaluation.judges.base import Judges
from higgstune.evaluation.report.run_report import write_run_report
from higgstune.files import check_folder
from higgstune.inputs import find_adapter
from higgstune.model.adapter_folder import (
    adapter_card,
    adapter_conditioning,
    check_merged_once,
    check_tokenizer,
    doubts_of_card,
)
from higgstune.model.adapters import check_directions, check_start
from higgstune.model.load import ModelAndTokenizers, load_model_and_tokenizers
from higgstune.planning.run_memory import RunMemory
from higgstune.planning.training_data import TrainingData, check_families
from higgstune.training.callbacks import StopSignals
from higgstune.training.distributed import Processes
from higgstune.training.run_dir import RunFolder, RunResult, StageResult
from higgstune.training.sample_eval import rule_of, texts_to_speak
from higgstune.training.setup import RunSetup, check_packs, resolve_setup
from higgstune.training.stage import Job, is_sharded_run, train_stage

_LOG = logging.getLogger(__name__)
_LOST = ("Connection closed by peer", "Connection reset by peer", "gloo")  # in errors of a broken collective


def train(recipe: Recipe | str | Path, out: str | Path, *, resume: bool = False) -> RunResult:
    """Train a recipe into the run folder `out`; with `resume`, continue where an earlier run of it stopped.

        train(Recipe.load("voice.yaml"), "runs/voice").adapter

    In each process of torchrun or `accelerate launch` it trains a share. SIGTERM and SIGINT end it with a checkpoint.

    Raises ConfigError (the folder is in use, or the run was started with another recipe), DataError, CheckpointError,
    TrainingError (training diverged, or its losses are impossible), VerificationError (what was saved is not what was
    trained), WorkError (the disk refuses, or another process has ended), Interrupted (by a signal). A run whose adapter
    is not usable raises nothing: its result says so (`usable`, `verdict`), and again when it is resumed.
    """
    # 1. Check the recipe, join the other processes, and check the run folder.
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    check_installed(recipe.report_to)
    check_folder(Path(out))
    device = choose_device(_device(recipe.model.device))
    processes = Processes(cpu=device.type == "cpu")
    if processes.count > 1 and device.type == "cuda":
        device = PartialState().device  # each has its own GPU, by its number on the machine
    stop = StopSignals(processes)
    run = RunFolder(Path(out), recipe, is_main=processes.is_main, processes=processes.count)
    with stop.installed(), _attribute_rank_failures(processes):
        try:
            if run.is_main:
                run.check(resume=resume)
            ended = processes.broadcast(run.state if run.state.status == "not usable" else None)
            if ended is not None:
                run.state = ended
                return run.result
            return _train(run, processes, stop, device)
        finally:
            run.release()


def _train(run: RunFolder, processes: Processes, stop: StopSignals, device: torch.device) -> RunResult:
    recipe = run.recipe

    # 2. Load the judges, and plan the memory: what is free before anything else is loaded is what training may take.
    judges = _judges(recipe, device) if run.is_main else Judges()  # one process judges the samples
    memory = RunMemory(recipe)

    # 3. Open the data.
    data = TrainingData.open(recipe)

    # 4. Load the base, and check that it fits data, adapter and recipe.
    check_families(recipe, data.stores)
    base = _load(recipe, device, processes)
    check_store(data.store, base)
    _check_codebook_weights(recipe, base.spec.num_codebooks)
    adapter = _first_adapter(recipe, base)
    setup = resolve_setup(recipe, data, base)
    _check_same_encoder(adapter, setup)
    base.family.extensions.add(base.model, setup.conditioning)
    check_directions(base.model, recipe.lora, setup.conditioning, setup.attention)

    # 5. Prepare the prompts, and check that packs can hold them.
    prompter = base.prompter
    examples = {
        name: RowExamples(data.rows(name), prompter, "none", setup.rendering) for name in ("train", "validation")
    }
    check_packs(recipe, list(examples.values()))

    # 6. Take the run folder. Not earlier: a wrong store or checkpoint must not leave a run that cannot be resumed.
    trained_on = {**data.identity, "base": setup.base_fingerprint, **setup.base_identity}
    _check_same_everywhere(processes, trained_on, data.store, base)
    if run.is_main:
        spoken = _check_evaluation(recipe, data.store, judges)
        memory.warn()
        assert base.folder is not None
        run.begin(trained_on | spoken, versions(device), base.folder)
    run.state = processes.broadcast(run.state)

    # 7. Train each stage: add its adapter, train, choose a step, save, verify, judge. None follows an unusable one.
    job = Job(run, processes, stop, memory, device, data.store, setup, examples, judges)
    bases = [base]
    del base
    for stage in recipe.stages:
        if not run.has_finished(stage):
            run.finished(stage, _train_one(job, stage, bases, adapter))
            processes.wait()  # the next stage starts from what the first process has written
        adapter = run.adapter(stage)
        if not run.result.usable:
            break

    # 8. Report.
    run.close()
    if run.is_main:
        _report(run.folder)
    return run.result


def _train_one(job: Job, stage: Stage, bases: list[ModelAndTokenizers], adapter: Path | None) -> StageResult:
    """One stage on the base in `bases`, which holds the only reference to it: one that was sharded is loaded anew."""
    if not bases:
        bases.append(_load(job.recipe, job.device, job.processes))
        bases[0].family.extensions.add(bases[0].model, job.setup.conditioning)
    result = train_stage(job, stage, bases[0], adapter)
    if job.sharded:  # this process has only a share of it
        bases.clear()
        gc.collect()
    return result


def _check_same_everywhere(
    processes: Processes, trained_on: Mapping[str, Any], store: CodeStore, base: ModelAndTokenizers
) -> None:
    """All processes: raises DataError where one has another store or base than the first one."""
    if processes.broadcast(trained_on) != trained_on:
        raise DataError(
            f"this process sees another store or base than the first one: {store.folder} and {base.checkpoint} must be "
            "the same on all machines, and no preparation may be running"
        )


def _check_evaluation(recipe: Recipe, store: CodeStore, judges: Judges) -> dict[str, str]:
    """The checksum of the recipe's sentences, whose measures are compared over all steps of a run.

    Raises DataError or ConfigError for texts that cannot be spoken or judged, or a rule without its measures.
    """
    if not recipe.evaluation.clips:
        return {}
    texts = texts_to_speak(recipe.evaluation, store)
    rule_of(recipe.evaluation, texts, store, judges)
    check_languages(judges, [text.language or only_language(store) for text in texts])
    if recipe.evaluation.texts is None:  # rows, which the store's checksum has
        return {}
    spoken = "\n".join(f"{text.text}|{text.reference_text}" for text in texts)
    return {"evaluation.texts": hashlib.sha256(spoken.encode()).hexdigest()}


def _report(folder: Path) -> None:
    """A page that cannot be written does not fail the run."""
    try:
        write_run_report(folder)
    except HiggstuneError as error:
        _LOG.warning("the run is finished; its report is missing: %s", error)


def _judges(recipe: Recipe, device: torch.device) -> Judges:
    settings = recipe.evaluation
    return load_judges(settings.asr, settings.speaker_judge, settings.quality_judge, device=str(device))


def _load(recipe: Recipe, device: torch.device, processes: Processes) -> ModelAndTokenizers:
    """The recipe's model on the device; where it will be sharded, on the CPU, so that no device holds all of it."""
    settings = recipe.model
    sharded = is_sharded_run(recipe, processes)
    return load_model_and_tokenizers(
        settings.checkpoint,
        codec=settings.codec,
        revision=settings.revision,
        dtype=choose_dtype(settings.dtype, device),
        device="cpu" if sharded else device,
        quantize=settings.quantize,
    )


@contextmanager
def _attribute_rank_failures(processes: Processes) -> Iterator[None]:
    """Raises WorkError in place of the error of a process that waited for one that has ended."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in _LOST)
        if processes.count == 1 or isinstance(error, HiggstuneError) or not lost:
            raise
        seen = str(error).splitlines()[0]
        raise WorkError(f"another process of this run has ended: its own error says why (seen here: {seen})") from error


def check_store(store: CodeStore, loaded: ModelAndTokenizers) -> None:
    """Raises DataError unless the store was encoded by the checkpoint's codec."""
    if store.info.codec_revision != loaded.audio_tokenizer.revision:
        raise DataError(
            f"{store.folder} was encoded by the codec {store.info.codec} (revision {store.info.codec_revision}); this "
            f"checkpoint uses {loaded.codec} (revision {loaded.audio_tokenizer.revision}): prepare the data "
            "with that codec, or name the store's codec in the recipe (model.codec)"
        )


def _first_adapter(recipe: Recipe, loaded: ModelAndTokenizers) -> Path | None:
    """The adapter that the first stage starts from. Raises CheckpointError where it was trained with another codec."""
    if recipe.init_adapter is None:
        return None
    folder = find_adapter(recipe.init_adapter)
    trained_with = adapter_card(folder).get("codec_revision")
    if trained_with not in (None, loaded.audio_tokenizer.revision):
        raise CheckpointError(
            f"init_adapter {folder} was trained on codes of another codec (revision {trained_with}) than "
            f"{loaded.codec} (revision {loaded.audio_tokenizer.revision})"
        )
    assert loaded.folder is not None
    check_tokenizer(folder, loaded.folder)
    check_merged_once(folder, loaded.folder)
    check_start(loaded.model, folder, recipe.lora)
    for doubt in doubts_of_card(folder, loaded.folder):
        _LOG.warning("%s", doubt)
    return folder


def _check_same_encoder(adapter: Path | None, setup: RunSetup) -> None:
    """Raises CheckpointError where the first adapter was trained with another Whisper encoder than the store's."""
    trained_with = None if adapter is None else adapter_conditioning(adapter).whisper
    now = setup.conditioning.whisper
    if trained_with is not None and now is not None and trained_with.revision != now.revision:
        raise CheckpointError(
            f"init_adapter {adapter} was trained with features of {trained_with.checkpoint} (revision "
            f"{trained_with.revision}), the store has those of {now.checkpoint} (revision {now.revision})"
        )


def _check_codebook_weights(recipe: Recipe, codebooks: int) -> None:
    for stage in recipe.stages:
        if stage.codebook_weights is not None and len(stage.codebook_weights) != codebooks:
            raise ConfigError(
                f"stage {stage.name} has {len(stage.codebook_weights)} codebook_weights, the checkpoint {codebooks} "
                "codebooks: give one weight for each"
            )


def _device(name: str) -> str:
    """Raises ConfigError for a GPU that `Trainer` would not take."""
    if name.startswith("cuda:") and name != "cuda:0":
        raise ConfigError(f"model.device: {name}: choose the GPU with CUDA_VISIBLE_DEVICES and say cuda")
    return name
