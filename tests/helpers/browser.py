"""A headless Chromium for tests of pages, driven by its DevTools protocol over a pair of pipes."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT = 120
ALL_TEXT = (
    "(function text(node) { const within = [...(node.shadowRoot?.childNodes ?? []), ...node.childNodes];"
    " return node.nodeType === 3 ? node.data : within.map(text).join(' '); })(document.body)"
)
"""A script: the page's text, that of its components too."""


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page, and what went wrong in it.

    Attributes:
        errors: Errors of its scripts, and what it wrote to the console as an error.
        requests: Addresses that it asked for, but for its own and data in addresses.
    """

    def __init__(self, executable: str) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process, self._write, self._read = _start(executable, self._folder.name)
        self._buffer, self._number, self._session, self._events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def open(self, address: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Loads a page in a window of this size (under 700 px: with fingers, as on a phone)."""
        phone = width < 700
        scale = 2 if phone else 1
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        for one in ("about:blank", address):  # From elsewhere: a new hash alone loads nothing anew.
            self._events.clear()
            self.call("Page.navigate", url=one)
            self._until(lambda: "Page.loadEventFired" in self._events)

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + TIMEOUT
        while not self.run(condition):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Clicks the middle of an element, or taps it on a phone's screen."""
        x, y = self.place(selector)
        if self.run("navigator.maxTouchPoints > 0"):
            self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
            self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
            return
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            pressed = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)

    def point(self, selector: str) -> None:
        x, y = self.place(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def place(self, selector: str) -> list[float]:
        """The middle of an element, which is brought into view."""
        one = f"document.querySelector({json.dumps(selector)})"
        return self.run(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
            f" return [r.x + r.width / 2, r.y + r.height / 2]; }})({one})"
        )

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **(text if kind == "keyDown" else {}))

    def picture(self, path: Path, selector: str | None = None) -> None:
        """A screenshot of the window, or of a whole element."""
        clip = {}
        if selector:
            one = f"document.querySelector({json.dumps(selector)})"
            box = self.run(
                f"(r => [r.x + scrollX, r.y + scrollY, r.width, r.height])({one}.getBoundingClientRect())"
            )
            clip = {"clip": dict(zip(("x", "y", "width", "height"), box, strict=True)) | {"scale": 1}}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=bool(selector), **clip)["data"]
        path.write_bytes(base64.b64decode(data))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Asks the browser for something, and returns its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answers: list[dict[str, Any]] = []
        number = self._number

        def answered() -> bool:
            answers.extend(m for m in self._new if m.get("id") == number)
            return bool(answers)

        self._new: list[dict[str, Any]] = []
        self._until(answered)
        assert "error" not in answers[0], (method, answers[0]["error"])
        return answers[0]["result"]

    def close(self) -> None:
        os.close(self._write)  # It ends when nobody is left to command it.
        os.close(self._read)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def _until(self, done: Any) -> None:
        while not done():
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has ended"
            *whole, self._buffer = (self._buffer + data).split(b"\0")
            self._new = [json.loads(text) for text in whole]
            for message in self._new:
                self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, method: str, of: dict[str, Any]) -> None:
        self._events.append(method)
        if method == "Runtime.exceptionThrown":
            details = of["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Log.entryAdded" and of["entry"]["level"] == "error":
            self.errors.append(of["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            address = of["request"]["url"]
            if not address.startswith(("data:", "about:", "blob:")) and of["type"] != "Document":
                self.requests.append(address)


def _start(executable: str, folder: str) -> tuple[subprocess.Popen, int, int]:
    """A process that reads commands from its third file and writes answers to its fourth."""
    commands, write = os.pipe()
    read, answers = os.pipe()
    # Above those two, so that none of them is in the other's place.
    commands, answers = (fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (commands, answers))

    def connect() -> None:
        os.dup2(commands, 3)
        os.dup2(answers, 4)

    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run".split()
    flags += ["--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        [executable, *flags, f"--user-data-dir={folder}", "about:blank"],
        preexec_fn=connect,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands)
    os.close(answers)
    return process, write, read
