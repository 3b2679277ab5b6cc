"""Triton kernels of a step. Its modules import triton, so they are imported only where `unavailable_reason` is None.

Each file has kernels and, below them, functions that check tensors and launch them. A launch never waits for the device
and reads nothing back, so it can be captured into a CUDA graph.
"""

from __future__ import annotations

import importlib.util
import os

import torch


def unavailable_reason(device: torch.device) -> str | None:
    """Why these kernels cannot run on the device; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install 'shoal[triton]'"
    if device.type == "cuda" or is_interpreted():
        return None
    return f"they are for cuda devices, and the device is {device}"


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, on tensors of the CPU: slow, and the way to test them anywhere."""
    return os.environ.get("TRITON_INTERPRET") == "1"
