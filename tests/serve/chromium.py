"""A real Chromium without a window, driven through its DevTools protocol: enough to use a page as a person does.

Found by HAOMIAO_CHROMIUM or by its usual names; where there is none, tests that need one are skipped.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """Where Chromium is."""
    given = os.environ.get("HAOMIAO_CHROMIUM")
    return given or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One process with a profile of its own."""

    def __init__(self, path: str, profile: Path) -> None:
        flags = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--no-first-run"]
        flags += [
            "--disable-gpu",
            "--disable-extensions",
            "--disable-background-networking",
            "--no-default-browser-check",
        ]
        flags += ["--disable-dev-shm-usage", "--mute-audio", "--lang=en-US"]
        if os.getuid() == 0:
            flags.append("--no-sandbox")  # its sandbox does not work for root, and the page is ours
        self._log = (profile / "log").open("w+")
        self.process = subprocess.Popen([path, *flags, "about:blank"], stderr=self._log, stdout=subprocess.DEVNULL)
        self.port = self._wait_for_port(profile / "log")

    def _wait_for_port(self, log: Path) -> int:
        for _ in range(600):
            found = re.search(r"DevTools listening on ws://[^:]+:(\d+)/", log.read_text(errors="replace"))
            if found:
                return int(found[1])
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"Chromium did not start: {log.read_text(errors='replace')[-800:]}")

    def tab(self) -> Tab:
        """A new tab."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(request, timeout=30) as reply:
            return Tab(json.load(reply)["webSocketDebuggerUrl"])

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


class Tab:
    """One page. `problems` collects exceptions, refused resources and console errors."""

    def __init__(self, url: str) -> None:
        self._open = contextlib.ExitStack()
        self._socket = self._open.enter_context(connect(url, max_size=None, proxy=None))
        self._next = 0
        self.problems: list[str] = []
        self.requested: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        self._next += 1
        self._socket.send(json.dumps({"id": self._next, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == self._next:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                result: dict[str, Any] = message["result"]
                return result
            self._event(message)

    def _event(self, message: dict[str, Any]) -> None:
        kind, params = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif kind == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif kind == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])

    def open(self, url: str) -> None:
        """Go to a page and wait until it has loaded."""
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href === {json.dumps(url)}")

    def js(self, expression: str) -> Any:
        """The value of an expression; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> Any:
        """The value of an expression once it is true."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            value = self.js(condition)
            if value:
                return value
            time.sleep(0.02)
        raise AssertionError(f"never became true: {condition}; problems: {self.problems}")

    def type(self, text: str) -> None:
        """Type into what has the focus, a character at a time."""
        for character in text:
            self.call("Input.insertText", text=character)

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        """Press a key."""
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def look(self, width: int, height: int, *, dark: bool = False, still: bool = False, phone: bool = False) -> None:
        """How large the window is, and what the reader prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        features.append({"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"})
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> None:
        """A screenshot of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def nodes(self) -> list[dict[str, Any]]:
        """The accessibility tree, as a screen reader meets it."""
        found: list[dict[str, Any]] = self.call("Accessibility.getFullAXTree")["nodes"]
        return found

    def close(self) -> None:
        """Close the connection to the tab."""
        self._open.close()
