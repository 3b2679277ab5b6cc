from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vllm", type=Path, metavar="PYTHON", help="interpreter of an environment that has vLLM")
    parser.addoption("--full-faults", action="store_true", help="every kind of fault, which takes many minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full_faults: runs only with --full-faults")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full-faults", default=False):  # unknown unless this folder was named
        return
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("full_faults"):
            item.add_marker(pytest.mark.skip(reason="needs --full-faults"))


@pytest.fixture(scope="session")
def vllm_python(request: pytest.FixtureRequest) -> Path:
    python: Path | None = request.config.getoption("--vllm", default=None)  # unknown unless this folder was named
    if python is None:
        pytest.skip("needs vLLM: --vllm PYTHON")
    return python.absolute()
