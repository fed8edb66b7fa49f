"""A headless Chromium, driven over its debugging pipe: no library, no port, no download."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 60.0
# Chromium reads commands from 3 and answers on 4. By way of numbers that neither has.
INTO_PLACE = """
import os, sys
for place, number in ((103, int(sys.argv[1])), (104, int(sys.argv[2]))):
    os.dup2(number, place)
for place in (103, 104):
    os.dup2(place, place - 100)
    os.close(place)
os.execv(sys.argv[3], sys.argv[3:])
"""
# Root, as in a container, has no sandbox; nothing but our own page is opened.
FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "remote-debugging-pipe")
QUIET = ("disable-extensions", "disable-background-networking", "disable-component-update", "disable-sync")


def binary() -> str | None:
    """The browser of this machine, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. `requests` are the addresses that it asked for, `errors` what its script threw or logged."""

    def __init__(self, folder: Path) -> None:
        command, answer = os.pipe(), os.pipe()
        path = binary()
        assert path is not None
        options = [f"--{flag}" for flag in (*FLAGS, *QUIET, f"user-data-dir={folder}")]
        self._process = subprocess.Popen(
            [sys.executable, "-c", INTO_PLACE, str(command[0]), str(answer[1]), path, *options],
            pass_fds=(command[0], answer[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command[0])
        os.close(answer[1])
        self._out, self._in = command[1], answer[0]
        self._ids, self._rest, self._session = itertools.count(1), b"", None
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its result."""
        id = next(self._ids)
        message: dict[str, Any] = {"id": id, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._message()
            if found.get("id") == id:
                assert "error" not in found, found
                return found["result"]

    def _message(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            assert time.monotonic() < deadline and self._process.poll() is None, "the browser does not answer"
            self._rest += os.read(self._in, 1 << 16)
        text, _, self._rest = self._rest.partition(b"\0")
        found = json.loads(text)
        told = found.get("params", {})
        if found.get("method") == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif found.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(told["exceptionDetails"]))
        elif found.get("method") == "Log.entryAdded":
            self.errors.append(told["entry"]["text"])
        return found

    def open(self, path: Path, width: int = 1280, dark: bool = False) -> None:
        """Loads a file at a width, in pixels."""
        small = width < 700
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=small)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        while self.run("document.readyState") != "complete" or self.run("location.protocol") != "file:":
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """The value of an expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key pressed and let go."""
        text = {"Enter": "\r"}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def write(self, text: str) -> None:
        """Text typed into what has the focus."""
        self.call("Input.insertText", text=text)

    def picture(self, path: Path, whole: bool = True) -> bytes:
        """A PNG of the page, also written to `path`."""
        data = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])
        path.write_bytes(data)
        return data

    def close(self) -> None:
        """Ends the browser."""
        os.write(self._out, json.dumps({"id": next(self._ids), "method": "Browser.close"}).encode() + b"\0")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)
