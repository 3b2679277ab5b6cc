"""Matrices as quantised checkpoints have them: which tensors, which part of each a slice needs, how they are read.

compressed-tensors keeps `weight` (FP8 or int8) with `weight_scale`, or 4 bits along the input features in
`weight_packed`; DeepSeek's FP8 has `weight_scale_inv`, which is multiplied all the same. GPTQ packs 4 bits along the
input features and AWQ along the output features, in an order of its own; both have matrices transposed.

Shapes: N output features, K input features, G groups of them, R groups of output features.
"""

from __future__ import annotations

from collections.abc import Container
from math import ceil
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from shoal.core.quantization import QuantScheme
from shoal.core.sharding import Span
from shoal.engine.quantization.weight import QuantizedWeight, quantized, scales_of
from shoal.engine.weights import FLOATS, Part

_NIBBLES = 8
"""4-bit numbers in an int32."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Column c of eight is the nibble of this number, lowest first."""


class Slice(NamedTuple):
    """Of a matrix (N, K): what a rank takes."""

    rows: Span
    columns: Span

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)


class StoredMatrix(Protocol):
    """One matrix of a checkpoint whose tensors were read, or will have been."""

    shape: tuple[int, int]

    def weight(self, device: torch.device) -> QuantizedWeight:
        """Made on `device`, in memory of its own."""


class FloatMatrix:
    """A matrix of floats, to be quantised."""

    def __init__(self, scheme: QuantScheme, matrix_NK: Tensor) -> None:
        self.shape = (matrix_NK.shape[0], matrix_NK.shape[1])
        self._scheme = scheme
        self._matrix_NK = matrix_NK

    def weight(self, device: torch.device) -> QuantizedWeight:
        return quantized(self._matrix_NK.to(device), self._scheme)


