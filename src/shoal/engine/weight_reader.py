"""Tensors of a checkpoint, or a rank's slices of them, made into what layers compute with, and counted on the way.

Shapes: N output features, K input features, H size of a vector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shoal.core.config import WeightPrecision
from shoal.core.sharding import Span
from shoal.engine.ops import Ops, PackedLinear
from shoal.engine.weights import WeightSource

NamedRows = tuple[str, Span | None]
"""A tensor of the checkpoint, and which of its rows; None is all."""


class WeightReader:
    def __init__(
        self,
        source: WeightSource,
        ops: Ops,
        precision: WeightPrecision,
        *,
        device: torch.device,
        dtype: torch.dtype,
        norm_plus_one: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """`dtype` is of activations. `norm_plus_one`: the file holds norm weights minus one. `progress` is called with
        the parameters read so far.
        """
        self.ops = ops
        self.num_read = 0
        """Parameters."""
        self.num_bytes = 0
        """Of what was made of them."""
        self._source = source
        self._precision = precision
        self.device = device
        self._dtype = dtype
        self._norm_plus_one = norm_plus_one
        self._progress = progress

    def _read(self, name: str, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        shape = self._source.shape(name)
        if rows is not None and len(rows) == shape[0]:
            rows = None  # all of it can be mapped instead of copied
        if columns is not None and len(columns) == shape[1]:
            columns = None
        tensor = self._source.tensor(name, rows, columns)
        self.num_read += tensor.numel()
        if self._progress is not None:
            self._progress(self.num_read)
        return tensor

    def linear(
        self,
        weights: list[NamedRows],
        biases: list[NamedRows] | None = None,
        columns: Span | None = None,
        precision: WeightPrecision | None = None,
    ) -> PackedLinear:
        """Several projections of the same input, or of the same columns of it, become one.

        `precision` is the model's unless it is given.
        """
        parts = [self._read(name, rows, columns) for name, rows in weights]
        weight_NK = parts[0] if len(parts) == 1 else torch.cat(parts)
        bias_N = torch.cat([self._read(name, rows).float() for name, rows in biases]) if biases else None
        packed = self.ops.pack(weight_NK, bias_N, precision or self._precision)
        self.num_bytes += packed.nbytes
        return packed

    def gated(self, gate: str, up: str, rows: Span) -> PackedLinear:
        packed = self.ops.pack_gated(self._read(gate, rows), self._read(up, rows), self._precision)
        self.num_bytes += packed.nbytes
        return packed

    def matrix(self, name: str, rows: Span | None = None) -> Tensor:
        """(N, K) as torch keeps it, in the activations' precision, on the device."""
        return self._copy(self._read(name, rows), self._dtype)

    def vector(self, name: str) -> Tensor:
        """(H) in float32 on the device."""
        return self._copy(self._read(name), torch.float32)

    def norm(self, name: str) -> Tensor:
        """What normed values are multiplied by, (H) in float32 on the device."""
        weight_H = self.vector(name)
        return weight_H + 1.0 if self._norm_plus_one else weight_H

    def _copy(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        # A copy even where nothing changes: what was read may be a memory map that is closed soon.
        copied = tensor.to(self.device, dtype, copy=True)
        self.num_bytes += copied.nbytes
        return copied
