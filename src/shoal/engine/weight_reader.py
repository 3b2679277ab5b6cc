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
from shoal.engine.weights import Part, WeightSource, read_part

NamedRows = tuple[str, Span | None]
"""A tensor of the checkpoint, and which of its rows; None is all."""
Fetch = Callable[[list[Part]], list[Tensor]]
"""Tensors of the checkpoint, which may be overwritten when the next ones are asked for."""


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
        fetch: Fetch | None = None,
    ) -> None:
        """`dtype` is of activations. `norm_plus_one`: the file holds norm weights minus one. `fetch` None reads each
        tensor from the source when it is asked for.
        """
        self.ops = ops
        self.num_bytes = 0
        """Of what was made."""
        self._source = source
        self._fetch = fetch or (lambda parts: [read_part(source, part) for part in parts])
        self._precision = precision
        self.device = device
        self._dtype = dtype
        self._norm_plus_one = norm_plus_one

    def _read(self, parts: list[Part]) -> list[Tensor]:
        return self._fetch([self._least(part) for part in parts])

    def _least(self, part: Part) -> Part:
        """All rows or all columns of a tensor are no part of it: they need not be cut out."""
        shape, (name, rows, columns) = self._source.shape(part.name), part
        if rows is not None and len(rows) == shape[0]:
            rows = None
        if columns is not None and len(columns) == shape[1]:
            columns = None
        return Part(name, rows, columns)

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
        parts = [Part(name, rows, columns) for name, rows in weights]
        tensors = self._read(parts + [Part(name, rows) for name, rows in biases or []])
        matrices, vectors = tensors[: len(weights)], tensors[len(weights) :]
        weight_NK = matrices[0] if len(matrices) == 1 else _joined(matrices)
        bias_N = _joined([vector.float() for vector in vectors]) if vectors else None
        packed = self.ops.pack(weight_NK, bias_N, precision or self._precision)
        self.num_bytes += packed.nbytes
        return packed

    def gated(self, gate: str, up: str, rows: Span) -> PackedLinear:
        gate_NK, up_NK = self._read([Part(gate, rows), Part(up, rows)])
        packed = self.ops.pack_gated(gate_NK, up_NK, self._precision)
        self.num_bytes += packed.nbytes
        return packed

    def matrix(self, name: str, rows: Span | None = None) -> Tensor:
        """(N, K) as torch keeps it, in the activations' precision, on the device."""
        return self._copy(Part(name, rows), self._dtype)

    def vector(self, name: str) -> Tensor:
        """(H) in float32 on the device."""
        return self._copy(Part(name), torch.float32)

    def norm(self, name: str) -> Tensor:
        """What normed values are multiplied by, (H) in float32 on the device."""
        weight_H = self.vector(name)
        return weight_H + 1.0 if self._norm_plus_one else weight_H

    def _copy(self, part: Part, dtype: torch.dtype) -> Tensor:
        # A copy even where nothing changes: what was read is overwritten soon.
        (tensor,) = self._read([part])
        copied = tensor.to(self.device, dtype, copy=True)
        self.num_bytes += copied.nbytes
        return copied


def _joined(parts: list[Tensor]) -> Tensor:
    """torch.cat, which for tensors without data (see weight_plan) imports 900 modules first and takes a second."""
    if parts[0].is_meta:
        return parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]))
    return torch.cat(parts)