class FileMatrix:
    """A slice of a quantised matrix. `parts` says what to read; its tensors are then set as `tensors`."""

    def __init__(self, scheme: QuantScheme, module: str, size: tuple[int, int], part: Slice) -> None:
        """`size` is (N, K) of the whole."""
        self.scheme = scheme
        self.shape = part.shape
        self._size = size
        self._part = part
        self._names = tensor_names(scheme, module)
        self.tensors: list[Tensor] = []

    @property
    def _units(self) -> tuple[int, int]:
        """Output and input features of one scale in the file."""
        n, k = self._size
        return self.scheme.rows or n, self.scheme.group or k

    def _blocks(self) -> Slice:
        """Scales that the slice meets, in groups of rows and of columns."""
        (rows, columns), (unit_n, unit_k) = self._part, self._units
        return Slice(_covering(rows, unit_n), _covering(columns, unit_k))

    def parts(self) -> list[Part]:
        names, (rows, columns), blocks = self._names, self._part, self._blocks()
        form = self.scheme.form
        if form in ("gptq", "awq"):
            words = _covering(columns, _NIBBLES) if form == "gptq" else columns
            across = rows if form == "gptq" else _covering(rows, _NIBBLES)
            return [
                Part(names.values, words, across),
                Part(names.scales, blocks.columns, rows),
                Part(names.zeros, blocks.columns, _covering(rows, _NIBBLES)),
            ]
        if self.scheme.weights == "int4":
            packed = Part(names.values, rows, _covering(columns, _NIBBLES))
            zeros = [] if self.scheme.symmetric else [Part(names.zeros, _covering(rows, _NIBBLES), blocks.columns)]
            return [packed, Part(names.scales, rows, blocks.columns), *zeros]
        found = [Part(names.values, rows, columns)]
        if self.scheme.group:
            found.append(Part(names.scales, *blocks))
        else:
            found.append(Part(names.scales, blocks.rows if self.scheme.rows else None))
        return [*found, Part(names.input_scale)] if self.scheme.activations == "tensor" else found

    def weight(self, device: torch.device) -> QuantizedWeight:
        tensors = [tensor.to(device) for tensor in self.tensors]
        if self.scheme.form in ("gptq", "awq"):
            return self._transposed(*tensors)
        return self._nibbles(*tensors) if self.scheme.weights == "int4" else self._bytes(*tensors)

    def _bytes(self, values_NK: Tensor, stored: Tensor, *rest: Tensor) -> QuantizedWeight:
        """FP8 or int8."""
        blocks, (unit_n, unit_k) = self._blocks(), self._units
        # One number may have no dimension, or a channel's scales only one.
        stored = stored.float().reshape(len(blocks.rows), len(blocks.columns))
        scales, rows = scales_of(stored, 0, unit_n, blocks.rows.start * unit_n, self._part.rows)
        scales, group = scales_of(scales, 1, unit_k, blocks.columns.start * unit_k, self._part.columns)
        input_scale = rest[0].float().reshape(-1).amax() if rest else None
        return QuantizedWeight(
            self.scheme, values_NK.clone(), scales.clone(), rows=rows, group=group, input_scale=input_scale
        )

    def _nibbles(self, packed: Tensor, stored: Tensor, *rest: Tensor) -> QuantizedWeight:
        (rows, columns), blocks, unit = self._part, self._blocks(), self._units[1]
        values_NK = _unpacked(packed, 1)[:, _within(columns, _NIBBLES)]
        zeros_NG = (
            _unpacked(rest[0], 0)[_within(rows, _NIBBLES)]
            if rest
            else torch.full(stored.shape, 8, device=stored.device)
        )
        return self._grouped(values_NK, stored, zeros_NG, blocks, unit)

    def _transposed(self, packed: Tensor, stored: Tensor, packed_zeros: Tensor) -> QuantizedWeight:
        (rows, columns), blocks, unit = self._part, self._blocks(), self._units[1]
        if self.scheme.form == "gptq":
            values_KN = _unpacked(packed, 0)[_within(columns, _NIBBLES)]
            zeros_GN = _unpacked(packed_zeros, 1)[:, _within(rows, _NIBBLES)]
        else:
            values_KN = _unpacked(packed, 1, _AWQ_ORDER)[:, _within(rows, _NIBBLES)]
            zeros_GN = _unpacked(packed_zeros, 1, _AWQ_ORDER)[:, _within(rows, _NIBBLES)]
        # In four bits, as the library that writes these files reads them: 15 stands for 0.
        zeros_GN = (zeros_GN + self.scheme.zero_offset) & 15
        return self._grouped(values_KN.T, stored.T, zeros_GN.T, blocks, unit)

    def _grouped(
        self, values_NK: Tensor, stored_NG: Tensor, zeros_NG: Tensor, blocks: Slice, unit: int
    ) -> QuantizedWeight:
        first, columns = blocks.columns.start * unit, self._part.columns
        scales, group = scales_of(stored_NG.float(), 1, unit, first, columns)
        zeros, _ = scales_of(zeros_NG, 1, unit, first, columns)
        return QuantizedWeight(
            self.scheme,
            values_NK.to(torch.uint8).contiguous(),
            scales.clone().contiguous(),
            rows=1,
            group=group,
            zeros_NG=zeros.to(torch.uint8).contiguous(),
        )


