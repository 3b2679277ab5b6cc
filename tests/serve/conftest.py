from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.serve.running import RunningServer, running


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a context so long that a request can run until it is told to end."""
    return make_checkpoint("llama", tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=8192)


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[RunningServer]:
    """One server for all tests of a module; at its end nothing may be left running in it."""
    with running(checkpoint) as server:
        yield server
        server.wait_for_metric("shoal:num_requests_waiting", 0)
        server.wait_for_metric("shoal:num_requests_running", 0)
        server.wait_for_metric("shoal:kv_cache_usage_perc", 0)
