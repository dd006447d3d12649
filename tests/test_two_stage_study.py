"""The study of two stages compares what it claims to: equal steps, other losses; the same sentences, other systems."""

import importlib
import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
SPEECH = TOOLS.parent.parent / "shared" / "speech" / "ljspeech"
STAGES = ("kind", "max_steps", "text_weight", "audio_weight", "batch_size")


@pytest.fixture(autouse=True)
def _tools_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("agg")
    for name in ("conditioning", "two_stage"):
        monkeypatch.syspath_prepend(str(TOOLS / name))


def tool(name: str) -> Any:
    return importlib.import_module(name)


def corpus(folder: Path) -> Path:
    rows = [{"id": f"rms-{n:05d}", "audio": f"{n}.flac", "text": f"number {n}", "speaker": "rms"} for n in range(336)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_arms_have_the_same_steps_and_differ_in_what_stage_1_learns(tmp_path: Path) -> None:
    study, setting = tool("study"), tool("study_data").RunSetup("", steps=50, batch_size=3)
    found = {arm: study.recipe_for(setting, tmp_path, tmp_path, share=0.1, arm=arm, seed=4) for arm in study.COMPARED}
    stages = {arm: [tuple(getattr(s, key) for key in STAGES) for s in recipe.stages] for arm, recipe in found.items()}
    last = ("full", 45, 0.1, 1.0, 3)
    assert stages == {
        "full-full": [("full", 5, 0.1, 1.0, 3), last],
        "text-full": [("text", 5, 1.0, 0.0, 3), last],
        "both-full": [("text", 5, 1.0, 1.0, 3), last],
    }
    assert {(recipe.seed, recipe.evaluation.clips, recipe.evaluation.choose) for recipe in found.values()} == {
        (4, 0, "last")
    }


@pytest.mark.parametrize("name", ["few", "many", "real"])
def test_unseen_sentences_and_the_voice_are_not_in_the_training_data(name: str, tmp_path: Path) -> None:
    if name == "real" and not SPEECH.exists():
        pytest.skip(f"no real speech at {SPEECH}")
    recordings = tool("study_data")
    found = recordings.recordings_of(name, corpus(tmp_path), SPEECH)
    train, trained, unseen, voice = ({row.audio for row in rows} for rows in vars(found).values())
    assert trained <= train
    assert not train & unseen
    assert not (train | unseen) & voice
    assert min(len(trained), len(unseen), len(voice)) >= 3


def run(arm: str, seed: int, errors: dict[str, int], loss: float = 5.0) -> dict[str, Any]:
    rows = [
        {
            "id": f"{kind}-{name}", "word_errors": count if kind == "trained" else 4, "words": 4, "char_errors": count,
            "chars": 20, "similarity resemblyzer": 0.9, "similarity campplus": 0.8, "short": 0, "loops": 0,
            "hit_cap": int(name == "a" and arm == "text-full"), "duration_ratio": 1.0,
        }
        for kind in ("unseen", "trained")
        for name, count in errors.items()
    ]  # fmt: skip
    curve = [[0, 7.0, 1.0], [3, 6.0, 1.0], [10, loss, 1.0]]
    return {
        "setting": "many", "share": 0.3, "arm": arm, "seed": seed, "curve": curve, "after_first": 6.0,
        "judges": {"asr": "planted"}, "rows": rows,
    }  # fmt: skip


def test_results_are_means_over_seeds_and_paired_differences_over_sentences(tmp_path: Path) -> None:
    results = tool("results")
    runs = [
        run("full-full", 0, {"a": 0, "b": 0, "c": 0}),
        run("full-full", 1, {"a": 0, "b": 0, "c": 3}),
        run("text-full", 0, {"a": 1, "b": 2, "c": 3}, loss=5.5),
        run("text-full", 1, {"c": 4, "b": 2, "a": 1}, loss=5.7),
        run("base", 0, {"a": 4, "b": 4, "c": 9}),  # more errors than words
    ]
    for number, found in enumerate(runs):
        folder = tmp_path / "many" / str(number)
        folder.mkdir(parents=True)
        (folder / "measured.json").write_text(json.dumps(found))
    results.write_results(tmp_path)
    control, arm = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert (control["arm"], control["differences"]) == ("full-full", {})
    assert control["speech"][0]["wer"] == [0, 3 / 12]
    assert arm["speech"][0]["wer"] == [6 / 12, 7 / 12]
    assert arm["last"] == [5.5, 5.7]
    apart = arm["differences"]["trained"]
    assert apart["wer"]["value"] == pytest.approx(10 / 24)
    assert apart["wer"]["p"] == 2 / 2**3  # every sentence is worse: the smallest p of three pairs
    assert apart["ill"]["value"] == pytest.approx(1 / 3)
    assert arm["differences"]["unseen"]["wer"] == {"value": 0, "low": 0, "high": 0, "p": 1}
    text = (tmp_path / "results.md").read_text()
    assert "| many | 30% | text-full | 6.000 (6.000 to 6.000) | 5.600 (5.500 to 5.700) |" in text
    assert "| many | 30% | 3 trained | text-full | 54 (50 to 58) |" in text
    assert "| many | - | 3 trained | base | 100 |" in text
    assert all((tmp_path / f"two_stage_{name}.png").stat().st_size > 5000 for name in ("curves", "speech", "share"))


def test_runs_that_spoke_other_sentences_are_not_paired() -> None:
    results = tool("results")
    pair = [[run("full-full", 0, {"a": 1, "b": 1})], [run("text-full", 0, {"a": 1, "c": 1})]]
    with pytest.raises(ValueError, match="other sentences"):
        results.differences(*pair, "trained")
