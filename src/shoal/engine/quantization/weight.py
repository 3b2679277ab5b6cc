"""QuantizedWeight: a matrix in few bits with its scales, in the one form that every stored form is brought to.

Whatever slice of a file's matrix a rank takes, the scales go with it: where a cut falls between two features that share
one, the scale is repeated for smaller groups, so groups always begin at the slice's first feature.

Shapes: N output features, K input features, R groups of output features that share a scale, G groups of input features
that do, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.core.quantization import QuantScheme
from shoal.core.sharding import Span

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INT8_MAX = 127.0
_LEAST = 1e-12
"""Of an absolute maximum: a row of zeros has a scale too."""


class QuantizedWeight:
    """weight[n, k] = (values[n, k] - zeros[n, k // group]) * scales[n // rows, k // group]; without zeros 0 is 0."""

    def __init__(
        self,
        scheme: QuantScheme,
        values_NK: Tensor,
        scales_RG: Tensor,
        *,
        rows: int,
        group: int,
        zeros_NG: Tensor | None = None,
        input_scale: Tensor | None = None,
    ) -> None:
        """`values_NK` is e4m3, int8, or with zeros uint8 of 0 to 15; scales are float32; `input_scale` is one number,
        float32, of activations whose scale the file has.
        """
        self.scheme = scheme
        self.values_NK = values_NK
        self.scales_RG = scales_RG
        self.zeros_NG = zeros_NG
        self.rows = rows
        self.group = group
        self.input_scale = input_scale
        self.out_features, self.in_features = values_NK.shape

    def dequantized(self) -> Tensor:
        """(N, K) in float32: the truth."""
        n, k = self.values_NK.shape
        values = self.values_NK.float()
        if self.zeros_NG is not None:
            values = values - self.zeros_NG.float().repeat_interleave(self.group, dim=1)[:, :k]
        scales = self.scales_RG.repeat_interleave(self.rows, dim=0)[:n].repeat_interleave(self.group, dim=1)[:, :k]
        return values * scales

    def refined(self, rows: int, group: int) -> QuantizedWeight:
        """The same with scales for every `rows` and `group` features, which divide those that it has.

        Or which exceed them, where there is but one group in that direction.
        """
        if (rows, group) == (self.rows, self.group):
            return self
        scales_RG = _repeated(_repeated(self.scales_RG, 0, self.rows // rows), 1, self.group // group)
        zeros_NG = None if self.zeros_NG is None else _repeated(self.zeros_NG, 1, self.group // group)
        scales_RG = scales_RG[: -(-self.out_features // rows), : -(-self.in_features // group)]
        return QuantizedWeight(
            self.scheme,
            self.values_NK,
            scales_RG,
            rows=rows,
            group=group,
            zeros_NG=None if zeros_NG is None else zeros_NG[:, : scales_RG.shape[1]],
            input_scale=self.input_scale,
        )


def _repeated(x: Tensor, dim: int, times: int) -> Tensor:
    return x if times <= 1 else x.repeat_interleave(times, dim=dim)


def stacked(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One below the other: layers of the same input, of one scheme."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if any((part.scheme, part.in_features) != (first.scheme, first.in_features) for part in parts):
        raise ValueError("layers of one input are quantised alike and take as many features")
    group = gcd(*(part.group for part in parts))
    # A part's last block of rows may be cut short: the next part's begins inside of it.
    rows = gcd(*(part.rows for part in parts), *(part.out_features for part in parts[:-1]))
    parts = [part.refined(rows, group) for part in parts]
    zeros = [part.zeros_NG for part in parts if part.zeros_NG is not None]
    inputs = [part.input_scale for part in parts if part.input_scale is not None]
    return QuantizedWeight(
        first.scheme,
        torch.cat([part.values_NK for part in parts]),
        torch.cat([part.scales_RG for part in parts]),
        rows=rows,
        group=group,
        zeros_NG=torch.cat(zeros) if zeros else None,
        # The widest of them: the others' inputs are the same numbers.
        input_scale=torch.stack(inputs).amax() if inputs else None,
    )


def scales_of(stored: Tensor, dim: int, unit: int, first: int, span: Span) -> tuple[Tensor, int]:
    """Scales of the features `span` along `dim`, and how many features share one of them.

    `stored` begins with the scale of feature `first`; in it each scale is of `unit` features. Smaller groups result
    only where the span begins inside of one.
    """
    fine = gcd(unit, span.start - first)
    start = (span.start - first) // fine
    count = -(-len(span) // fine)
    return _repeated(stored, dim, unit // fine).narrow(dim, start, count), fine


# --- from floats ----------------------------------------------------------------------------------------------------


def quantized(weight_NK: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Round to nearest, scales by the largest magnitude; for int4 by the range of each group."""
    weight_NK = weight_NK.float()
    n, k = weight_NK.shape
    if scheme.weights == "int4":
        return _int4(weight_NK, scheme)
    top = FP8_MAX if scheme.weights == "fp8" else INT8_MAX
    scales_N1 = weight_NK.abs().amax(dim=1, keepdim=True).clamp_min(_LEAST) / top
    scaled = weight_NK / scales_N1
    values = scaled.clamp(-top, top).to(FP8) if scheme.weights == "fp8" else scaled.round().to(torch.int8)
    return QuantizedWeight(scheme, values, scales_N1, rows=1, group=k)


def _int4(weight_NK: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Each group's range from its least to its greatest, 0 included, on 16 steps."""
    n, k = weight_NK.shape
    group = gcd(scheme.group, k) if scheme.group else k
    grouped = weight_NK.view(n, k // group, group)
    low_NG = grouped.amin(dim=2).clamp_max(0.0)
    scales_NG = (grouped.amax(dim=2).clamp_min(0.0) - low_NG).clamp_min(_LEAST) / 15.0
    zeros_NG = (-low_NG / scales_NG).round().clamp(0, 15)
    values = (grouped / scales_NG[:, :, None]).round() + zeros_NG[:, :, None]
    values_NK = values.clamp(0, 15).view(n, k).to(torch.uint8)
    return QuantizedWeight(scheme, values_NK, scales_NG, rows=1, group=group, zeros_NG=zeros_NG.to(torch.uint8))


def quantize_rows(x_TK: Tensor, scheme: QuantScheme, group: int, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Activations in the weights' precision, and their scales (T, G), or (1, 1) where the file has the scale.

    `group` features share a scale where the scheme says so.
    """
    x = x_TK.float()
    t, k = x.shape
    top = FP8_MAX if scheme.weights == "fp8" else INT8_MAX
    if scheme.activations == "tensor" and input_scale is not None:
        scales_TG = input_scale.reshape(1, 1)
        spread = scales_TG
    else:
        size = group if scheme.activations == "group" else k
        padded = torch.nn.functional.pad(x, (0, -k % size)).view(t, -(-k // size), size)
        scales_TG = padded.abs().amax(dim=2).clamp_min(_LEAST) / top
        if scheme.scales_are_powers_of_two:
            scales_TG = torch.exp2(torch.ceil(torch.log2(scales_TG)))
        spread = scales_TG.repeat_interleave(size, dim=1)[:, :k]
    scaled = (x / spread).clamp(-top, top)
    values = scaled.to(FP8) if scheme.weights == "fp8" else scaled.round().to(torch.int8)
    return values, scales_TG


# --- for kernels ----------------------------------------------------------------------------------------------------

_MAX_BLOCK_K = 128
_MIN_BLOCK_K = 32
"""An FP8 product takes 32 input features at once, two of 16-bit numbers 16 each."""


def block_k_of(group: int, in_features: int) -> int:
    """Input features of one step of the kernels: of one group all of them. 0 if the groups are too odd for kernels."""
    block = _MAX_BLOCK_K if group >= in_features else gcd(group, _MAX_BLOCK_K)
    return block if block >= _MIN_BLOCK_K else 0


def packed_nibbles(values_NK: Tensor, block_k: int) -> Tensor:
    """Two 4-bit numbers a byte, (N, blocks * block_k / 2): of each block the first half low, the second half high."""
    n, k = values_NK.shape
    padded = torch.nn.functional.pad(values_NK, (0, -k % block_k)).view(n, -1, 2, block_k // 2)
    return (padded[:, :, 0] | (padded[:, :, 1] << 4)).flatten(1).contiguous()


class KernelWeight(NamedTuple):
    """A QuantizedWeight as kernels read it, contiguous. Of several experts each tensor has a dimension L in front."""

    values: Tensor
    """(N, K) of FP8 or int8; with zeros as `packed_nibbles` gives it."""
    scales_RG: Tensor
    zeros_NG: Tensor | None
    rows: int
    group: int
    in_features: int

    @classmethod
    def of(cls, weight: QuantizedWeight, device: torch.device) -> KernelWeight:
        values, zeros_NG = weight.values_NK.to(device), weight.zeros_NG
        if zeros_NG is not None:
            values = packed_nibbles(values, block_k_of(weight.group, weight.in_features))
            zeros_NG = zeros_NG.to(device).contiguous()
        scales_RG = weight.scales_RG.to(device).contiguous()
        return cls(values.contiguous(), scales_RG, zeros_NG, weight.rows, weight.group, weight.in_features)

    @classmethod
    def stacked(cls, weights: Sequence[KernelWeight], count: int) -> KernelWeight | None:
        """Of several experts; None where these are not `count`, or not of one form."""
        forms = {(w.values.dtype, w.values.shape, w.scales_RG.shape, w.zeros_NG is None, *w[3:]) for w in weights}
        if len(forms) != 1 or len(weights) != count:
            return None
        zeros = [weight.zeros_NG for weight in weights if weight.zeros_NG is not None]
        return cls(
            torch.stack([weight.values for weight in weights]),
            torch.stack([weight.scales_RG for weight in weights]),
            torch.stack(zeros) if zeros else None,
            *weights[0][3:],
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.values, self.scales_RG, self.zeros_NG) if tensor is not None)