def _covering(span: Span, unit: int) -> Span:
    """Units that hold the span."""
    return Span(span.start // unit, ceil(span.stop / unit))


def _within(span: Span, unit: int) -> slice:
    """Where the span is among the elements of the units that hold it."""
    start = span.start % unit
    return slice(start, start + len(span))


def _unpacked(packed: Tensor, dim: int, order: tuple[int, ...] = tuple(range(_NIBBLES))) -> Tensor:
    """Eight numbers of 0 to 15, int32, along `dim` for each int32."""
    shifts = torch.tensor(order, dtype=torch.int32, device=packed.device) * 4
    nibbles = (packed.unsqueeze(-1) >> shifts) & 15
    return nibbles.flatten(1) if dim == 1 else nibbles.transpose(1, 2).flatten(0, 1)


# --- what a file holds ----------------------------------------------------------------------------------------------


class TensorNames(NamedTuple):
    values: str
    scales: str
    zeros: str
    input_scale: str


def tensor_names(scheme: QuantScheme, module: str) -> TensorNames:
    if scheme.form in ("gptq", "awq"):
        return TensorNames(f"{module}.qweight", f"{module}.scales", f"{module}.qzeros", "")
    values = "weight_packed" if scheme.weights == "int4" else "weight"
    scales = "weight_scale_inv" if scheme.form == "fp8" and scheme.group else "weight_scale"
    return TensorNames(
        f"{module}.{values}", f"{module}.{scales}", f"{module}.weight_zero_point", f"{module}.input_scale"
    )


CACHE_SCALES = (".k_scale", ".v_scale", ".kv_scale", ".q_scale", ".output_scale")
IGNORED_TENSORS = (".g_idx", ".weight_shape", ".weight_zero_point", *CACHE_SCALES)
"""The order of features where it is plain, sizes said elsewhere, zero points that are all 0; scales of a KV cache,
which are read where it is FP8, and of queries, which stay as they are."""


def cache_scale_names(attention: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What scales of keys and of values may be called, by who wrote the file; `attention` is what names begin with."""
    return tuple(  # type: ignore[return-value]
        tuple(attention + name for name in (f"{x}_scale", f"{x}_proj.{x}_scale", f"{x}_proj.output_scale", "kv_scale"))
        for x in "kv"
    )


def is_quantized(names: Container[str], scheme: QuantScheme | None, module: str) -> bool:
    """What the file has is what counts: lists of exceptions in configurations are by many rules."""
    return scheme is not None and tensor_names(scheme, module).scales in names and module != "model.embed_tokens"


def matrix_size(scheme: QuantScheme, stored: tuple[int, ...]) -> tuple[int, int]:
    """(N, K) of a matrix whose values have this shape in the file."""
    if scheme.form == "gptq":
        return stored[1], stored[0] * _NIBBLES
    if scheme.form == "awq":
        return stored[1] * _NIBBLES, stored[0]
    return stored[0], stored[1] * (_NIBBLES if scheme.weights == "int4" else 1)


def stored_kinds(scheme: QuantScheme, name: str) -> tuple[str, ...]:
    """Element types that a tensor of a quantised matrix may have."""
    if name.endswith((".weight_packed", ".qweight", ".qzeros", ".weight_zero_point")):
        return ("I32",)
    return FLOATS if not name.endswith(".weight") else ("F8_E4M3",) if scheme.weights == "fp8" else ("I8",)


def stored_shapes(scheme: QuantScheme, module: str, size: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Tensors of a quantised matrix (N, K), each with the shapes that it may have. 4 bits come in words of eight."""
    n, k = size
    names = tensor_names(scheme, module)
    groups, words_n, words_k = -(-k // (scheme.group or k)), -(-n // _NIBBLES), -(-k // _NIBBLES)
    if scheme.form == "gptq":
        return {names.values: ((words_k, n),), names.scales: ((groups, n),), names.zeros: ((groups, words_n),)}
    if scheme.form == "awq":
        return {names.values: ((k, words_n),), names.scales: ((groups, n),), names.zeros: ((groups, words_n),)}
    if scheme.weights == "int4":
        zeros = {} if scheme.symmetric else {names.zeros: ((words_n, groups),)}
        return {names.values: ((n, words_k),), names.scales: ((n, groups),), **zeros}
    scales: tuple[tuple[int, ...], ...] = ((-(-n // scheme.rows), groups),) if scheme.rows else ((), (1,), (1, 1))
    if scheme.rows == 1:
        scales = (*scales, (n,))
    found: dict[str, tuple[tuple[int, ...], ...]] = {names.values: (size,), names.scales: scales}
    return found | ({names.input_scale: ((), (1,))} if scheme.activations == "tensor" else {})
