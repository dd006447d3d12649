"""A real browser for tests of pages: headless Chromium, driven over a pipe by the DevTools protocol.

`--remote-debugging-pipe` needs neither a port nor a library: messages are JSON that ends with a zero byte.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio", "--disable-dev-shm-usage",
    "--disable-background-networking", "--autoplay-policy=no-user-gesture-required", "--remote-debugging-pipe",
)  # fmt: skip
_KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), " ": (32, " "), "ArrowRight": (39, ""), "ArrowDown": (40, "")}


class Browser:
    """Ends with its `with` block."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        program = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'  # where Chromium expects its ends of the pipe
        command = ["bash", "-c", program, CHROMIUM, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), **quiet)  # type: ignore[call-overload]
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in = os.fdopen(ours_out, "wb", buffering=0), os.fdopen(ours_in, "rb", buffering=0)
        self._pending, self._number = b"", 0
        self._tabs: list[str] = []
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        self._out.close()
        self._in.close()

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command; its result. Events that come in between are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._out.write(json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            while b"\0" not in self._pending:
                block = self._in.read(1 << 16)
                assert block, "the browser has ended"
                self._pending += block
            line, _, self._pending = self._pending.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def open(self, url: str) -> "Tab":
        """A new tab."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Page", "Network", "Log"):
            self.send(f"{domain}.enable", session)
        tab = Tab(self, session)
        self._tabs.append(session)
        self.send("Page.navigate", session, url=url)
        return tab

    def faults(self) -> list[str]:
        """What pages wrote as errors, such as what their policy refused."""
        self.send("Target.getTargets")
        found = []
        for event in self.events:
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(event["params"]["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded":
                entry = event["params"]["entry"]
                if entry["level"] == "error" and entry["source"] != "network":  # a refused request is an answer, too
                    found.append(str(entry))
        return found

    def close_tabs(self) -> None:
        """Close all tabs, and forget what happened in them."""
        for tab in self._tabs:
            self.send("Page.close", tab)
        self._tabs.clear()
        self.events.clear()

    def requested(self) -> list[str]:
        """The addresses that pages have requested."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent]


class Tab:
    """One page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        done = self._browser.send(
            "Runtime.evaluate", self._session, expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, expression: str, seconds: float = 20.0) -> Any:
        """Wait for an expression to be true; its value."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.03)
        return value

    def press(self, key: str, **modifiers: int) -> None:
        """Press and release a key, as a person does."""
        code, text = _KEYS.get(key, (ord(key[0].upper()), key))
        event = {"key": key, "windowsVirtualKeyCode": code, **modifiers}
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self._browser.send("Input.dispatchKeyEvent", self._session, **event, **down)
        self._browser.send("Input.dispatchKeyEvent", self._session, **event, type="keyUp")

    def write(self, text: str) -> None:
        """Insert a text where the focus is."""
        self._browser.send("Input.insertText", self._session, text=text)

    def resize(self, width: int, height: int) -> None:
        """Look at the page on another screen."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._browser.send("Emulation.setDeviceMetricsOverride", self._session, **size)
