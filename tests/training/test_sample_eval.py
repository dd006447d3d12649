"""Samples of a stage while it is trained: saved and measured, and the stage ends with the best step."""

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judging import answering
from on_cpu import CPU
from processes import Together
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_judges import save_tiny_asr
from trainers import loaded_and_prompter
from training_world import (
    adapter,
    assert_identical,
    assert_same,
    history,
    make_world,
    shared_recipe,
    train_unproven,
    train_with_signal,
)

from higgstune.config.recipe import Lora, Recipe
from higgstune.errors import ConfigError
from higgstune.evaluation.clips import read_clips
from higgstune.evaluation.evaluate import evaluate
from higgstune.evaluation.report.run_report import write_run_report
from higgstune.families.higgs_v2.decoder import Decoder
from higgstune.families.sampling import Sampling
from higgstune.generate.speaker import Speaker
from higgstune.generate.speech import Request
from higgstune.model.adapters import add_lora
from higgstune.training.distributed import Processes, shard

pytestmark = pytest.mark.processes

STEP = "higgstune.training.trainer:HiggsAudioTrainer.training_step"
EARLIEST = {"gates": [], "rank": "-step"}  # so that the best is never the last


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def samples_recipe(world: Path, processes: int = 1, steps: int = 6, stages: int = 1, **evaluation: Any) -> Recipe:
    """Speaks short texts after steps 2, 4 and 6 of each stage, or of the last one; saves at them, too."""
    (world / "texts.txt").write_text("Hi.\nNo.\n")
    made = shared_recipe(
        world, processes, eval_steps=2, save_steps=2, save_total_limit=9,
        evaluation={"clips": 2, "temperature": 0.7, "texts": str(world / "texts.txt"), **evaluation},
    )  # fmt: skip
    kept = tuple(stage.model_copy(update={"max_steps": steps}) for stage in made.stages[-stages:])
    return made.model_copy(update={"stages": kept})


@pytest.fixture(scope="module")
def chosen(world: Path) -> Path:
    """A run that ends with the first evaluated step, in both stages."""
    made = samples_recipe(world, stages=2, **EARLIEST)
    Together(world / "logs-chosen", 1, train_unproven, made, world / "chosen").succeeded()
    return world / "chosen"


def test_every_validation_leaves_clips_with_measures(chosen: Path) -> None:
    places = sorted((chosen / "stage2" / "samples").glob("step-*"))
    assert [place.name for place in places] == ["step-000000", "step-000002", "step-000004", "step-000006"]
    for place in places:
        clips = read_clips(place)
        assert len(clips) == 2
        assert [clip.seed for clip in clips] == [clip.seed for clip in read_clips(places[0])]
        assert len({clip.seed for clip in clips}) == 2  # draws of two texts are independent
        assert all(clip.hit_cap is not None and clip.text for clip in clips)
        assert (place / "mel.png").stat().st_size > 1000
        rows = json.loads((place / "evaluation.json").read_text())["clips"]
        assert [row["id"] for row in rows] == [clip.id for clip in clips]
    measured = [entry for entry in history(chosen) if "eval_cap_rate" in entry]
    assert [entry["step"] for entry in measured] == [0, 2, 4, 6]
    assert all(entry["eval_sample_seconds"] > 0 and "eval_audio_loss_7" in entry for entry in measured)


def test_what_is_spoken_changes_with_the_adapter_alone(chosen: Path) -> None:
    first, second, later = (
        (chosen / stage / "samples" / step / "01.wav").read_bytes()
        for stage, step in (("stage1", "step-000002"), ("stage2", "step-000000"), ("stage2", "step-000006"))
    )
    assert first == second  # stage 2 starts from the step that stage 1 has chosen
    assert first != later


def test_tensorboard_has_audio_and_spectrograms(chosen: Path) -> None:
    events = EventAccumulator(str(chosen / "stage2" / "tensorboard"), size_guidance={"audio": 0, "images": 0})
    events.Reload()
    assert [event.step for event in events.Audio("speech/1")] == [0, 2, 4, 6]
    assert events.Images("speech/mel")
    assert "eval/cap_rate" in events.Tags()["scalars"]


