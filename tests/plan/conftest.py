"""Plans in tests rest on what ships with shoal, not on what the user who runs them has added."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_hardware_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "config"))
