from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vllm", type=Path, metavar="PYTHON", help="interpreter of an environment that has vLLM")


@pytest.fixture(scope="session")
def vllm_python(request: pytest.FixtureRequest) -> Path:
    python: Path | None = request.config.getoption("--vllm", default=None)  # unknown unless this folder was named
    if python is None:
        pytest.skip("needs vLLM: --vllm PYTHON")
    return python.absolute()
