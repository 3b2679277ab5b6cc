"""One browser for all tests of the page, and a gateway for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.dashboard.browser import CHROMIUM, DRIVER, Browser, FakeGateway, open_browser


@pytest.fixture(scope="package")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    with open_browser(tmp_path_factory.mktemp("chromium") / "profile") as opened:
        yield opened


@pytest.fixture
def browser(window: Browser) -> Iterator[Browser]:
    """At a blank page, with nothing on the console."""
    window.open("about:blank")
    window.emulate()
    window.errors()
    yield window
    window.open("about:blank")


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    gateway = FakeGateway()
    gateway.start()
    yield gateway
    gateway.stop()
