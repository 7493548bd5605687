"""A headless Chromium, driven through ChromeDriver's plain HTTP: what a person's browser makes of a page."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "Debian's chromium and chromium-driver are not installed"
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
)
START_SECONDS, READY_SECONDS = 60.0, 10.0


class Browser:
    """One session with one page. Scripts run with what they get as `arguments`; `return` gives their answer."""

    def __init__(self, address: str) -> None:
        self._address = address
        options = {"binary": CHROMIUM, "args": list(ARGUMENTS)}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = f"/session/{self._call('POST', '/session', {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"ChromeDriver: {error.read().decode(errors='replace')[:800]}") from None

    def post(self, path: str, **body: Any) -> Any:
        return self._call("POST", self._session + path, body)

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.post("/goog/cdp/execute", cmd=command, params=parameters)

    def open(self, page: Path) -> None:
        """Until its scripts are through."""
        self.post("/url", url=page.resolve().as_uri())
        deadline = time.monotonic() + READY_SECONDS  # on a busy machine ChromeDriver was seen to answer before they were
        while self.script("return document.documentElement.dataset.ready") != "true":
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.05)

    def script(self, text: str, *arguments: Any) -> Any:
        return self.post("/execute/sync", script=text, args=list(arguments))

    def errors(self) -> list[str]:
        """All that the console got since the last call."""
        return [entry["message"] for entry in self.post("/se/log", type="browser")]

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def prefer(self, theme: str, media: str = "") -> None:
        """`light` or `dark`, as the system's settings say; `media` print for how it looks on paper."""
        self.devtools("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": theme}])

    def box(self, selector: str) -> list[float]:
        """left, top, width, height in the window, after scrolling there"""
        script = "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center'}); "
        script += "const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]"
        return [float(side) for side in self.script(script, selector)]

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.devtools("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def frames(self) -> None:
        """Until what was asked for is drawn."""
        script = "setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(() => done(true))), 50)"
        self.script(f"return new Promise((done) => {script})")

    def hover(self, selector: str, x: float, y: float) -> None:
        """The mouse over an element, at shares of its width and height."""
        left, top, width, height = self.box(selector)
        for moved in (1, 0):
            self.mouse("mouseMoved", left + x * width - moved, top + y * height)
        self.frames()

    def drag(self, selector: str, start: float, end: float) -> None:
        """Along an element, from one share of its width to another."""
        self.hover(selector, start, 0.5)
        left, top, width, height = self.box(selector)
        steps = (("mousePressed", start), ("mouseMoved", (start + end) / 2), ("mouseMoved", end), ("mouseReleased", end))
        for kind, share in steps:
            self.mouse(kind, left + share * width, top + height / 2, button="left", buttons=1, clickCount=1)
        self.frames()

    def picture(self, path: Path, *, whole: bool = False) -> None:
        shot = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def printed(self) -> bytes:
        return base64.b64decode(self.devtools("Page.printToPDF", printBackground=True)["data"])

    def close(self) -> None:
        self._call("DELETE", self._session)


@contextlib.contextmanager
def start_browser() -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert DRIVER, MISSING
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert time.monotonic() < deadline, "ChromeDriver does not answer"
            time.sleep(0.1)
        browser = Browser(f"http://127.0.0.1:{port}")
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.wait(timeout=20)
