"""The benches measure equal work on both sides and write what they say; how fast it is, they say elsewhere."""

import functools
import importlib
import json
import statistics
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import HiggsAudioV2ForConditionalGeneration

from higgstune.batch.collate import count_tokens
from higgstune.batch.dataset import RowExamples
from higgstune.batch.packing import PackSize
from higgstune.data.store import CodeStore
from higgstune.families.higgs_v2.packed import HiggsAudioForTraining
from higgstune.generate.stack import Stack

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
BENCH = Path(__file__).resolve().parent.parent / "bench"
HERE: Any = {"repeats": 1, "threads": 1, "fresh": False}  # in this process


@pytest.fixture(autouse=True)
def _bench_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def bench(name: str) -> Any:
    return importlib.import_module(name)


def test_the_table_has_the_median_the_spread_and_the_ratio_of_what_ran_side_by_side() -> None:
    report = bench("report")
    row = report.Row("speed", [10, 20, 40], [30, 40, 40], "tokens/s")
    assert row.ratios == [3, 2, 1]
    table = report.table([row, report.Row("alone", None, [2000.4], "s")]).splitlines()
    assert table[2] == "| speed | tokens/s | 20 (10 to 40) | 40 (30 to 40) | 2 (1 to 3) |"
    assert table[3] == "| alone | s | - | 2,000 | - |"
    with pytest.raises(ValueError, match="zip"):
        _ = report.Row("uneven", [1, 2], [1], "s").ratios


def test_json_has_all_repeats_the_settings_and_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = bench("report")
    path = tmp_path / "out.json"
    report.finish("speed", [report.Row("a", [1, 2, 4], [2, 4, 4], "s")], Namespace(json=path, folder=tmp_path), more=3)
    assert "| a | s | 2 (1 to 4) | 4 (2 to 4) | 2 (1 to 2) |" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["rows"] == [{"name": "a", "unit": "s", "baseline": [1, 2, 4], "ours": [2, 4, 4], "ratio": 2}]
    assert (written["bench"], written["more"], written["settings"]["folder"]) == ("speed", 3, str(tmp_path))
    assert written["machine"]["cores"] >= 1
    assert written["machine"]["torch"]


@pytest.mark.processes
def test_a_fresh_process_has_a_memory_of_its_own_and_its_threads_are_set(tmp_path: Path) -> None:
    report = bench("report")
    ballast = np.ones(60_000_000)  # 480 MB, which a child's getrusage would begin with
    found = report.Case(report.machine).run()
    assert found["cores"] >= 1
    assert 5e6 < found["peak_bytes"] < ballast.nbytes / 2
    with pytest.raises(RuntimeError, match=r"report\.Case failed with exit status 1:(.|\n)*unexpected keyword"):
        report.Case(report.Case, {"no": 1}).run()


