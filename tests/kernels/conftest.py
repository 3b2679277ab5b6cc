"""Triton kernels on a CPU: its interpreter runs them, one program after the other, over numpy.

Whether kernels are compiled or interpreted is settled as they are defined: tests/conftest.py comes before all of them.
What the interpreter of Triton 3.6 does wrong with bfloat16, float8 and new numpy is put right here, so that kernels
need not be written around it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import INTERPRET

_TORCH = {
    "fp32": (torch.float32, np.uint32, torch.int32),
    "fp16": (torch.float16, np.uint16, torch.int16),
    "bf16": (torch.bfloat16, np.uint16, torch.int16),
    "fp8e4nv": (torch.float8_e4m3fn, np.uint8, torch.uint8),
    "fp8e5": (torch.float8_e5m2, np.uint8, torch.uint8),
}
"""Triton's name of a type: torch's, and those that hold its bits in numpy and in torch."""


def _repair(interpreter: Any) -> None:
    builder, handle_of, tl = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter.tl
    convert, patch, dot, cast = (
        interpreter._convert_float,
        interpreter._patch_lang_tensor,
        builder.create_dot,
        builder.cast_impl,
    )

    def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        """Rounded to the nearest as the hardware does. The original loses what carries into the exponent."""
        if source.name not in _TORCH or target.name not in _TORCH:
            return convert(data, source, target, rounding)
        (from_type, _, from_bits), (to_type, to_numpy, to_bits) = _TORCH[source.name], _TORCH[target.name]
        bits = torch.from_numpy(np.frombuffer(data.tobytes(), dtype=_numpy(from_bits)).copy())
        values = bits.view(from_type).to(to_type)
        return values.view(to_bits).numpy().view(to_numpy).reshape(data.shape)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar.name != "bf16":
            return handle
        return handle_of(converted(handle.data, handle.dtype.scalar, tl.float32, None).view(np.float32), tl.float32)

    def dotted(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        """bfloat16 is held as its bits, which the original multiplies as if they were integers."""
        return dot(self, widened(a), widened(b), d, *rest)

    def casted(self: Any, handle: Any, target: Any) -> Any:
        """Integers to bfloat16 and back, for the same reason by way of float32."""
        if target.scalar.name == "bf16" and handle.dtype.scalar.is_int():
            handle = cast(self, handle, tl.float32)
        elif target.scalar.is_int():
            handle = widened(handle)
        return cast(self, handle, target)

    def patched(tensor: Any, scope: Any) -> None:
        """Loops with bounds from memory: since numpy 2.4 an array of one element is no integer."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def with_mask(access: Any, place: int) -> Any:
        """Triton 3.9 makes int32 of a boolean that is spread over a block, and then does not take it for a mask."""

        def accessed(self: Any, *args: Any) -> Any:
            args[place].data = args[place].data.astype(bool)
            return access(self, *args)

        return accessed

    builder.create_masked_load = with_mask(builder.create_masked_load, 1)
    builder.create_masked_store = with_mask(builder.create_masked_store, 2)
    interpreter._convert_float = converted
    interpreter._patch_lang_tensor = patched
    builder.create_dot = dotted
    builder.cast_impl = casted


def _numpy(bits: torch.dtype) -> Any:
    return np.dtype(str(bits).removeprefix("torch."))


_INTERPRETED = importlib.util.find_spec("triton") is not None and INTERPRET in os.environ
if _INTERPRETED:
    _repair(importlib.import_module("triton.runtime.interpreter"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    if _INTERPRETED:
        os.environ[INTERPRET] = "1"


def pytest_runtest_teardown() -> None:
    os.environ.pop(INTERPRET, None)
