"""The page of `review` in a real browser: keys, sound, decisions, two tabs, ten thousand rows."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, Tab
from review_world import WORDS, decisions, refusal, small_data_set, utterance, write_data_set, write_recording

from higgstune.pages.server import PageServer
from higgstune.raw.review_app import ReviewApp

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium or Chrome to drive (apt install chromium)"),
]
IDS = [utterance(number)["id"] for number in range(6)]
TITLE = "document.querySelector('#one-title').textContent"
READY = "document.body?.dataset.ready"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as made:
        yield made


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    yield chromium
    chromium.close_tabs()


@contextmanager
def served(data: Path) -> Iterator[str]:
    app = ReviewApp(data)
    server = PageServer(app.routes)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server.url
    finally:
        server.stop()
        thread.join()
        app.close()


def at(tab: Tab, number: int) -> None:
    """Wait until an utterance is shown, with its sound."""
    tab.until(f"{TITLE} === '{IDS[number]}' && !document.querySelector('#play').disabled")


def written(data: Path, count: int) -> list[dict]:
    """The decisions on the disk, once there are so many."""
    end = time.monotonic() + 10
    while len(decisions(data)) < count:
        assert time.monotonic() < end
        time.sleep(0.02)
    return decisions(data)


def test_the_page_by_keys(tmp_path: Path, browser: Browser) -> None:
    data = small_data_set(tmp_path)
    with served(data) as url:
        tab = browser.open(url)
        tab.until(READY)
        at(tab, 2)  # the worst
        shown = "document.querySelector('#difference {}').textContent"
        assert (tab.evaluate(shown.format("del")), tab.evaluate(shown.format("ins"))) == ("two.", "too")
        assert tab.evaluate("document.querySelectorAll('#window button').length") == 6

        tab.press(" ")
        tab.until("document.body.dataset.keyToSound")
        tab.press("a")  # one key for a good clip: the next one plays by itself
        at(tab, 3)
        assert written(data, 1) == [{"id": IDS[2], "keep": True}]

        tab.press("e")
        assert tab.evaluate("document.activeElement.id") == "text"
        tab.write(" And more.")
        tab.press("Enter")
        text = f"{WORDS[3]} one, {WORDS[3]} two. And more."
        assert written(data, 2)[1] == {"id": IDS[3], "text": text, "keep": True}
        first = tab.until(f"{TITLE} !== '{IDS[3]}' && {TITLE}")

        tab.press("d")
        assert written(data, 3)[2] == {"id": first, "keep": False}
        tab.until(f"{TITLE} !== '{first}'")
        tab.press("u")
        assert written(data, 4)[3] == {"undo": 3}
        tab.until(f"{TITLE} === '{first}'")
        tab.until("document.querySelector('#counts').textContent.startsWith('2 of 6 decided')")

        value = "document.querySelector('#text').value"
        before = tab.evaluate(value)
        tab.press("e")
        for letter in "ad":  # letters of a text, not keys
            tab.press(letter)
        assert tab.evaluate(value) == f"{before}ad"
        tab.press("Escape")
        assert tab.evaluate(value) == before
        tab.press("n")
        tab.until(f"{TITLE} !== '{first}'")
        tab.press("b")
        tab.until(f"{TITLE} === '{first}'")
        assert len(decisions(data)) == 4
        assert not browser.faults()
        assert all(one.startswith((url, "data:", "about:")) for one in browser.requested())


def test_split_and_join(tmp_path: Path, browser: Browser) -> None:
    data = small_data_set(tmp_path)
    with served(data) as url:
        tab = browser.open(url)
        tab.until(READY)
        at(tab, 2)
        tab.press("s")
        assert tab.evaluate("document.querySelector('#mark').value") == "0.85"  # the middle of its pause
        assert tab.evaluate("document.querySelector('#before').value") == "charlie one,"
        tab.press("ArrowRight")
        assert tab.evaluate("document.querySelector('#mark').value") == "0.86"
        tab.press("Enter")
        cut = {"id": IDS[2], "cut": [4.96], "texts": ["charlie one,", "charlie two."]}
        assert written(data, 1) == [cut]
        tab.until("document.querySelectorAll('#window button').length === 7")
        at(tab, 2)
        tab.until("document.querySelector('#text').value === 'charlie one,'")

        tab.press("j")
        tab.until("document.activeElement.id === 'joined'")
        tab.press("Enter")
        joined = written(data, 2)[1]
        assert (joined["id"], joined["text"]) == (IDS[2], "charlie one, charlie two.")
        tab.until("document.querySelectorAll('#window button').length === 6")
        tab.until("document.querySelector('#text').value === 'charlie one, charlie two.'")
        assert not browser.faults()


def test_two_tabs(tmp_path: Path, browser: Browser) -> None:
    data = small_data_set(tmp_path)
    with served(data) as url:
        tabs = [browser.open(url), browser.open(url)]
        for tab in tabs:
            tab.until(READY)
            at(tab, 2)
        tabs[0].press("e")
        tabs[0].write(" Here.")
        tabs[0].press("Enter")
        written(data, 1)
        tabs[1].press("d")
        said = "document.querySelector('#said').textContent"
        tabs[1].until(f"{said}.includes('another tab') || {said}.includes('Another tab')")
        at(tabs[1], 2)
        tabs[1].until("document.querySelector('#text').value.endsWith('Here.')")
        assert len(decisions(data)) == 1
        tabs[1].press("d")  # it has seen the change now
        assert written(data, 2)[1] == {"id": IDS[2], "keep": False}


def test_speakers_are_renamed_and_texts_are_only_texts(tmp_path: Path, browser: Browser) -> None:
    hostile = '<img src=x onerror="document.title=1"> </script>'
    write_recording(tmp_path, 4.0)
    rows = [utterance(number, speaker=hostile, text=hostile, recognised=hostile + " x") for number in range(2)]
    data = write_data_set(tmp_path, rows, [])
    with served(data) as url:
        tab = browser.open(url)
        tab.until(READY)
        tab.press("v")
        tab.until("document.querySelector('#speaker-list input') !== null")
        tab.evaluate("document.querySelector('#speaker-list input').select()")
        tab.write("anna")
        tab.press("Enter")
        assert written(data, 1) == [{"ids": IDS[:2], "speaker": "anna"}]
        tab.until("document.querySelector('#speaker-list label').textContent.startsWith('anna (2)')")
        assert tab.evaluate("document.querySelectorAll('img').length") == 0
        assert not browser.faults()


def test_ten_thousand_rows(tmp_path: Path, browser: Browser) -> None:
    """A key sounds within 150 ms, and only what can be seen is in the page."""
    write_recording(tmp_path, 40.0)
    rows = []
    for number in range(10_000):
        row = utterance(number % 19)
        rows.append(row | {"id": f"talk{number:05d}-{number:08d}", "audio": f"clips/{number % 10}.flac"})
    data = write_data_set(tmp_path, rows[:-100], [refusal(5, "noise", 4.0) | {"id": row["id"]} for row in rows[-100:]])
    with served(data) as url:
        tab = browser.open(url)
        tab.resize(1280, 800)
        tab.until(READY)
        tab.until("!document.querySelector('#play').disabled")
        assert tab.evaluate("document.querySelectorAll('#window li').length") < 60
        took = []
        for _ in range(10):
            before = tab.evaluate(TITLE)
            time.sleep(0.2)
            tab.evaluate("delete document.body.dataset.keyToSound")
            tab.press("a")
            took.append(float(tab.until("document.body.dataset.keyToSound")))
            assert tab.evaluate(TITLE) != before
        assert sorted(took)[5] < 150, took
        tab.evaluate("document.querySelector('#rows').scrollTop = 64 * 9990")
        tab.until("[...document.querySelectorAll('#window .tag')].some(tag => tag.textContent === 'noise')")
        assert len(written(data, 10)) == 10
