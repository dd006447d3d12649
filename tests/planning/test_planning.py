"""The plan of a run: memory of dry runs, packs, steps, options, and how training uses it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command
from peft import PeftModel
from planning_world import ROWS, make_world, recipe
from tiny_checkpoint import tiny_config, tiny_model, tiny_tokenizer

import higgstune
from higgstune.batch.collate import Packed, pack
from higgstune.batch.packing import PackSampler
from higgstune.config.recipe import Lora, Recipe
from higgstune.errors import ConfigError, Interrupted, TrainingError
from higgstune.families.base import Conditioning
from higgstune.families.higgs_v2.extensions import add_conditioning
from higgstune.families.higgs_v2.packed import with_training_forward
from higgstune.kernels.loss import LossWeights, combine, label_counts
from higgstune.kernels.memory import checkpoint_first
from higgstune.model.adapters import add_lora
from higgstune.model.load import load_model
from higgstune.planning.dry_run import ADAPTER, StepSpec, Tracker, dry_run
from higgstune.planning.plan import Footprint, Planner, fewest
from higgstune.planning.run_memory import RunMemory
from higgstune.planning.speed import Speed
from higgstune.planning.suggestions import _ranks, _smaller_packs, options
from higgstune.planning.survey import Machine, _peak_candidates, parse_memory, row_examples
from higgstune.training import run as training_run
from higgstune.training import stage as training_stage
from higgstune.training.trainer import HiggsAudioTrainer
from higgstune.training.verify import Verification

EIGHT = torch.float64.itemsize


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a store."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def planner(world: Path) -> Planner:
    """A planner with more memory than it needs."""
    return Planner(recipe(world), Machine("cpu", 10**12, available=True))


@pytest.fixture
def parts(planner: Planner) -> tuple[StepSpec, Packed]:
    """Arguments of `dry_run`."""
    footprint = planner.footprints(planner.recipe, planner.recipe.stages[0])[0]
    return footprint.spec, footprint.pack


def test_what_is_alive_is_counted_by_kind_and_segment() -> None:
    with Tracker() as tracker:
        tracker.begin("first", "kept")
        kept = torch.zeros(100, dtype=torch.float64)
        view = kept[:10]
        tracker.begin("second", "moving")
        passing = torch.zeros(1000, dtype=torch.float64)
        del passing
        other = kept + 1
    assert tracker.peaks["first"] == Counter(kept=100 * EIGHT)
    assert tracker.peaks["second"] == Counter(kept=100 * EIGHT, moving=1000 * EIGHT)
    assert tracker.alive == Counter(kept=100 * EIGHT, moving=100 * EIGHT)
    del kept
    assert tracker.alive["kept"] == 100 * EIGHT  # a view holds the storage
    del view, other
    assert not any(tracker.alive.values())


def training_step(model: PeftModel, batch: Packed) -> torch.Tensor:
    sums = model(**batch)
    counts = label_counts(batch, eos_id=model.config.audio_stream_eos_id)  # type: ignore[union-attr]
    loss = combine(sums, counts, LossWeights())
    loss.backward()
    return loss


@pytest.mark.parametrize("recomputed", [0, 2])
def test_a_dry_run_takes_what_the_real_step_takes(world: Path, parts: tuple[StepSpec, Packed], recomputed: int) -> None:
    spec, batch = parts
    base = load_model(world / "base", dtype="float32", device="cpu")
    with_training_forward(base)
    model = add_lora(base, spec.lora, "full").train()
    checkpoint_first(base.model.layers, recomputed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    with Tracker() as tracker:
        for tensor in (*model.parameters(), *model.buffers()):
            tracker.count(tensor, "model")
        for _ in range(2):  # in the second step the optimizer's moments are there
            tracker.peaks.clear()
            training_step(model, batch)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    real = max(peak.total() for peak in tracker.peaks.values())
    counted = max(peak.total() for peak in dry_run(spec, batch, (recomputed, 2 - recomputed)).values())
    assert counted == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize(("recomputed", "kept"), [(0, 4), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_outside_the_dry_run_add_what_the_others_did(
    parts: tuple[StepSpec, Packed], recomputed: int, kept: int, dtype: torch.dtype
) -> None:
    spec, batch = replace(parts[0], dtype=dtype), parts[1]
    whole = dry_run(spec, batch, (recomputed, kept))
    inferred = Footprint(spec, batch).segments(recomputed, kept)
    assert max(v.total() for v in inferred.values()) == pytest.approx(max(v.total() for v in whole.values()), rel=1e-3)


@pytest.mark.parametrize("attention", ["lora", "full"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_adapter_is_counted_as_it_is(parts: tuple[StepSpec, Packed], attention: Any, dora: bool) -> None:
    model, lora = tiny_model(tiny_config(tiny_tokenizer())), Lora(r=4, dora=dora)
    conditioning = Conditioning(audio_attention=True)
    add_conditioning(model, conditioning)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.audio_attn.o_proj.weight)  # a direction for DoRA
    spec = replace(
        parts[0], config=model.config, lora=lora, trained=conditioning, attention=attention, dtype=torch.bfloat16
    )
    counted = dry_run(spec, parts[1], (0, 2))["forward"][ADAPTER]
    peft_model = add_lora(model, lora, "full", attention=attention)
    assert counted == 4 * sum(weight.numel() for weight in peft_model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("dora", [False, True])
def test_four_bits_take_less(parts: tuple[StepSpec, Packed], dora: bool) -> None:
    spec = replace(parts[0], lora=Lora(r=4, dora=dora))
    whole = dry_run(spec, parts[1], (0, 2))["forward"]
    less = dry_run(replace(spec, quantize="4bit"), parts[1], (0, 2))["forward"]
    config = parts[0].config
    heads = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    linear = 2 * config.hidden_size * (heads + 6 * config.intermediate_size)
    assert whole["weights"] - less["weights"] == pytest.approx(linear * (4 - 0.516), rel=0.02)
    assert whole[ADAPTER] == less[ADAPTER]


@pytest.mark.parametrize("recomputed", [1, 2])
def test_recomputed_layers_change_no_bit(world: Path, parts: tuple[StepSpec, Packed], recomputed: int) -> None:
    def gradients(count: int) -> list[torch.Tensor]:
        base = load_model(world / "base", dtype="float32", device="cpu")
        with_training_forward(base)
        torch.manual_seed(0)
        model = add_lora(base, parts[0].lora, "full").train()
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.02)  # B starts at zero, and A would have no gradient
        checkpoint_first(base.model.layers, count)
        loss = training_step(model, parts[1])
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    kept, with_recomputing = gradients(0), gradients(recomputed)
    assert len(kept) == 1 + 2 * 2 * 10
    assert all(torch.equal(a, b) for a, b in zip(kept, with_recomputing, strict=True))


def test_a_signal_during_planning_ends_the_run(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Any) -> Any:
        raise Interrupted(15)

    monkeypatch.setattr("higgstune.planning.run_memory.machine_for", interrupted)
    with pytest.raises(Interrupted):
        RunMemory(recipe(world))


@pytest.mark.processes
def test_packs_and_steps_are_those_of_the_trainer(
    planner: Planner, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = Verification("float32", 1e-5, 0.0, 1.0)
    monkeypatch.setattr(training_stage, "verify_in_fresh_process", lambda **_: proof)  # it has tests of its own
    changed = recipe(world, stage={"gradient_accumulation": 2, "batch_tokens": 700})
    planned = planner.plan(changed).stages[0]
    assert planned.packs * planned.tokens_per_pack == pytest.approx(planned.tokens)
    assert planned.max_tokens_per_pack <= 700
    result = higgstune.train(changed, tmp_path / "run")
    assert result.stages["voice"].steps == planned.steps == 2 * planned.steps_per_epoch


def test_auto_takes_the_fewest_layers(world: Path, planner: Planner) -> None:
    auto = recipe(world, gradient_checkpointing="auto")
    stage = auto.stages[0]
    peaks = [planner.peak(auto, stage, recomputed) for recomputed in range(3)]
    assert peaks[0] > peaks[1] > peaks[2]
    for recomputed in (0, 1):
        tight = Planner(auto, Machine("cpu", int(peaks[recomputed] / 0.95) + 2, available=True), survey=planner.survey)
        tight.process = planner.process
        planned = tight.plan().stages[0]
        assert (planned.checkpointed, planned.peak) == (recomputed, peaks[recomputed])
    assert fewest(lambda recomputed: 10 - recomputed, 4, room=8) == 2
    assert fewest([9, 5, 6].__getitem__, 2, room=1) == 1  # none fits: the one that needs least


def large_recipe(world: Path) -> Recipe:
    model = {"checkpoint": str(world / "base"), "device": "cpu", "dtype": "bfloat16"}
    return recipe(world, model=model, stage={"batch_tokens": 2400}, lora={"r": 64, "alpha": 64})


def test_options_keep_the_clips_of_a_step_and_the_scaling_of_an_adapter(world: Path, planner: Planner) -> None:
    lora = {"r": 64, "alpha": 64, "rslora": True}
    made = recipe(world, stage={"batch_tokens": None, "batch_size": 15, "gradient_accumulation": 2}, lora=lora)
    variants = [variant.recipe for variant in (*_smaller_packs(planner, made), *_ranks(made))]
    steps = [(stage.batch_size, stage.gradient_accumulation) for stage in (variant.stages[0] for variant in variants)]
    assert {(5, 6), (3, 10), (1, 30)} <= set(steps)
    assert {batch * accumulation for batch, accumulation in steps} == {30}
    scalings = [variant.lora.alpha / variant.lora.r**0.5 for variant in variants]
    assert scalings == pytest.approx([8] * len(variants))
    assert {variant.lora.r for variant in variants} == {64, 32, 16, 8, 4}


@pytest.mark.processes
def test_options_fit_and_keep_the_tokens_of_a_step(world: Path, planner: Planner) -> None:
    big = large_recipe(world)
    tight = Planner(big, Machine("cuda", 10**12, available=False), survey=planner.survey)
    room = int(0.9 * tight.plan().peak)
    found = options(tight, room=room)
    assert len(found) == 3
    assert [option.time for option in found] == sorted(option.time for option in found)
    for option in found:
        assert tight.plan(option.recipe).peak == option.peak <= room
        stage = option.recipe.stages[0]
        if "batch_tokens" in option.change:
            assert stage.pack_size.tokens is not None
            assert stage.pack_size.tokens * stage.gradient_accumulation == 2400
    assert options(tight, room=1000) == []


def test_options_differ_where_checkpointing_is_on_already(world: Path, planner: Planner) -> None:
    big = large_recipe(world).model_copy(update={"gradient_checkpointing": True})
    tight = Planner(big, Machine("cuda", 10**12, available=False), survey=planner.survey)
    changes = [option.change for option in options(tight, room=int(0.9 * tight.plan().peak))]
    assert len(set(changes)) == len(changes) == 3


def test_loading_needs_the_weights_and_on_a_cpu_the_copied_file(world: Path, planner: Planner) -> None:
    def loading(kind: Any, dtype: Any) -> tuple[int, int]:
        plan = recipe(world)
        plan = plan.model_copy(update={"model": plan.model.model_copy(update={"dtype": dtype})})
        made = Planner(plan, Machine(kind, 10**12, available=kind == "cpu"), survey=planner.survey)
        (stage,) = made.plan().stages
        return stage.loading - made.process - made.codec, stage.memory["weights"]

    mapped, weights = loading("cpu", "float32")
    assert mapped == weights
    copied, halved = loading("cpu", "bfloat16")
    assert halved < 0.6 * weights
    assert copied == halved + sum(planner.survey.files.values())
    on_a_gpu, weights = loading("cuda", "float32")
    assert on_a_gpu == weights + 40_000_000  # cuBLAS


def test_the_dry_run_of_a_validation_has_its_own_pack(planner: Planner, parts: tuple[StepSpec, Packed]) -> None:
    spec, large = parts
    rows = row_examples(planner.survey, planner.recipe.stages[0], "train")
    small = pack([rows[0], rows[1]])
    layers = spec.config.num_hidden_layers
    assert "validation" not in Footprint(spec, small).segments(0, layers)
    with_small, with_large = (Footprint(spec, small, other).segments(0, layers) for other in (small, large))
    assert with_large["validation"].total() > with_small["validation"].total()
    assert with_large["heads"] == with_small["heads"]


def test_seconds_of_a_step_add_up() -> None:
    speed = Speed(layer=1.0, layer_recomputed=2.0, outside=10.0, optimizer=100.0)
    assert speed.step(3, layers=4, checkpointed=1, passes=2) == 2 * 3 * (10 + 3 * 1 + 2) + 4 * 100


def command_recipe(folder: Path, plan: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(plan.model_dump(mode="json")))  # JSON is YAML
    return path


@pytest.mark.processes
def test_progress_is_reported_by_stage(world: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    higgstune.plan(recipe(world), memory="16GB", progress=lambda *call: calls.append(call))
    assert calls == [("planning stages", 1, 1), ("timing stages", 1, 1)]


def test_plan_on_the_command_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("higgstune.model.load._load", refuse)
    command, path = Command(capsys), command_recipe(tmp_path, recipe(world))
    code, out, err = command("train", path, "--plan", "--json")
    found = json.loads(out)
    assert "planning" not in err
    assert (code, found["fits"], found["options"]) == (0, True, [])
    (stage,) = found["stages"]
    assert sum(stage["memory"].values()) == stage["peak"] == found["peak"]
    assert stage["tokens_per_second"] > 0
    assert stage["seconds"] == pytest.approx(stage["steps"] * stage["tokens_per_pack"] / stage["tokens_per_second"])
    code, out, err = command("train", path, "--plan", "--memory", "1MB", "--set", "report_to=wandb")
    assert code == 1
    assert "warning: report_to names wandb, whose library wandb is not installed on this machine" in err
    assert "planning stages 1/1" in err
    assert "It does not fit" in out
    code, out, _ = command("train", path, "--plan", "--device", "cuda", "--memory", "16GB", "--json")
    assert code == 0
    assert json.loads(out)["peak"] < 200_000_000  # no interpreter in it
    for wrong in (("--memory", "much"), ("--device", "tpu"), ("--set", "data.store=nowhere")):
        assert command("train", path, "--plan", *wrong)[0] == 2
    assert command("train", path, "--memory", "1GB", "--out", tmp_path / "run")[0] == 2
    assert command("train", path)[0] == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
def test_out_of_memory_names_what_would_fit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def step(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    big = large_recipe(world)
    peak = Planner(big, Machine("cuda", 10**12, available=False)).plan().peak
    monkeypatch.setattr(HiggsAudioTrainer, "training_step", step)
    monkeypatch.setattr(
        "higgstune.planning.run_memory.machine_for", lambda _: Machine("cuda", int(0.9 * peak), available=False)
    )
    with pytest.raises(
        TrainingError, match=r"(?s)stage voice ran out of memory \(CUDA out of memory\).*fastest first:"
    ) as raised:
        training_run.train(big, tmp_path / "run")
    lines = str(raised.value).splitlines()
    assert len([line for line in lines if line.startswith("  ")]) == 3
    assert "gradient_checkpointing: " in str(raised.value)
    assert "may not fit" in caplog.text


def test_out_of_memory_is_reported_where_nothing_can_be_planned(
    world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory = RunMemory(large_recipe(world))

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("higgstune.planning.run_memory.options", broken)
    expected = pytest.raises(TrainingError, match=r"(?s)ran out of memory \(gone\).*Use gradient_checkpointing: true")
    with expected, memory.explain_out_of_memory(memory.recipe.stages[0]):
        raise torch.OutOfMemoryError("gone")
    assert "shapes do not fit" in caplog.text


@pytest.mark.parametrize(("text", "size"), [("16GB", 16 * 10**9), ("1.5 GiB", 3 * 2**29), ("800mb", 8 * 10**8)])
def test_memory_is_read(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "16XB", "-1GB", "0GB", "16", "16 G B", "nan"])
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory"):
        parse_memory(text)


def test_rows_are_all_in_packs(planner: Planner) -> None:
    packs = planner.packs(planner.recipe, planner.recipe.stages[0])
    assert packs is not None
    assert sorted(i for indices in packs.packs for i in indices) == list(range(ROWS))


@pytest.mark.processes
def test_no_pack_of_any_epoch_takes_more_than_planned(world: Path) -> None:
    made = recipe(world, stage={"batch_tokens": 1500, "epochs": 4})
    planner, stage = Planner(made, Machine("cpu", 10**12, available=True)), made.stages[0]
    rows = row_examples(planner.survey, stage, "train")
    spec, lengths = planner.spec(made, stage), rows.lengths()
    sampler = PackSampler(lengths, stage.pack_size, seed=made.seed)
    every = {tuple(sorted(indices)) for epoch in range(4) for indices in sampler.packs(epoch)}
    assert len(every) > 6
    most = max(Footprint(spec, pack([rows[i] for i in indices])).peak(0).total() for indices in every)
    planned = max(footprint.peak(0).total() for footprint in planner.footprints(made, stage))
    assert 0.98 * most <= planned <= 1.02 * most  # a validation is in the plan, too


def test_peak_candidates_by_hidden_states_and_saved_probabilities() -> None:
    lengths = np.array([100] * 12 + [600, 580] + [400, 400, 310])
    many, long, short = list(range(12)), [12, 13], [14, 15, 16]
    for packs in ([many, long, short], [short, long, many]):
        assert _peak_candidates(packs, lengths, 30, 0) == [long]
        assert _peak_candidates(packs, lengths, 30, 1e-3) == [short, long]
        assert _peak_candidates(packs, lengths, 0, 0) == [many]
    assert _peak_candidates([many, [14, 15]], lengths, 90, 0) == [[14, 15], many]  # more tokens
