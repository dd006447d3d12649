"""The docs: commands of tutorial and how-to run on the miniature, links lead somewhere, generated pages are current."""

import re
import runpy
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from commands import Command
from processes import forked_proofs  # noqa: F401
from raw_recordings import KnowingAsr, talks_of
from typed import MINIATURE, ROOT, lines, typist, unpack_clone

from higgstune.demo.demo import _unpack

TUTORIAL = "docs/tutorial.md"
HOWTO = [
    f"docs/howto/{name}.md" for name in ("trouble", "record", "recipe", "language", "gpu", "collect")
]  # in the order of runs
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "dev").glob("*.md")]
)


def type_lines(page: str, type_in: Callable[[str], str]) -> dict[str, str]:
    """Run the commands of a page in order; the output of each. What an earlier one has written makes room."""
    said = {}
    for line in lines(page):
        words = shlex.split(line)
        if "--out" in words and (words[1] in ("train", "export") or MINIATURE in line):
            shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
        if words[1:2] == ["recipe"] and len(words) == 3:
            Path(f"{words[2]}.yaml").unlink(missing_ok=True)
        said[line] = type_in(line)
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of somebody who has typed the demo, too."""
    folder = tmp_path_factory.mktemp("reader")
    unpack_clone(folder)
    _unpack(folder / "runs" / "demo")
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("page", [TUTORIAL, *HOWTO])
def test_every_command_of_a_page_runs(
    page: str, folder: Path, command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    type_in = typist(command, capsys)
    if page != TUTORIAL and not Path("runs/voice/voice/adapter").exists():  # this test alone
        for line in lines(TUTORIAL):
            if re.match(r"higgstune (recipe \w+$|(prepare|train) .*--out)", line) and MINIATURE not in line:
                type_in(line)
    monkeypatch.setattr(
        "higgstune.evaluation.judges.load_clip_transcriber", lambda *_: KnowingAsr(*talks_of("recordings"))
    )
    said = type_lines(page, type_in)
    assert said
    if page == TUTORIAL:
        assert any("0 failed" in output for line, output in said.items() if "doctor --adapter" in line)
        for name in ("morning.wav", "other.wav", "final.wav"):
            assert soundfile.info(name).samplerate == 24_000


def test_every_howto_is_run() -> None:
    assert sorted(HOWTO) == sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/howto").glob("*.md"))


def anchors(path: Path) -> set[str]:
    """The headings of a page, as GitHub writes them into addresses."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), link
        assert not anchor or anchor in anchors(found), link
        assert not page.startswith("docs/") or found.is_relative_to(ROOT / "docs"), f"{link}: not on the site"


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("dev/")])
def test_files_that_pages_name_exist(page: str) -> None:
    for named in re.findall(r"`((?:dev|docs|notebooks|tools)/[\w/.]+\.\w+)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / named).is_file(), named


def pages_of(tree: Any) -> Iterator[str]:
    """The pages of a navigation."""
    for entry in tree:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages_of(value)


def test_the_site_has_every_page_once() -> None:
    site = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    found = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages_of(site["nav"])) == sorted(found)


def test_the_page_of_verbs_is_current() -> None:
    """Else: python tools/verbs_page.py."""
    assert (ROOT / "docs/verbs.md").read_text(encoding="utf-8") == runpy.run_path(f"{ROOT}/tools/verbs_page.py")[
        "page"
    ]()


def test_figures_are_current() -> None:
    """Else: python tools/figures.py."""
    drawn = {name: draw() for name, draw in runpy.run_path(f"{ROOT}/tools/figures.py")["DRAWINGS"].items()}
    assert {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs/figures").glob("*.svg")} == drawn


def test_every_fault_has_its_test() -> None:
    """What dev/reliability.md names; `::name` is of the file named before it, or of the faults of training."""
    count = 0
    for line in (ROOT / "dev/reliability.md").read_text(encoding="utf-8").splitlines():
        file = "tests/training/test_faults_of_training.py"
        for named, test in re.findall(r"`((?:tests/[\w/]+\.py)?)(?:::(\w+))?`", line):
            file = named or file
            text = (ROOT / file).read_text(encoding="utf-8")
            assert not test or f"\ndef {test}(" in text, f"{file}::{test}"
            count += bool(test)
    assert count > 40
