"""Tensors of a checkpoint, or a rank's slices of them, made into what layers compute with, and counted on the way.

Shapes: N output features, K input features, H size of a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from shoal.checkpoint.errors import CheckpointError
from shoal.core.config import WeightPrecision
from shoal.core.quantization import QuantScheme
from shoal.core.sharding import Span
from shoal.engine.ops import Ops, PackedLinear
from shoal.engine.quantization.stored import (
    FileMatrix,
    FloatMatrix,
    Slice,
    StoredMatrix,
    cache_scale_names,
    is_quantized,
    matrix_size,
    tensor_names,
)
from shoal.engine.weights import ANY_KIND, Part, TensorSource

Matrix = Tensor | FileMatrix
"""As a file has it: in floats, or in few bits."""
NamedRows = tuple[str, Span | None]
"""A tensor of the checkpoint, and which of its rows; None is all."""
Fetch = Callable[[list[Part]], list[Tensor]]
"""Tensors of the checkpoint, which may be overwritten when the next ones are asked for."""


class WeightReader:
    def __init__(
        self,
        source: TensorSource,
        ops: Ops,
        precision: WeightPrecision,
        *,
        device: torch.device,
        dtype: torch.dtype,
        norm_plus_one: bool = False,
        fetch: Fetch | None = None,
        stored: QuantScheme | None = None,
        quantize: QuantScheme | None = None,
    ) -> None:
        """`dtype` is of activations. `norm_plus_one`: the file holds norm weights minus one. `fetch` None reads each
        tensor from the source when it is asked for. `stored` is how the file has its matrices, `quantize` what is made
        of those that it has in floats.
        """
        self.ops = ops
        self.num_bytes = 0
        """Of what was made."""
        self._source = source
        self._fetch = fetch or (lambda parts: [source.tensor(*part) for part in parts])
        self._precision = precision
        self.device = device
        self._dtype = dtype
        self._norm_plus_one = norm_plus_one
        self._stored = stored
        self._quantize = quantize
        self._names = frozenset(source.names())

    def _read(self, parts: list[Part]) -> list[Tensor]:
        return self._fetch([self._least(part) for part in parts])

    def _least(self, part: Part) -> Part:
        """All rows or all columns of a tensor are no part of it: they need not be cut out."""
        shape, (name, rows, columns) = self._source.shape(part.name, ANY_KIND), part
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
        matrices, vectors = self._read_matrices(parts, [Part(name, rows) for name, rows in biases or []])
        bias_N = torch.cat([vector.float() for vector in vectors]) if vectors else None
        few_bits = self._few_bits(parts, matrices) if precision is None else None
        if few_bits is not None:
            packed = self.ops.pack_quantized(few_bits, bias_N, self._precision, gated=False)
        else:
            packed = self.ops.pack(self._floats(matrices), bias_N, precision or self._precision)
        self.num_bytes += packed.nbytes
        return packed

    def gated(self, gate: str, up: str, rows: Span) -> PackedLinear:
        parts = [Part(gate, rows), Part(up, rows)]
        matrices, _ = self._read_matrices(parts, [])
        few_bits = self._few_bits(parts, matrices)
        if few_bits is not None:
            packed = self.ops.pack_quantized(few_bits, None, self._precision, gated=True)
        else:
            gate_NK, up_NK = self._floats(matrices)
            packed = self.ops.pack_gated(gate_NK, up_NK, self._precision)
        self.num_bytes += packed.nbytes
        return packed

    def _read_matrices(self, weights: list[Part], others: list[Part]) -> tuple[list[Matrix], list[Tensor]]:
        """All at once: matrices as the file has them, and further tensors."""
        stored = [self._stored_matrix(part) for part in weights]
        wanted = [[part] if file is None else file.parts() for part, file in zip(weights, stored, strict=True)]
        tensors = iter(self._read([part for parts in wanted for part in parts] + others))
        matrices: list[Matrix] = []
        for file, parts in zip(stored, wanted, strict=True):
            taken = [next(tensors) for _ in parts]
            if file is not None:
                file.tensors = taken
            matrices.append(taken[0] if file is None else file)
        return matrices, list(tensors)

    def _stored_matrix(self, part: Part) -> FileMatrix | None:
        """None for one that is stored in floats."""
        scheme, module = self._stored, part.name.removesuffix(".weight")
        if scheme is None or not is_quantized(self._names, scheme, module):
            return None
        size = matrix_size(scheme, self._source.shape(tensor_names(scheme, module).values, ANY_KIND))
        rows, columns = part.rows or Span(0, size[0]), part.columns or Span(0, size[1])
        return FileMatrix(scheme, module, size, Slice(rows, columns))

    def _few_bits(self, parts: list[Part], matrices: list[Matrix]) -> list[StoredMatrix] | None:
        """The same for a product in few bits; None where that is not wanted, or the file has only some of them so."""
        stored = [matrix for matrix in matrices if isinstance(matrix, FileMatrix)]
        if len(stored) == len(matrices):
            return list(stored)
        scheme = self._quantize
        if scheme is None or stored or not all(scheme.covers(part.name.removesuffix(".weight")) for part in parts):
            return None
        return [FloatMatrix(scheme, matrix) for matrix in matrices if isinstance(matrix, Tensor)]

    def _floats(self, matrices: list[Matrix]) -> list[Tensor]:
        """Those of few bits dequantised, (N, K) each."""
        return [matrix if isinstance(matrix, Tensor) else self._dequantized(matrix) for matrix in matrices]

    def _dequantized(self, matrix: FileMatrix) -> Tensor:
        if self.device.type == "meta":  # while a plan is made, nothing has been read
            return torch.empty(matrix.shape, device=self.device)
        return matrix.weight(self.device).dequantized()

    def matrix(self, name: str, rows: Span | None = None) -> Tensor:
        """(N, K) as torch keeps it, in the activations' precision, on the device."""
        matrices, _ = self._read_matrices([Part(name, rows)], [])
        return self._kept(self._floats(matrices)[0], self._dtype)

    def vector(self, name: str) -> Tensor:
        """(H) in float32 on the device."""
        return self._kept(self._read([Part(name)])[0], torch.float32)

    def cache_scales(self, attention: str, heads: Span, num_heads: int) -> tuple[Tensor, Tensor] | None:
        """What the FP8 keys and values of `heads`, of `num_heads` key/value heads, are multiplied by: (M) in float32
        each; None where the file has no scales. Its names begin with `attention`.

        Raises CheckpointError for one without the other, for other sizes, and for what is not positive.
        """
        candidates = cache_scale_names(attention)
        names = [next((name for name in some if name in self._names), None) for some in candidates]
        if names == [None, None]:
            return None
        parts = []
        for name, some in zip(names, candidates, strict=True):
            if name is None:
                raise CheckpointError(self._source.path, f"tensor {some[0]} is missing: a KV cache has scales of both")
            shape = self._source.shape(name)
            if prod(shape) not in (1, num_heads):
                says = f"one number, or one for each of {num_heads} key/value heads"
                raise CheckpointError(self._source.path, f"tensor {name} has shape {shape}, a KV cache takes {says}")
            parts.append(Part(name))
        keys, values = (
            scale.flatten().float().expand(num_heads)[heads.slice].to(self.device, copy=True)
            for scale in self._read(parts)
        )
        is_planned = self.device.type == "meta"  # nothing has been read
        for part, scales in zip(parts, (keys, values), strict=True):
            if not is_planned and not (scales.isfinite() & (scales > 0)).all():
                raise CheckpointError(self._source.path, f"tensor {part.name} must be positive, got {scales.tolist()}")
        return keys, values

    def norm(self, name: str) -> Tensor:
        """What normed values are multiplied by, (H) in float32 on the device."""
        weight_H = self._read([Part(name)])[0]
        return self._kept(weight_H.float() + 1.0 if self._norm_plus_one else weight_H, torch.float32)

    def _kept(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        # A copy even where nothing changes: what was read is overwritten soon.
        copied = tensor.to(self.device, dtype, copy=True)
        self.num_bytes += copied.nbytes
        return copied
