"""A headless Chromium that reads the page as people would, over chromedriver's WebDriver HTTP; and a gateway to ask."""

from __future__ import annotations

import base64
import contextlib
import http.server
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

from shoal.core.fleet_types import FleetStatus
from shoal.serve.dashboard.assets import HEADERS, dashboard_assets
from tests.serve.fleet_statuses import every_state

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window. Scripts run by `read` are this driver's and not bound by the page's own policy."""

    def __init__(self, client: httpx.Client, session: str) -> None:
        self._client = client
        self._session = session

    def call(self, path: str, **body: Any) -> Any:
        answer = self._client.post(f"/session/{self._session}/{path}", json=body).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise AssertionError(f"{path}: {answer['message']}")
        return answer

    def open(self, url: str) -> None:
        self.call("url", url=url)

    def read(self, script: str) -> Any:
        return self.call("execute/sync", script=f"return {script}", args=[])

    def text(self, selector: str = "body") -> str:
        """As it is shown. (`innerText` of what is itself hidden would be all its text.)"""
        node = f"document.querySelector({selector!r})"
        return str(self.read(f"{node}?.checkVisibility() ? {node}.innerText : ''"))

    def click(self, selector: str) -> None:
        self.call(f"element/{self._find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        self.call(f"element/{self._find(selector)}/value", text=text)

    def _find(self, selector: str) -> str:
        return str(self.call("element", using="css selector", value=selector)[_ELEMENT])

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
        """The timeout only bounds a hang."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"{what}; the page shows {self.text()!r} and {self.errors()}"
            time.sleep(0.05)
        return found

    def errors(self) -> list[str]:
        """What the console was told since the last call, refusals by the page's policy among it."""
        return [entry["message"] for entry in self.call("se/log", type="browser")]

    def emulate(self, *, width: int = 1440, height: int = 1000, **media: str) -> None:
        """`media` as prefers_color_scheme="dark"."""
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self._devtools("Emulation.setEmulatedMedia", features=features)
        self._devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def screenshot(self, file: Path) -> None:
        shot = self._devtools("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _devtools(self, command: str, **parameters: Any) -> Any:
        return self.call("goog/cdp/execute", cmd=command, params=parameters)


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    assert CHROMIUM is not None and DRIVER is not None
    port = _free_port()
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"],
        env=os.environ | {"TMPDIR": str(profile.parent)},  # what it leaves behind goes with the test's own files
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
    wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=90, trust_env=False) as client:
            _wait_for(client)
            answer = client.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
            assert "sessionId" in answer, answer
            try:
                yield Browser(client, answer["sessionId"])
            finally:
                client.delete(f"/session/{answer['sessionId']}")
    finally:
        driver.terminate()
        driver.wait(timeout=30)


def _free_port() -> int:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        return server.server_port


def _wait_for(client: httpx.Client) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            if client.get("/status").json()["value"]["ready"]:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end, "chromedriver does not answer"
        time.sleep(0.05)


class FakeGateway:
    """What a test says a gateway would answer, on loopback; may be stopped and started again on its port."""

    def __init__(self) -> None:
        self.status: FleetStatus = every_state()
        self.api_key: str | None = None
        self.answer: tuple[int, bytes] | None = None
        """In place of the status."""
        self.asked: list[tuple[str, str]] = []
        """(path, authorization) of every request."""
        self.port = 0
        self._server: http.server.ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        gateway, assets = self, dashboard_assets()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                authorization = self.headers.get("authorization", "")
                gateway.asked.append((self.path, authorization))
                if self.path in assets:
                    asset = assets[self.path]
                    self._send(200, asset.body, {"content-type": asset.content_type, **HEADERS})
                elif self.path != "/fleet":
                    self._send(404, b"{}", {})
                elif gateway.api_key is not None and authorization != f"Bearer {gateway.api_key}":
                    self._send(401, b"{}", {})
                else:
                    status, body = gateway.answer or (200, msgspec.json.encode(gateway.status))
                    self._send(status, body, {"content-type": "application/json"})

            def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for key, value in {**headers, "content-length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
