"""What the tests of pages share: a page as tags, what holds of every page, and what goes into one."""

import re
from html.parser import HTMLParser
from itertools import pairwise

HOSTILE = '</script><script>alert(1)</script> "it\'s" <b>bold</b>'


class Page(HTMLParser):
    """Tags with their attributes, in order, and texts; every tag is closed where it should be."""

    _VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def check(self) -> None:
        """What holds of every page: nothing from outside, headings in order, ids unique, all media labelled."""
        for _, attributes in self.tags:
            for key in ("src", "href", "xlink:href", "action", "poster"):
                assert (attributes.get(key) or "#").startswith(("data:", "#"))
            assert "url(http" not in (attributes.get("style") or "")
        levels = [int(tag[1]) for tag, _ in self.tags if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        for _, attributes in self.tags:
            if (attributes.get("href") or "").startswith("#"):
                assert attributes["href"][1:] in ids  # type: ignore[index]
            if name := attributes.get("aria-labelledby"):
                assert name in ids
        for audio in self.all("audio"):
            assert audio["aria-label"]
            assert audio["preload"] == "none"
        for svg in self.all("svg"):
            assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and svg["aria-label"])
        assert len(self.all("main")) == len(self.all("nav")) == len(self.all("h1")) == 1
        assert len(self.all("caption")) == len(self.all("table"))
        assert all(th["scope"] in ("row", "col") for th in self.all("th"))


def history(steps: int = 8) -> list[dict[str, float]]:
    return [
        {"step": s, "audio_loss": 5 / s, "eval_audio_loss": 5.0, "audio_loss_0": 1.0, "audio_loss_1": 2.0}
        for s in range(1, steps + 1)
    ]
