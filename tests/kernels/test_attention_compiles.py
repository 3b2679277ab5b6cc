"""The attention kernels as machine code of a GPU that is not there: they compile, fit, and keep to their registers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the package triton is not installed: its kernels cannot be compiled")
pytest.importorskip("tests.kernels.compiling", reason="what compiles kernels without a GPU is not there")

HOPPER_SHARED_BYTES = 227 * 1024
"""That one program may have."""
IN_FULL_PRECISION = "float32"
"""Spills: three products of TF32 for each, which is for tests and small models."""


def test_hopper_has_room_for_them() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.attention_launches", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = [line.split() for line in done.stdout.splitlines()]
    names = {name for _, name, *_ in kernels}
    paged = {"_write_kernel", "_prefill_kernel", "_decode_kernel", "_merge_kernel"}
    assert names == paged | {"_latent_kernel", "_latent_write_kernel"}
    for what, name, spilled, _, shared in kernels:
        assert int(shared) <= HOPPER_SHARED_BYTES, (what, name, shared)
        # 64 heads by 512 numbers of output are half of all registers: what little of the rest is spilled is for once.
        most = 256 if what.startswith("latents") else 0
        assert what == IN_FULL_PRECISION or int(spilled) <= most, (what, name, spilled)
