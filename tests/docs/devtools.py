"""A browser that is asked questions: Chromium, by its DevTools over two pipes."""

import base64
import itertools
import json
import os
import pathlib
import select
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.browser import BROWSER


class Tab:
    """A page in a window of any size.

    Attributes:
      complaints: Errors and warnings of the console so far.
      requests: Addresses that pages asked for so far.
    """

    def __init__(self, ask: int, answers: int):
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._ask, self._answers = ask, answers
        self._numbers, self._rest, self._session = itertools.count(1), b"", {}
        self._loaded: set[str] = set()
        target = self._send("Target.createTarget", url="about:blank")
        session = self._send("Target.attachToTarget", flatten=True, **target)
        self._session = session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")
        self._send("Page.setLifecycleEventsEnabled", enabled=True)

    def size(self, width: int, height: int = 844, *, dark: bool = False) -> None:
        """Sets the size of the window, and the colours that the user prefers."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
        self._send("Emulation.setDeviceMetricsOverride", mobile=width < 500, **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str) -> None:
        """Opens a page and waits until all of it is there."""
        loader = self._send("Page.navigate", url=address).get("loaderId")
        while loader and loader not in self._loaded:  # None: a place on the same page
            self._receive()

    def ask(self, script: str) -> Any:
        """Returns the value of a script, or that which its promise is kept with."""
        answer = self._send(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, file: pathlib.Path, *, full: bool = False) -> None:
        """Saves what the window shows, or the whole page, as a PNG."""
        shot = self._send("Page.captureScreenshot", captureBeyondViewport=full)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        text = json.dumps(message | self._session).encode()
        os.write(self._ask, text + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], 60)
            assert ready, "the browser does not answer"
            more = os.read(self._answers, 1 << 20)
            assert more, "the browser has ended"
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        params = message.get("params", {})
        match message.get("method"):
            case "Page.lifecycleEvent" if params["name"] == "load":
                self._loaded.add(params["loaderId"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning"):
                self.complaints.append(json.dumps(params["args"]))
            case "Log.entryAdded":
                self.complaints.append(json.dumps(params["entry"]))
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
        return message


@contextmanager
def open_browser() -> Iterator[Tab]:
    """Starts Chromium; it reads from descriptor 3 and writes to 4."""
    reads, ask = os.pipe()
    answers, writes = os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
        command += ["--no-first-run", "--disable-background-networking"]
        command += ["--hide-scrollbars"]
        script = f'exec "$@" 3</dev/fd/{reads} 4>/dev/fd/{writes}'
        process = subprocess.Popen(
            ["sh", "-c", script, "sh", *command],
            pass_fds=(reads, writes),
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        try:
            yield Tab(ask, answers)
        finally:
            process.kill()
            process.wait()
            os.close(ask)
            os.close(answers)