def test_a_stage_ends_with_the_best_step(chosen: Path) -> None:
    for stage in ("stage1", "stage2"):
        then = load_file(chosen / stage / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
        last = load_file(chosen / stage / "checkpoints" / "checkpoint-6" / "adapter_model.safetensors")
        saved = adapter(chosen, stage)
        assert saved.keys() == then.keys()
        assert all(torch.equal(saved[key], then[key]) for key in saved)
        assert not all(torch.equal(saved[key], last[key]) for key in saved)
    choice = json.loads((chosen / "run.json").read_text())["stages"]["stage2"]["chosen"]
    assert (choice["step"], choice["rule"]) == (2, "the highest -step")
    assert [candidate["step"] for candidate in choice["candidates"]] == [2, 4, 6]


def test_the_report_names_the_step_and_plays_its_samples(chosen: Path) -> None:
    page = write_run_report(chosen).read_text(encoding="utf-8")
    assert "stage2, step 2" in page
    assert page.count("<audio") == 8  # two stages, at their start and at the chosen step


def test_samples_change_nothing_of_training(world: Path, tmp_path: Path) -> None:
    """Also with dropout, they draw no random number from training; and `choose: last` keeps the last step."""
    made = samples_recipe(world, choose="last").model_dump(mode="json")
    made["lora"]["dropout"] = 0.1
    silent = made | {"evaluation": {"clips": 0}}
    for name, tree in (("spoken", made), ("silent", silent)):
        out = tmp_path / name
        Together(tmp_path / f"logs-{name}", 1, train_unproven, Recipe.model_validate(tree), out).succeeded()
    spoken, silent = adapter(tmp_path / "spoken"), adapter(tmp_path / "silent")
    assert all(torch.equal(spoken[key], silent[key]) for key in spoken)


def test_patience_ends_a_stage(world: Path, tmp_path: Path) -> None:
    made = samples_recipe(world, steps=20, patience=1, **EARLIEST)
    Together(tmp_path / "logs", 1, train_unproven, made, tmp_path / "run").succeeded()
    stages = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
    assert [(stage["steps"], stage["chosen"]["step"]) for stage in stages.values()] == [(4, 2)]


@pytest.mark.parametrize(
    ("at", "nth"),
    [
        (STEP, 17),  # of four a step: in the first stage, behind the checkpoint of its fourth step
        ("higgstune.training.trainer:HiggsAudioTrainer.take_best", 1),
        ("higgstune.training.sample_eval:mel_image", 6),  # in the second stage
    ],
    ids=["a step", "the choice", "samples"],
)
def test_killed_it_resumes_to_the_same_choice(world: Path, chosen: Path, tmp_path: Path, at: str, nth: int) -> None:
    made, out = samples_recipe(world, stages=2, **EARLIEST), tmp_path / "run"
    killed = Together(tmp_path / "killed", 1, train_with_signal, made, out, signal.SIGKILL, at, nth)
    assert killed.exit_codes() == [-signal.SIGKILL], killed.log()
    left = sorted(out.glob("stage*"))[-1] / "samples" / "01.wav.999999999.tmp"  # as of a process that is gone
    left.write_bytes(b"RIFF")
    Together(tmp_path / "resumed", 1, train_unproven, made, out, True).succeeded()
    assert not left.exists()
    assert_identical(out, chosen)
    found, expected = (
        json.loads((run / "run.json").read_text())["stages"]["stage1"]["chosen"] for run in (out, chosen)
    )
    assert found == expected


def test_a_stage_that_patience_has_ended_is_not_trained_on(world: Path, tmp_path: Path) -> None:
    made, out = samples_recipe(world, steps=20, patience=1, **EARLIEST), tmp_path / "run"
    at = "higgstune.training.trainer:HiggsAudioTrainer.take_best"
    killed = Together(tmp_path / "killed", 1, train_with_signal, made, out, signal.SIGKILL, at, 1)
    assert killed.exit_codes() == [-signal.SIGKILL], killed.log()
    Together(tmp_path / "resumed", 1, train_unproven, made, out, True).succeeded()
    stages = json.loads((out / "run.json").read_text())["stages"]
    assert [(stage["steps"], stage["chosen"]["step"]) for stage in stages.values()] == [(4, 2)]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_speak_and_choose_the_same(world: Path, chosen: Path, tmp_path: Path, parallel: str) -> None:
    made = samples_recipe(world, 2, stages=2, **EARLIEST).model_copy(update={"parallel": parallel})
    Together(tmp_path / "logs", 2, train_unproven, made, tmp_path / "run").succeeded()
    assert_same(tmp_path / "run", chosen)


def speak_with_unequal_logits(out: Path) -> None:
    """One sharded model, of which the second process sees other logits than the first."""
    processes = Processes(cpu=True)
    loaded, _ = loaded_and_prompter()
    model = add_lora(loaded.model, Lora(r=4), "full")
    shard(model, torch.device("cpu"))
    plain = Decoder.step

    def perturbed(self: Decoder, rows: torch.Tensor) -> torch.Tensor:
        logits = plain(self, rows)
        return logits.flip(-1) if processes.rank else logits

    Decoder.step = perturbed  # type: ignore[method-assign]
    [speech] = Speaker(loaded, model=model.eval()).speak_all(
        [Request("Hi.")], sampling=Sampling(temperature=1.0), max_seconds=0.4, sync_logits=processes.broadcast
    )
    np.save(out / f"{processes.rank}.npy", speech.waveform)


def test_a_sharded_model_speaks_the_same_codes_in_all_processes(tmp_path: Path) -> None:
    Together(tmp_path / "logs", 2, speak_with_unequal_logits, tmp_path).succeeded()
    first, second = (np.load(tmp_path / f"{rank}.npy") for rank in range(2))
    assert len(first) > 0
    assert np.array_equal(first, second)


def test_a_language_that_the_judge_does_not_support_is_refused_before_training(world: Path, tmp_path: Path) -> None:
    save_tiny_asr(tmp_path / "english", multilingual=False)
    made = samples_recipe(world, texts="de", asr=str(tmp_path / "english"))
    with pytest.raises(ConfigError, match="does not support the language 'de', it supports English only"):
        train_unproven(made, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    with pytest.raises(ConfigError, match="does not support the language 'de'"):
        evaluate(world / "base", texts="de", asr=str(tmp_path / "english"), out=tmp_path / "out", base=CPU)
    assert not (tmp_path / "out").exists()


def test_judges_measure_what_is_spoken(world: Path, tmp_path: Path) -> None:
    asr = answering(tmp_path, "asr", "'text': 'nothing like it'")
    speaker = answering(tmp_path, "speaker", "'voices': 0.5")
    made = samples_recipe(world, clips=1, texts=None, asr=asr, speaker_judge=speaker, gates=["wer < 0.1"])
    Together(tmp_path / "logs", 1, train_unproven, made, tmp_path / "run").succeeded()
    [measured, *_] = [entry for entry in history(tmp_path / "run") if entry["step"] == 6 and "eval_wer" in entry]
    assert measured["eval_wer"] >= 0.9
    assert measured["eval_recording_wer"] == measured["eval_wer"]
    assert measured["eval_similarity"] == 0.5
    choice = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["stage2"]["chosen"]
    assert (choice["healthy"], choice["step"]) == (False, 6)
    assert choice["candidates"][0]["broken"] == ["wer < 0.1"]
    log = (tmp_path / "logs" / "0.log").read_text()
    assert "no evaluated step meets all conditions" in log


def test_a_judge_that_fails_does_not_end_training(world: Path, tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("import sys; sys.exit('out of memory')")
    made = samples_recipe(world, asr=f"{sys.executable} {script}")
    Together(tmp_path / "logs", 1, train_unproven, made, tmp_path / "run").succeeded()
    log = (tmp_path / "logs" / "0.log").read_text()
    assert "the samples were not measured" in log
    assert "out of memory" in log


def test_without_validation_rows_training_texts_are_spoken(world: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(world / "data", data)
    index = json.loads((data / "store.json").read_text())
    index["shards"] = [shard for shard in index["shards"] if shard["split"] == "train"]
    index["info"]["rows"]["validation"] = 0
    (data / "store.json").write_text(json.dumps(index))
    made = samples_recipe(world, texts=None).model_dump(mode="json")
    made["data"]["store"] = str(data)
    Together(tmp_path / "logs", 1, train_unproven, Recipe.model_validate(made), tmp_path / "run").succeeded()
    assert len(read_clips(tmp_path / "run" / "stage2" / "samples" / "step-000006")) == 2


@pytest.mark.parametrize(
    ("evaluation", "says"),
    [
        ({"rank": "-wer"}, "needs wer, which is not measured here: name its judge"),
        ({"gates": ["speaker_accuracy > 0"]}, "needs speaker_accuracy"),
        ({"texts": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_a_rule_or_text_that_cannot_be_used_is_refused_before_training(
    world: Path, tmp_path: Path, evaluation: dict[str, Any], says: str
) -> None:
    made = samples_recipe(world, **evaluation)
    failed = Together(tmp_path / "logs", 1, train_unproven, made, tmp_path / "run")
    assert failed.exit_codes() == [2], failed.log()
    assert says in failed.log()
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("evaluation", "says"),
    [
        ({"clips": 0, "patience": 2}, "patience have no effect with clips: 0"),
        ({"rank": "similarty"}, "the nearest is similarity"),
        ({"patience": 0}, "greater than or equal to 1"),
        ({"clip": 1}, "the nearest one is clips"),
    ],
)
def test_settings_that_make_no_sense(world: Path, evaluation: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        shared_recipe(world, 1, evaluation=evaluation)
