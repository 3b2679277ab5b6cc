"""Tables of rotary angles.

Shapes: P positions, D head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal.core.model_spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """Angle per position of each of the D/2 pairs (float32), and the factor on cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inverse = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return inverse / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, inverse), 1.0
    if rope.kind == "yarn":
        factor = rope.attention_factor
        if factor is None:
            factor = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
        return _yarn(rope, inverse, head_dim), factor
    return inverse, 1.0


def _llama3(rope: RopeSpec, inverse: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    original = rope.original_max_len or 0
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * inverse / rope.factor + smooth * inverse
    result = torch.where(wavelength > original / rope.low_freq_factor, inverse / rope.factor, blended)
    return torch.where(wavelength < original / rope.high_freq_factor, inverse, result)


def _yarn(rope: RopeSpec, inverse: Tensor, head_dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071), section 3.2: a ramp over pairs between two numbers of rotations."""
    original = rope.original_max_len or 0

    def pair_with(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_with(rope.beta_fast)), 0)
    high = min(math.ceil(pair_with(rope.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return inverse / rope.factor * (1 - keep) + inverse * keep


def cos_sin_table(rope: RopeSpec, head_dim: int, num_positions: int) -> Tensor:
    """[cos | sin] of every position, float32, shape (P, D)."""
    inverse, factor = inverse_frequencies(rope, head_dim)
    angles_PD2 = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse)
    return torch.cat([angles_PD2.cos() * factor, angles_PD2.sin() * factor], dim=1)
