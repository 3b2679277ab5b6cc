"""Every kernel of the step compiles for GPUs that are not here, down to machine code, and keeps its registers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)


@pytest.mark.timeout(600)  # nothing is in the compiler's cache on a fresh machine
@pytest.mark.parametrize("capability", [90])
def test_kernels_compile(capability: int) -> None:
    """In a process of its own: here the interpreter took the compiler's place."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiling", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    kernels = {name for name, *_ in found}
    assert {
        "_norm_kernel",
        "_gate_kernel",
        "_rope_kernel",
        "_floor_kernel",
        "_race_kernel",
        "_expert_kernel",
    } <= kernels
    # A kernel whose values do not fit the registers keeps them in memory, and is as slow as that. The largest tile of
    # experts of 8 bits puts one aside before its loops and takes it back behind them: 4 bytes stored, 4 loaded.
    assert [line for line in found if int(line[1]) > (8 if line[0] == "_expert_kernel" else 0)] == []
