"""The verbs `evaluate` and `compare`: speak once, measure, report."""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from commands import Command
from judging import answering
from on_cpu import CPU
from tiny_checkpoint import save_tiny_checkpoint
from tiny_codec import save_tiny_codec
from tiny_runs import make_recordings, recipe
from training_world import train_unproven

import higgstune
from higgstune.errors import CheckpointError, ConfigError, DataError, InputError, WorkError
from higgstune.evaluation.clips import Clip, write_clips
from higgstune.evaluation.compare import compare
from higgstune.evaluation.evaluate import evaluate
from higgstune.evaluation.judges.base import Judges
from higgstune.evaluation.report.run_report import write_target_report
from higgstune.files import alone_in
from higgstune.generate.speaker import Speaker
from higgstune.generate.speech import Request, Speech


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a store, and two runs that differ in their learning rate."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_checkpoint(folder / "base")
    save_tiny_codec(folder / "base" / "codec")
    higgstune.prepare(
        make_recordings(folder / "recordings", clips=6), folder / "data", codec=folder / "base" / "codec",
        validation_fraction=0.4, speaker="anna", language="en",
    )  # fmt: skip
    for name, rate in (("one", 1e-2), ("two", 3e-2)):
        stage = {"name": "voice", "kind": "full", "max_steps": 2, "batch_size": 2, "learning_rate": rate}
        train_unproven(recipe(folder, stages=[stage]), folder / name)
    (folder / "texts.txt").write_text("Hi.\nNo.\nOh.\n")
    return folder


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:
    """A run that was not measured yet."""
    shutil.copytree(world / "one", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is spoken, in order."""
    texts: list[str] = []
    real = Speaker.speak_ready

    def recording(self: Speaker, requests: Sequence[Request], **options: Any) -> Iterator[tuple[int, Speech]]:
        for place, speech in real(self, requests, **options):
            texts.append(requests[place].text)
            yield place, speech

    monkeypatch.setattr(Speaker, "speak_ready", recording)
    return texts


def texts(world: Path, **options: Any) -> dict[str, Any]:
    return {"texts": str(world / "texts.txt"), "base": CPU} | options


def test_recordings_base_and_adapter_are_measured(world: Path, run: Path, tmp_path: Path) -> None:
    asr = answering(tmp_path, "asr", "'text': 'the weather is fine'")
    speaker = answering(tmp_path, "speaker", "'model a': 0.5, 'model b': 0.25")
    found = evaluate(run, asr=asr, speaker_judge=speaker, limit=1, base=CPU)
    assert list(found.texts.systems) == ["recordings", "base", "adapter"]
    adapter = found.texts.systems["adapter"]
    assert adapter.summary["similarity"].value == 0.5
    assert adapter.clips[0]["similarity model b"] == 0.25
    assert adapter.summary["wer"].value == adapter.summary["recording_wer"].value > 0
    assert set(adapter.judges) >= {"asr", "speaker"}
    assert "naturalness" in adapter.not_measured
    assert found.texts.differences["wer"].value == 0
    written = json.loads((run / "evaluation" / "validation.json").read_text())
    assert written["clips"]["adapter"][0]["transcript"] == "the weather is fine"
    page = write_target_report(found, run, ["higgstune", "evaluate"]).read_text(encoding="utf-8")
    assert page.count("<audio") == 3


def test_what_was_spoken_is_not_spoken_again(world: Path, run: Path, spoken: list[str]) -> None:
    first = evaluate(run, **texts(world))
    assert sorted(spoken) == sorted(["Hi.", "No.", "Oh."] * 2)
    spoken.clear()
    again = evaluate(run, **texts(world))
    assert spoken == []
    assert again.texts.as_json() == first.texts.as_json()  # and the same numbers
    evaluate(run, **texts(world, seed=1, with_base=False, limit=1))
    assert spoken == ["Hi."]


def test_another_text_or_adapter_is_spoken(world: Path, run: Path, tmp_path: Path, spoken: list[str]) -> None:
    out = tmp_path / "out"
    evaluate(run, **texts(world, out=out, with_base=False))
    spoken.clear()
    (tmp_path / "texts.txt").write_text("Oh.\nAh.\nHi.\n")  # one is new, the others have moved
    evaluate(run, **texts(tmp_path, out=out, with_base=False))
    assert spoken == ["Ah."]
    spoken.clear()
    evaluate(world / "two", **texts(world, out=out, with_base=False))
    assert spoken == ["Hi.", "No.", "Oh."]


def test_it_resumes_where_it_was_stopped(world: Path, run: Path, spoken: list[str]) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(run, **texts(world, with_base=False, batch_size=1, progress=stop))
    assert spoken == ["Hi.", "No."]
    evaluate(run, **texts(world, with_base=False))
    assert spoken == ["Hi.", "No.", "Oh."]


def test_answers_of_judges_are_cached(world: Path, run: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    asr = answering(tmp_path, "asr", f"'text': open({str(calls)!r}, 'a').write(file) and 'hi'")
    evaluate(run, **texts(world, with_base=False, asr=asr))
    before = calls.read_text()
    evaluate(run, **texts(world, with_base=False, asr=asr))
    assert calls.read_text() == before


def test_what_must_not_get_worse_is_guarded(world: Path, run: Path, tmp_path: Path) -> None:
    words = ["Ah", "Oh", "Hi", "No", "Go", "So", "Be", "We"]
    (tmp_path / "many.txt").write_text("".join(f"{word}.\n" for word in words))
    guard = str(tmp_path / "many.txt")
    asr = tmp_path / "asr.py"
    asr.write_text(  # transcribes everything that the base says, and nothing of the adapter
        "import json, sys, pathlib\n"
        "for file in sys.argv[1:]:\n"
        "    note = json.loads(pathlib.Path(file).with_suffix('.json').read_text())\n"
        "    print(json.dumps({'file': file, 'text': note['text'] if len(note['system'].split()) == 3 else ''}))\n"
    )
    found = evaluate(run, **texts(world, guard=[guard], asr=f"{sys.executable} {asr}"))
    [guarded] = found.guard
    assert guarded.differences["wer"].value == 1
    assert {"wer", "cer"} <= set(guarded.worse)
    assert found.texts.worse == []
    assert found.texts.conclusion == "3 clips are too few to show that anything is worse (or better)"
    assert guarded.conclusion.startswith("worse: wer, cer")
    assert found.as_json()["guard"][guard]["worse"] == guarded.worse
    page = write_target_report(found, run, ["higgstune", "evaluate"]).read_text(encoding="utf-8")
    assert "worse" in page


def test_a_zero_shot_set_has_its_references(world: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "wavs").mkdir()
    shutil.copy(world / "recordings" / "clip0.wav", tmp_path / "wavs" / "a.wav")
    (tmp_path / "meta.lst").write_text("a|Hello there.|wavs/a.wav|Oh no.\n")
    speaker = answering(tmp_path, "speaker", "'model': 0.5")
    found = evaluate(run, texts=str(tmp_path / "meta.lst"), with_base=False, speaker_judge=speaker, base=CPU)
    [row] = found.texts.systems["adapter"].clips
    assert row["similarity_reference"] == 0.5
    assert "similarity" not in found.texts.systems["adapter"].summary  # nobody says whose voice it is


def test_a_base_alone(world: Path, tmp_path: Path) -> None:
    found = evaluate(world / "base", **texts(world, out=tmp_path / "out", limit=1))
    assert list(found.texts.systems) == ["base"]
    assert write_target_report(found, world / "base", ["higgstune"]) == tmp_path / "out" / "report.html"


@pytest.mark.parametrize(
    ("target", "options", "error", "says"),
    [
        ("one", {"limit": 0}, ConfigError, "limit is 0"),
        ("one", {"texts": "klingon"}, ConfigError, "klingon"),
        ("one", {"guard": ["nowhere.txt"], "with_base": True}, DataError, "nowhere.txt"),
        ("one", {"guard": ["en"], "with_base": False}, ConfigError, "guard needs the base"),
        ("base", {"texts": "validation"}, DataError, "name it with --data"),
        ("one", {"data": "foreign"}, DataError, "was encoded by the codec"),
        ("recordings/none", {}, CheckpointError, "does not exist"),
    ],
)
def test_wrong_input_is_refused(
    world: Path, tmp_path: Path, target: str, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    if options.get("data") == "foreign":
        save_tiny_codec(tmp_path / "codec", seed=7)
        recordings = make_recordings(tmp_path / "recordings", clips=2)
        higgstune.prepare(recordings, tmp_path / "foreign", codec=tmp_path / "codec")
        options = {"data": tmp_path / "foreign"}
    with pytest.raises(error, match=says):
        evaluate(world / target, out=tmp_path / "out", base=CPU, **options)


def test_a_judge_that_fails_ends_it_and_speech_is_kept(
    world: Path, run: Path, tmp_path: Path, spoken: list[str]
) -> None:
    with pytest.raises(WorkError):
        evaluate(run, **texts(world, with_base=False, asr=answering(tmp_path, "asr", "'text': 1 / 0")))
    assert len(spoken) == 3
    evaluate(run, **texts(world, with_base=False))
    assert len(spoken) == 3


def clip_folder(folder: Path, *, silence: float = 0.0, seconds: float = 1.5, count: int = 6) -> Path:
    """Clips of a tone that swells, with a silence in the middle."""
    folder.mkdir(parents=True)
    clips = []
    for i in range(count):
        time = np.arange(int(24_000 * seconds)) / 24_000
        tone = 0.3 * np.sin(2 * np.pi * (150 + 10 * i + 40 * np.sin(3 * time)) * time)
        middle = len(tone) // 2
        wave = np.concatenate([tone[:middle], np.zeros(int(24_000 * silence)), tone[middle:]])
        soundfile.write(folder / f"{i}.wav", wave, 24_000)
        clips.append(Clip(str(i), folder / f"{i}.wav", "As long as this is.", language="en"))
    write_clips(folder, clips)
    return folder


def test_external_clips_are_measured_the_same_twice(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clips")
    found = [evaluate(folder), evaluate(folder)]
    assert found[0].texts.as_json() == found[1].texts.as_json()
    assert write_target_report(found[0], folder, ["higgstune"]).is_file()


def test_the_best_of_five(tmp_path: Path) -> None:
    folders = [
        clip_folder(tmp_path / "long", seconds=9),
        clip_folder(tmp_path / "short", seconds=0.2),
        clip_folder(tmp_path / "good"),
        clip_folder(tmp_path / "silent", silence=2),
        clip_folder(tmp_path / "longer", seconds=2.5),
    ]
    found = compare(folders, out=tmp_path / "out", gates=["cap_rate <= 0", "short_rate <= 0"],
                    rank="-abs(duration_ratio - 1) - silence", base=CPU)  # fmt: skip
    assert found.best == "good"
    assert found.choice.broken == [["cap_rate <= 0"], ["short_rate <= 0"], [], [], []]
    assert found.differences["silent"]["silence"].value > 1
    assert found.differences["silent"]["silence"].p < 0.05
    page = found.page.read_text(encoding="utf-8")
    assert page.count("<audio") >= 5 * 6
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert written["best"] == "good"
    assert written["systems"]["short"]["summary"]["short_rate"]["value"] == 1


def test_runs_are_compared_on_the_same_texts_and_seeds(world: Path, tmp_path: Path, spoken: list[str]) -> None:
    runs = [world / name for name in ("one", "two", "base")]
    found = compare(runs, out=tmp_path / "out", **texts(world, limit=2))
    assert spoken == ["Hi.", "No."] * 3
    assert list(found.evaluations) == ["one", "two", "base"]
    assert [row["speaker"] for evaluation in found.evaluations.values() for row in evaluation.clips] == ["anna"] * 6
    ids = [[row["id"] for row in evaluation.clips] for evaluation in found.evaluations.values()]
    assert ids[0] == ids[1]
    assert "duration_ratio" in found.differences["two"]
    files = [sorted((tmp_path / "out" / name / "speech").glob("*.wav")) for name in ("one", "two")]
    assert files[0][0].read_bytes() != files[1][0].read_bytes()


@pytest.mark.parametrize(
    ("targets", "options", "says"),
    [
        (["good"], {}, "give 2 to 8"),
        (["good"] * 9, {}, "give 2 to 8"),
        (["good", "good"], {}, "given twice"),
        (["good", "bad"], {"rank": "-wer"}, "needs wer, and no judge of it was named"),
        (["good", "bad"], {"gates": ["wer <"]}, "not an expression"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, targets: list[str], options: dict[str, Any], says: str) -> None:
    for name in ("good", "bad"):
        clip_folder(tmp_path / name, count=1)
    with pytest.raises(ConfigError, match=says):
        compare([tmp_path / name for name in targets], out=tmp_path / "out", **options)


def test_what_would_fail_late_fails_before_anything_is_spoken(world: Path, tmp_path: Path, spoken: list[str]) -> None:
    for targets, options, says in (
        (["one", "nowhere"], {}, "nowhere does not exist"),
        (["one", "two"], {"gates": ["step > 3"]}, "have no step"),
        (["one", "two"], {"rank": "similarity"}, "no judge of it was named"),
    ):
        with pytest.raises(InputError, match=says):
            compare([world / name for name in targets], out=tmp_path / "out", **texts(world), **options)
    assert not spoken
    assert not (tmp_path / "out").exists()


def test_equal_systems_have_no_best_one(tmp_path: Path, command: Command) -> None:
    folders = [clip_folder(tmp_path / name) for name in "ab"]
    code, out, _ = command("compare", *folders, "--out", tmp_path / "out", "--gate", "silence < 0")
    assert code == 0
    assert "best: none of a, b: equal (" in out
    assert "does not meet silence < 0, and no other breaks less; no measure differs clearly" in out
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["best"] is None
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert "none of a, b: equal" in page
    assert "seeds" not in page.partition("<main")[0]


def test_judges_of_a_comparison_are_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(
        "higgstune.evaluation.compare.load_judges", lambda *specs, **_: loaded.append(specs) or Judges()
    )
    monkeypatch.setattr("higgstune.evaluation.evaluate.load_judges", lambda *_, **__: pytest.fail("loaded again"))
    compare([clip_folder(tmp_path / name, count=1) for name in "ab"], out=tmp_path / "out")
    assert len(loaded) == 1


def test_a_second_evaluation_of_a_folder_is_kept_away(world: Path, run: Path) -> None:
    with (
        alone_in(run / "evaluation", "evaluation", ""),
        pytest.raises(DataError, match="another evaluation is writing"),
    ):
        evaluate(run, **texts(world))
    evaluate(run, **texts(world, limit=1))


def test_errors_name_the_target_that_was_probably_meant(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = tmp_path / "both"
    for name in ("one", "two"):
        shutil.copytree(run, both / name)
    with pytest.raises(CheckpointError, match=r"both holds several runs or adapters: name one of .*one, .*two$"):
        evaluate(both)
    card = run / "voice" / "adapter" / "higgstune.json"
    card.write_text(card.read_text().replace(str(world / "data"), "data"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="the store data that the adapter was trained on does not exist, seen from"):
        evaluate(run, base=CPU)


def test_a_store_is_found_from_another_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe names it by a relative path, the card by an absolute one."""
    card = run / "voice" / "adapter" / "higgstune.json"
    content = json.loads(card.read_text())
    content["recipe"]["data"]["store"] = "data"
    card.write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    found = evaluate(run, base=CPU, limit=1, with_base=False)
    assert found.settings is not None
    assert found.settings.store == content["data"]["store"]


def test_options_that_mean_nothing_for_clips_are_refused(tmp_path: Path, command: Command) -> None:
    folder = clip_folder(tmp_path / "clips", count=1)
    code, _, err = command("evaluate", folder, "--limit", "1")
    assert (code, "measured as they are" in err) == (2, True)
    (folder / "clips.jsonl").unlink()
    (folder / "0.txt").write_text("")
    with pytest.raises(DataError, match=r"0\.wav: .*empty"):
        evaluate(folder)


def test_a_judge_that_rates_all_voices_the_same_finds_none_right(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clips", count=2)
    clips = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    (folder / "clips.jsonl").write_text("".join(json.dumps(clip | {"speaker": "anna"}) + "\n" for clip in clips))
    for name in ("anna", "ben"):
        (folder / "voices" / name).mkdir(parents=True)
        shutil.copy(folder / "0.wav", folder / "voices" / name / "0.wav")
    found = evaluate(folder, speaker_judge=answering(tmp_path, "same", "'model': 0.5"))
    assert found.texts.systems["clips"].summary["speaker_accuracy"].value == 0
    with pytest.raises(WorkError, match=r"gave model as 1\.5 .*a cosine lies between"):
        evaluate(folder, speaker_judge=answering(tmp_path, "more", "'model': 1.5"))


def test_a_wrong_clip_has_a_readable_error(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clips", count=1)
    (folder / "clips.jsonl").write_text('{"id": "0", "file": "0.wav", "text": "Hi.", "voice": "anna"}\n')
    with pytest.raises(DataError, match=r"line 1: voice: .*; a clip has id, file, text") as raised:
        evaluate(folder)
    assert "http" not in str(raised.value)


def test_the_report_has_all_sets_and_how_to_repeat_it(world: Path, run: Path, tmp_path: Path) -> None:
    write_target_report(evaluate(run, **texts(world, limit=1)), run, ["higgstune", "evaluate", "first"])
    (tmp_path / "more.txt").write_text("Go.\nSo.\n")
    found = evaluate(run, **texts(world, texts=str(tmp_path / "more.txt")))
    page = write_target_report(found, run, ["higgstune", "evaluate", "second"]).read_text(encoding="utf-8")
    assert "Other sets" in page
    assert "texts.txt, adapter" in page
    assert "more.txt, adapter" not in page
    assert "adapter minus base" in page
    assert f"higgstune prepare RECORDINGS --out {world / 'data'} --codec" in page
    assert "--validation-fraction 0.4" in page
    assert "higgstune evaluate second" in page
    state = json.loads((run / "run.json").read_text())
    assert state["environment"]["torch"] == torch.__version__
    assert f"torch {torch.__version__}" in page
    (run / "run.json").write_text(json.dumps({key: state[key] for key in state if key != "environment"}))
    assert "not recorded" in write_target_report(found, run, []).read_text(encoding="utf-8")


def test_another_store_than_the_one_trained_on_is_a_warning(
    world: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = evaluate(run, **texts(world, limit=1, with_base=False))
    assert found.settings is not None
    assert found.settings.store_as_trained_on is True
    assert "may have been trained on" not in caplog.text
    shutil.copytree(world / "data", tmp_path / "data")
    make_recordings(tmp_path / "recordings", clips=8)
    higgstune.prepare(tmp_path / "recordings", tmp_path / "data", codec=world / "base" / "codec", speaker="anna")
    found = evaluate(run, **texts(world, limit=1, with_base=False, data=tmp_path / "data"))
    assert found.settings is not None
    assert found.settings.store_as_trained_on is False
    assert "may have been trained on" in caplog.text


def test_the_commands(tmp_path: Path, command: Command) -> None:
    folders = [clip_folder(tmp_path / "a"), clip_folder(tmp_path / "b", silence=1)]
    code, out, _ = command("evaluate", folders[0], "--json")
    result = json.loads(out)
    assert (code, result["systems"]["clips"]["summary"]["short_rate"]["value"]) == (0, 0)
    assert Path(result["report"]).is_file()
    code, out, err = command("compare", *folders, "--out", tmp_path / "out", "--rank=-silence")
    assert code == 0
    assert "best: a (" in out
    assert "no ASR was named" in err
    code, _, err = command("compare", *folders, "--out", tmp_path / "out", "--gate", "silence <")
    assert code == 2
    assert "not an expression" in err


def test_the_report_shows_whose_voice_clips_have(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clips", count=2)
    clips = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    (folder / "clips.jsonl").write_text(
        "".join(json.dumps(c | {"speaker": s}) + "\n" for c, s in zip(clips, ("anna", "ben"), strict=True))
    )
    for number, name in enumerate(("anna", "ben")):
        (folder / "voices" / name).mkdir(parents=True)
        shutil.copy(folder / f"{number}.wav", folder / "voices" / name / "a.wav")
    speaker = answering(tmp_path, "speaker", "'model': 0.75 if '/anna/' in sys.argv[2] else 0.25")
    found = evaluate(folder, speaker_judge=speaker, base=CPU)
    confusion = found.texts.systems["clips"].confusion
    assert confusion is not None
    assert confusion.similarity == [[0.75, 0.25], [0.75, 0.25]]
    assert found.texts.systems["clips"].summary["speaker_accuracy"].value == 0.5
    page = write_target_report(found, folder, ["higgstune"]).read_text(encoding="utf-8")
    assert "Whose voice is it?" in page
    assert "0.75 (1)" in page
