"""Headless Chromium, driven by its DevTools protocol."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import connect
from websockets.sync.connection import Connection

from support.running import PATIENCE_S, wait_until

CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")
"""The first takes a third of the processor time of the second."""

DESKTOP, PHONE = (1280, 900), (390, 844)


class Page:
    """A tab, with its requests and error messages."""

    def __init__(self, connection: Connection, session: str, context: str) -> None:
        self.context = context
        self._connection = connection
        self._session = session
        self._number = 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "sessionId": self._session, "method": method, "params": parameters}
        self._connection.send(json.dumps(message))
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._connection.recv(timeout=PATIENCE_S))
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, url: str) -> Self:
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.loaded()
        return self

    def loaded(self) -> None:
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def run(self, script: str) -> Any:
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        wait_until(lambda: self.run(script))

    def click(self, selector: str) -> None:
        """Click like a mouse."""
        x, y = self.run(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)}); node.scrollIntoView();"
            " const box = node.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def set_view(self, size: tuple[int, int], scheme: str = "light") -> None:
        """Show the page in a window of that size, with that colour scheme."""
        width, height = size
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=size == PHONE
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: str) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    @property
    def requested(self) -> list[str]:
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [request["request"]["url"] for request in sent]

    @property
    def errors(self) -> list[object]:
        """Return what the browser logged and failed to load."""
        noisy = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.loadingFailed")
        logged = [event["params"] for event in self.events if event["method"] in noisy]
        return [
            params for params in logged if "favicon.ico" not in str(params)
        ]  # requested unless a page names another icon


@contextmanager
def chromium(profile: Path) -> Iterator[Connection]:
    """Start Chromium with an empty profile directory. Yield the connection to it."""
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    options += (
        " --disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-port=0"
    )
    command = [str(CHROMIUM), *options.split(), f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + PATIENCE_S
        while not (port_file.exists() and "\n" in port_file.read_text()):
            assert time.monotonic() < deadline, "chromium does not start"
            assert process.poll() is None
            time.sleep(0.05)
        port, path = port_file.read_text().split()
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None) as connection:
            yield connection
            connection.send(json.dumps({"id": 0, "method": "Browser.close"}))
            process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()


@contextmanager
def open_tab(chromium: Connection) -> Iterator[Page]:
    """Open a tab with cookies and caches of its own."""

    def browser(method: str, **parameters: object) -> dict[str, Any]:
        chromium.send(json.dumps({"id": 0, "method": method, "params": parameters}))
        while (answer := json.loads(chromium.recv(timeout=PATIENCE_S))).get("id") != 0:
            pass
        result: dict[str, Any] = answer["result"]
        return result

    context = browser("Target.createBrowserContext")["browserContextId"]
    target = browser("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
    session = browser("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    tab = Page(chromium, session, context)
    tab.set_view(DESKTOP)
    yield tab
    browser("Target.disposeBrowserContext", browserContextId=context)