def test_both_sides_take_turns_and_must_do_the_same() -> None:
    report = bench("report")
    called = []

    def case(name: str, tokens: int) -> dict[str, Any]:
        called.append(name)
        with report.Meter() as meter:
            np.ones((300, 300)) @ np.ones((300, 300))
        return meter.found(tokens=tokens)

    cases = {name: report.Case(case, {"name": name, "tokens": 7}) for name in ("baseline", "ours")}
    found = report.alternate(cases, repeats=2, fresh=False)
    assert called == ["baseline", "ours"] * 2
    assert report.same_work(*found.values(), counted="tokens") == 7
    assert report.rates(found["ours"], "tokens") == [7 / one["cpu_seconds"] for one in found["ours"]]
    assert all(one["cpu_seconds"] > 0 for one in found["ours"])
    found["ours"][1]["tokens"] = 6
    with pytest.raises(ValueError, match=r"tokens is \[6, 7\]"):
        report.same_work(*found.values(), counted="tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and the manifests of the same 30 rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        stores = bench("stores")
        made: Path = tmp_path_factory.mktemp("bench") / "store-30"
        stores.write_as_earlier_trainers(stores.make_store(made, 30), made)
    return made


def test_both_data_sets_give_the_same_examples(folder: Path) -> None:
    stores = bench("stores")
    prompter = stores.demo_prompter()
    ours = RowExamples(CodeStore.open(folder).split("train"), prompter, "transcript")
    codes = np.concatenate([row.codes for row in ours.rows])
    assert len(np.unique(codes)) > 900  # random ones, of all 1024
    assert len({len(example) for example in map(ours.__getitem__, range(30))}) > 10  # unequal lengths
    for arrays in (False, True):
        theirs = stores.ManifestExamples(folder, prompter, arrays=arrays)
        assert len(theirs) == len(ours) == 30
        for i in range(30):
            for name in ("input_ids", "audio_input_ids", "text_labels", "audio_labels"):
                np.testing.assert_array_equal(getattr(theirs[i], name), getattr(ours[i], name))


def test_data_path(folder: Path) -> None:
    data_path = bench("data_path")
    found = {kind: data_path.passage(str(folder), kind) for kind in data_path.KINDS}
    assert len({(one["rows"], one["tokens"], one["labels"]) for one in found.values()}) == 1
    examples = RowExamples(CodeStore.open(folder).split("train"), bench("stores").demo_prompter(), "transcript")
    assert found["store"]["tokens"] == sum(len(examples[i]) for i in range(30)) == examples.lengths().sum()
    rows = data_path.measure(folder, 30, **HERE)
    assert {row.unit for row in rows} == {"rows/CPU-s", "tokens/CPU-s"}
    assert all(len(row.ratios) == 1 and row.ours[0] > 0 for row in rows)
    row = data_path.encoding_row(folder, seconds=0.4, size="small", **HERE)
    assert row.ratios[0] < 1


def test_training_that_waits_counts_its_own_steps(folder: Path) -> None:
    data_path = bench("data_path")
    found = [data_path.waiting(str(folder), kind, steps=2, tokens=800, layers=1) for kind in ("json", "store")]
    assert found[0]["tokens"] == found[1]["tokens"] > 800
    assert all(0 < one["waited_percent"] < 100 for one in found)
    examples = RowExamples(CodeStore.open(folder).split("train"), bench("stores").demo_prompter(), "transcript")
    packs = list(data_path.PackLoader(examples, PackSize(tokens=800), seed=0))
    assert found[0]["tokens"] == sum(count_tokens(pack) for pack in packs[1:3])


def test_codec() -> None:
    codec = bench("codec")
    rows, equal = codec.measure("small", 2, 0.4, **HERE)
    assert [row.baseline is None for row in rows] == [False, True, False, True]
    assert equal == {"encode": 100, "decode": 100}
    single, batch = (codec.higgs(together, "small", 3, 0.4) for together in (False, True))
    assert single["shape"] == batch["shape"] == [3, 10, 8]
    assert single["seconds"] == batch["seconds"] == pytest.approx(1.2)
    assert min(single["different"], batch["different"]) > 30  # codes follow the noise


def test_codec_sees_codes_that_a_batch_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = bench("codec")
    together = codec.encode_together
    monkeypatch.setattr(codec, "encode_together", lambda *given: together(*given)[:, ::-1])
    assert codec.higgs(True, "small", 2, 0.4)["encode_equal"] < 0.5


def test_generation_runs_the_model_as_often_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    generation = bench("generation")
    monkeypatch.setattr(generation, "shaped", lambda size: generation.small_config(scale=16, layers=1))
    native_class = generation.HiggsAudioV2ForConditionalGeneration
    forward, calls = native_class.forward, []

    @functools.wraps(forward)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    step = Stack.step
    monkeypatch.setattr(native_class, "forward", counted)
    monkeypatch.setattr(Stack, "step", lambda *args: (calls.append(1), step(*args))[1])
    numbers = []
    for side in (generation.native, generation.ours):
        calls.clear()
        found = side(frames=[5, 5], batch=2, size="mini", device="cpu", dtype="float32")
        assert found["frames"] == 10
        assert found["kinds"] > 20
        numbers.append(len(calls))
    # In the call that warms up and in the one that counts, ours reads the first row with the prompt, before all steps.
    assert numbers[0] - 4 == numbers[1] > 5
    rows = generation.measure([1], 4, size="mini", texts=3, adapters=2, **HERE)
    assert [row.unit for row in rows] == ["frames/CPU-s"] * 3
    assert all(row.ratios[0] > 0 for row in rows)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bench for a GPU, on a CPU: one step or two clips for each setting, nothing that waits."""
    module = bench("train_step_cuda")
    monkeypatch.setattr(module, "_STEPS", 1)
    monkeypatch.setattr(module, "_CLIPS", 2)
    return module


FAMILIES = ["higgs_audio_v2", "higgs_tts_3"]


@pytest.fixture
def small(gpu: Any, request: pytest.FixtureRequest) -> Any:
    """What it measures on: the family that a test is parametrized with, or the first."""
    subject = bench("subjects").SUBJECTS[getattr(request, "param", FAMILIES[0])]
    arguments = Namespace(clips=60, low=1.0, high=4.0, median=2.0, sigma=0.6, seed=0, rank=4, layers=2, repeats=2)
    return gpu.Bench(arguments, subject(64, 2), torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_is_of_the_same_clips_labels_and_loss(family: str) -> None:
    train_step = bench("train_step")
    settings = {
        "family": family, "scale": 64, "layers": 2, "clips": 6, "low": 1.0, "high": 3.0, "median": 2.0, "sigma": 0.6,
        "rank": 4, "seed": 0,
    }  # fmt: skip
    found = {
        "baseline": [train_step.baseline(order="random", batch_size=2, **settings)],
        "ours": [train_step.ours(batch_tokens=400, **settings)],
    }
    for counted in ("tokens", "text_labels", "audio_labels"):
        assert bench("report").same_work(*found.values(), counted=counted) > 0 or counted == "text_labels"
    classes = bench("subjects").SUBJECTS[family](64, 2).config.codebook_size
    chance = np.log(classes) * (8 if family == FAMILIES[0] else 1)
    assert train_step._same_loss(found) > 0.9 * chance
    found["ours"][0]["loss"] *= 1.001
    with pytest.raises(ValueError, match="do not compute the same loss"):
        train_step._same_loss(found)


@pytest.mark.parametrize("small", FAMILIES, indirect=True)
def test_the_bench_for_a_gpu_measures_and_reports_failures(
    gpu: Any, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "waits", lambda: {"plain": 0})
    found: dict[str, Any] = {"matrix_flops_per_second": 1e12}
    for part in gpu.measure(small, [400, 800], [400], [1, 2]):
        found |= part
        assert gpu.rows(found)  # what there is of it so far
    assert [name for name in found if "failed" in name] == ["4-bit base within 16 GB: failed"]  # no card to cut
    assert [one["batch_tokens"] for one in found["ours"]] == [400, 800]
    sides = [(one["order"], one["batch_size"]) for one in found["baseline"]]
    assert sides == [("random", 1), ("random", 2), ("grouped", 2)]  # one clip alone is of no order
    rows = {row.name: row for row in gpu.rows(found)}
    fastest = max(map(statistics.median, map(gpu.rates, found["ours"])))
    side = [gpu.rates(one) for one in found["baseline"] if one["order"] == "random"]
    (random,) = (row for name, row in rows.items() if name.startswith("random, batch"))
    assert (len(random.ours), statistics.median(random.ours)) == (2, fastest)
    assert statistics.median(random.baseline) == max(map(statistics.median, side))
    assert rows["packs of 400, plain layers and plain again"].baseline is not None
    assert rows["packs of 800, plain layers and plain again"].baseline is None
    assert rows["calls that wait for the device, in a step, plain layers"].ours == [0]


def test_nothing_that_fits_is_a_failure(gpu: Any, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "_measured", lambda *_: None)
    monkeypatch.setattr(small, "waits", lambda: {"plain": 0})
    found = {name: value for part in gpu.measure(small, [400], [400], [1]) for name, value in part.items()}
    assert "does not fit" in found["ours: failed"]
    assert "does not fit" in found["baseline: failed"]


def test_both_sides_on_a_gpu_train_on_each_batch_once_in_a_repeat(
    gpu: Any, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    for model in (HiggsAudioV2ForConditionalGeneration, HiggsAudioForTraining):
        forward = model.forward

        def counted(self: Any, *args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            calls.append(1)
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(small, "_planned", lambda _: 0)  # its dry run has the same forward pass
    ran_before_and_measured = 1 + small.repeats
    (ours,) = small.ours([400], compiled=False)
    assert len(calls) == ran_before_and_measured
    assert _moved(small.model)
    (pack,) = small._packs(400, 1)
    assert ours["tokens"] == small.lengths[pack].sum()
    calls.clear()
    (native,) = small.baseline([2])[:1]
    (batch,) = small._padded("random", 2)
    assert len(calls) == 2 * ran_before_and_measured  # in random order and grouped
    assert _moved(small.model)
    assert native["tokens"] == small.lengths[batch].sum()


def _moved(model: Any) -> bool:
    """Whether every B has left its start of zero."""
    return all(weight.any() for name, weight in model.named_parameters() if "lora_B" in name)


def test_batches_of_the_baseline_on_a_gpu_are_like_those_of_an_epoch(gpu: Any, small: Any) -> None:
    whole = small._padded("random", 20)[:1]
    random, grouped = (small._padded(order, 6) for order in ("random", "grouped"))
    for batches in (whole, random, grouped):
        assert small.lengths[batches[0]].max() == small.lengths.max()  # what fits with it fits an epoch
    assert np.ptp(small.lengths[grouped[0]]) < 0.5 * np.ptp(small.lengths[random[0]])


@pytest.mark.parametrize("small", FAMILIES, indirect=True)
def test_products_are_counted_by_hand(gpu: Any, small: Any) -> None:
    model, _ = small._packed_step()
    config = small.config
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    attention = config.hidden_size * config.head_dim * (heads + config.num_attention_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    batch = {"audio_targets": torch.zeros(5, 8), "text_targets": torch.zeros(3)}
    heads_of_labels = config.hidden_size * (5 * 8 * config.codebook_size + 3 * config.vocab_size)
    assert gpu.matrix_products(model, batch, 10) == 2 * layer * 10 + heads_of_labels


def test_waits_are_those_that_pytorch_warns_of(gpu: Any) -> None:
    with gpu.counted_waits() as seen:
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert seen == ["called a synchronizing CUDA operation"]


def test_a_small_card_computes_all_layers_again_on_a_4_bit_base(
    gpu: Any, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Namespace(total_memory=64e9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    found = small.small_card()
    assert limits == [0.25, 1.0]
    assert found["tokens"] > 6 * 4 * 15 * 25  # six packs of four clips of 15 s
    layers = small.model.get_base_model().model.layers
    assert all(layer.gradient_checkpointing for layer in layers)
    assert {type(layer.mlp.up_proj.base_layer).__name__ for layer in layers} == {"Linear4bit"}


@pytest.mark.processes
def test_a_plan_is_near_to_what_training_takes(tmp_path: Path) -> None:
    planning = bench("planning")
    setting = planning.RunSetup(16, 2, 512, 4, accumulation=2)
    assert setting.name == "width / 16, 2 layers, full, packs of 512, r 4, accumulation 2"
    plan, run = planning.measure(setting, tmp_path)
    assert run["steps"] == planning.STEPS
    assert 0.85 < plan["planned"] / run["peak_bytes"] < 1.15


def test_growth(tmp_path: Path) -> None:
    growth = bench("growth")
    curves = growth.measure_training(lengths=[1, 2], counts=[1, 3], tokens=150, scale=16, layers=1, **HERE)
    curves |= growth.measure_store(tmp_path, [20, 40], most=30, **HERE)
    assert set(curves) == {"clip", "token", "examples", "opening", "lengths", "plan", "pass", "memory", "codes"}
    assert list(curves["examples"]) == [1, 3]
    assert sum(len(row.codes) * 16 for row in CodeStore.open(tmp_path / "store-40")) == curves["codes"][40][0]
    growth.draw(curves, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    rows = growth.rows_of(curves)
    assert len(rows) == 7
    (tmp_path / "growth.json").write_text(json.dumps({"curves": curves}))
    assert growth.earlier_curves(tmp_path / "growth.json") == curves


def test_slopes_of_growth() -> None:
    growth = bench("growth")
    assert growth.slope({1: [2, 2, 9], 10: [20], 100: [200]}) == pytest.approx(1)
    assert growth.slope({1: [1], 10: [100]}) == pytest.approx(2)
    (row,) = growth.rows_of({"plan": {10: [1.0], 100: [30.0]}})
    assert (row.baseline, row.ratios) == ([10.0], [3.0])


@pytest.mark.parametrize("name", ["train_step", "data_path", "codec", "generation", "growth", "planning"])
def test_help_has_an_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        bench(name).main()
    assert f"example: python bench/{name}.py" in capsys.readouterr().out
