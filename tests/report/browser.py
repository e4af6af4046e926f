"""A real browser without a window, over the W3C WebDriver protocol; skips where the machine has none.

    with Browser() as browser:
        browser.open(path)
        browser.evaluate("document.title")

Found are chromium or Google Chrome with its chromedriver (Debian: apt install chromium chromium-driver; GitHub's
runners have both). Only what tests of a page need is here, so no package is.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_START_S, _CALL_S = 60, 60


def find_browser() -> tuple[str, str] | None:
    """Paths of a browser and its driver, or None."""
    driver = shutil.which("chromedriver")
    browser = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    return None if driver is None or browser is None else (browser, driver)


class Browser:
    """One session with one window."""

    def __init__(self) -> None:
        found = find_browser()
        if found is None:
            pytest.skip("no chromium or Google Chrome with chromedriver (apt install chromium chromium-driver)")
        self._browser, driver = found
        self._profile = tempfile.TemporaryDirectory()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._driver = subprocess.Popen([driver, "--port=0"], stdout=self._log, stderr=subprocess.STDOUT)
        self._session = ""

    def __enter__(self) -> Self:
        try:
            self._root = f"http://127.0.0.1:{self._port()}"
            arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            arguments += [f"--user-data-dir={self._profile.name}", "--window-size=1200,1000"]
            options = {"binary": self._browser, "args": arguments}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self._session = f"/session/{made['sessionId']}"
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and its driver."""
        try:
            if self._session:
                self._call("DELETE", self._session)
        finally:
            self._driver.terminate()
            self._driver.wait(10)
            self._log.close()
            self._profile.cleanup()

    def open(self, path: Path) -> None:
        """Load a file."""
        self._call("POST", f"{self._session}/url", {"url": path.resolve().as_uri()})

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as plain data."""
        content = {"script": f"return ({expression});", "args": []}
        return self._call("POST", f"{self._session}/execute/sync", content)

    def messages(self) -> list[str]:
        """What the browser has complained about."""
        entries = self._call("POST", f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries]

    def screenshot(self) -> bytes:
        """The window as a PNG file."""
        return base64.b64decode(self._call("GET", f"{self._session}/screenshot"))

    def _port(self) -> int:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._driver.poll() is None:
            self._log.seek(0)
            if found := re.search(r"on port (\d+)\.", self._log.read()):
                return int(found[1])
            time.sleep(0.05)
        self._log.seek(0)
        raise RuntimeError(f"chromedriver did not start: {self._log.read()[-500:]}")

    def _call(self, method: str, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self._root + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_CALL_S) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {json.load(error)['value']['message']}") from None
