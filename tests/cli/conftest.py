"""A tiny checkpoint, and the command as a user starts it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint

SHOAL = (sys.executable, "-m", "shoal")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough a context that an answer can be interrupted."""
    return make_checkpoint("llama", tmp_path_factory.mktemp("cli") / "tiny", max_position_embeddings=32768)


def run_shoal(
    arguments: Sequence[object], *, stdin: str = "", seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    """The exit status and what was written. The timeout only bounds a hang."""
    command = [*SHOAL, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)
