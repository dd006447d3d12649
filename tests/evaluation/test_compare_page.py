"""The page that compares systems, and its blind test."""

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from pages import HOSTILE, Page, history
from scipy.stats import binomtest

from higgstune.errors import ConfigError
from higgstune.evaluation.report import compare
from higgstune.evaluation.report.compare import Comparison, Contender, write_comparison
from higgstune.evaluation.report.page import Item, Section, System, Take
from higgstune.metrics import Confusion, Difference, Estimate

SCRIPT = Path(compare.__file__).parent / "templates" / "blind.js"


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.wav" for i in range(3)]
    for i, path in enumerate(paths):
        soundfile.write(path, 0.1 * np.sin(np.arange(4800) / (10 + i)), 24_000)
    return paths


def comparison(clips: list[Path], words: str = "first", texts: int = 4, seed: int = 0) -> Comparison:
    """Two systems and the recordings; of the last text there is only one system's clip."""
    wer = {"wer": Estimate(0.1, 0.05, 0.15, 40)}
    difference = {"wer": Difference(-0.04, -0.07, -0.01, 0.01, 0.02, 40)}
    confusion = Confusion([words, "b"], [[0.8, 0.4], [math.nan, 0.7]], [[5, 0], [1, 4]])
    a, b, c = (Take(clip, words) for clip in clips)
    items = [Item(f"{words} {i}", (a, b, c), "en") for i in range(texts - 1)] + [Item("alone", (a, None, c))]
    return Comparison(
        title=words,
        introduction=words,
        contenders=[
            Contender(System(words, wer), {words: words}, {"full": history()}, {"full": [{"step": 1, "wer": 0.5}]}),
            Contender(System("second", wer, difference), histories={words: history()}, confusion=confusion),
        ],
        sections=[Section("Clips", ("recording", words, "second"), items, open_at_first=2)],
        commands=[(words, words)],
        seed=seed,
        question=words,
    )


def written(value: Comparison, tmp_path: Path) -> str:
    write_comparison(value, tmp_path / "compare.html")
    return (tmp_path / "compare.html").read_text(encoding="utf-8")


def blind_data(page: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="blind-data">(.*?)</script>', page, re.DOTALL)
    data: dict[str, Any] = json.loads(found[0])
    return data


def test_the_page_is_self_contained_and_what_strangers_wrote_stays_text(clips: list[Path], tmp_path: Path) -> None:
    text = written(comparison(clips, HOSTILE), tmp_path)
    page = Page(text)
    page.check()
    assert len(page.all("script")) == 3
    assert not page.all("b")
    assert blind_data(text)["systems"] == [HOSTILE, "second"]
    assert not re.search(r"\bnan\b", "".join(page.texts), re.IGNORECASE)


def test_differences_and_curves_are_shown(clips: list[Path], tmp_path: Path) -> None:
    text = "".join(Page(written(comparison(clips), tmp_path)).texts)
    assert "Differences from first" in text
    assert "−4.0 points" in text
    assert "p = 0.010" in text
    assert "audio, validation" in text


def test_a_blind_set_is_a_text_with_clips_of_several_systems(clips: list[Path], tmp_path: Path) -> None:
    page = written(comparison(clips), tmp_path)
    data = blind_data(page)
    ids = {audio["id"] for audio in Page(page).all("audio")}
    assert sorted(entry["text"] for entry in data["sets"]) == ["first 0", "first 1", "first 2"]
    for entry in data["sets"]:
        assert sorted(take["system"] for take in entry["takes"]) == [0, 1]  # never the recording
        assert {take["audio"] for take in entry["takes"]} <= ids


def test_sets_are_shuffled_by_the_seed_and_no_system_stands_first_more_often(clips: list[Path], tmp_path: Path) -> None:
    data = blind_data(written(comparison(clips, texts=21), tmp_path))
    assert data == blind_data(written(comparison(clips, texts=21), tmp_path))
    other = blind_data(written(comparison(clips, texts=21, seed=1), tmp_path))
    texts = [entry["text"] for entry in data["sets"]]
    assert texts != [entry["text"] for entry in other["sets"]]
    assert texts != sorted(texts)
    assert data["key"] != other["key"]
    assert Counter(entry["takes"][0]["system"] for entry in data["sets"]) == {0: 10, 1: 10}


def test_votes_for_other_clips_do_not_belong_to_a_test(clips: list[Path], tmp_path: Path) -> None:
    before = blind_data(written(comparison(clips), tmp_path))
    soundfile.write(clips[2], 0.2 * np.sin(np.arange(4800) / 30), 24_000)
    assert blind_data(written(comparison(clips), tmp_path))["key"] != before["key"]


def test_the_blind_test_needs_two_clips_of_a_text(clips: list[Path], tmp_path: Path) -> None:
    page = Page(written(comparison(clips, texts=1), tmp_path))
    page.check()
    assert not page.all("dialog")


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a", "a"], "one name"), (["a"], "1 systems"), ([str(i) for i in range(9)], "9 systems")],
)
def test_too_many_or_ambiguous_systems_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    value = Comparison("title", "", [Contender(System(name, {})) for name in names])
    with pytest.raises(ConfigError, match=message):
        write_comparison(value, tmp_path / "compare.html")


def run_script(expression: str) -> Any:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node, which runs the page's script outside of a browser, is not here")
    code = f"{SCRIPT.read_text(encoding='utf-8')}\nconsole.log(JSON.stringify({expression}))"
    done = subprocess.run([node, "-e", code], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def test_the_pages_sign_test_is_the_exact_one() -> None:
    pairs = [(0, 0), (1, 0), (1, 6), (5, 5), (9, 1), (12, 30), (700, 800)]
    found = run_script(f"{json.dumps(pairs)}.map(([a, b]) => signTest(a, b))")
    assert found == pytest.approx([binomtest(a, a + b).pvalue if a + b else 1.0 for a, b in pairs])


def test_votes_are_counted_by_system_whatever_its_place() -> None:
    sets = [{"takes": [{"system": i} for i in order]} for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2])]
    votes = [0, 2, "none", 1]  # the first system twice, a tie, the third of two
    result = run_script(f'countVotes(["a", "b", "c"], {json.dumps(sets)}, {json.dumps(votes)})')
    assert (result["wins"], result["ties"]) == ([2, 0, 1], 1)
    assert [(pair["wins"], pair["ties"], pair["other"]) for pair in result["pairs"]] == [
        ([2, 0], 1, 0), ([2, 0], 1, 0), ([0, 1], 1, 2),
    ]  # fmt: skip
    assert [pair["p"] for pair in result["pairs"]] == [0.5, 0.5, 1.0]
