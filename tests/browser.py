"""Headless Chromium through Debian's chromedriver: WebDriver is JSON over HTTP, so that no package is needed."""

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class Browser:
    """A session of a running chromedriver."""

    def __init__(self, address: str, options: dict[str, Any]) -> None:
        self._session = address
        asked = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        self._session = f"{address}/session/{self._post('/session', capabilities=asked)['sessionId']}"

    def _post(self, path: str, **values: Any) -> Any:
        request = urllib.request.Request(
            f"{self._session}{path}", json.dumps(values).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol."""
        return self._post("/goog/cdp/execute", cmd=command, params=parameters)

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        """Open a file in a window so many CSS pixels wide, light or dark."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._post("/url", url=page.resolve().as_uri())

    def run(self, script: str) -> Any:
        """Return what a function body of JavaScript returns."""
        return self._post("/execute/sync", script=script, args=[])

    def press(self, *keys: str) -> None:
        """Press keys one after the other."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": strokes}])

    def console(self) -> list[str]:
        """Return the messages of the console since the last call."""
        return [entry["message"] for entry in self._post("/se/log", type="browser")]

    def screenshot(self, file: Path) -> None:
        """Write a picture of the whole page as PNG."""
        give_up = time.monotonic() + 30
        while True:
            try:
                shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
                break
            except urllib.error.HTTPError as error:
                # On a busy machine the page may not be drawn yet.
                if time.monotonic() > give_up:
                    raise AssertionError(f"no picture within 30 s: {error.read().decode()}") from error
                time.sleep(0.5)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def headless_chromium() -> Iterator[Browser]:
    """Run Chromium with a profile of its own; skips the test where it is not installed."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: apt-get install chromium chromium-driver)")
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = next(line.rstrip(".\n").rpartition(" ")[2] for line in driver.stdout if "successfully" in line)
        # Containers that run as root have no sandbox.
        options = {"binary": shutil.which("chromium"), "args": ["--headless=new", "--no-sandbox", "--disable-gpu"]}
        browser = Browser(f"http://127.0.0.1:{port}", options)
        try:
            yield browser
        finally:
            request = urllib.request.Request(browser._session, method="DELETE")
            urllib.request.urlopen(request, timeout=60).close()
    finally:
        driver.terminate()
        driver.wait(timeout=30)
