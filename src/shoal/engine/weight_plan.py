"""What a model will ask of its checkpoint, found by building it once without any weights.

A decoder says by code, layer by layer, which tensors it takes and which slices of them. Run with a WeightReader whose
tensors have shapes and no data, that code says it beforehand, so that reads can run ahead of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.core.config import WeightPrecision
from shoal.engine.quantization.stored import StoredMatrix
from shoal.engine.weights import ANY_KIND, Part, WeightSource


class WeightPlan:
    """`fetch` and `ops` are what a WeightReader is made with; the device is `meta`."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.ops = _NoOps()
        self.groups: list[list[Part]] = []
        """In order; the parts of one are wanted at the same time."""

    def fetch(self, parts: list[Part]) -> list[Tensor]:
        self.groups.append(parts)
        return [self._blank(self._shape(part)) for part in parts]

    @staticmethod
    def _blank(shape: tuple[int, ...]) -> Tensor:
        # Vectors are small and computed with. To compute with tensors on `meta` torch imports a thousand modules.
        return torch.zeros(shape) if len(shape) < 2 else torch.empty(shape, device="meta")

    def _shape(self, part: Part) -> tuple[int, ...]:
        shape = list(self._source.shape(part.name, ANY_KIND))
        for dimension, span in ((0, part.rows), (1, part.columns)):
            if span is not None:
                shape[dimension] = len(span)
        return tuple(shape)


class _Unpacked:
    """What every PackedLinear says of itself."""

    nbytes = 0

    def __init__(self, out_features: int, in_features: int) -> None:
        self.out_features = out_features
        self.in_features = in_features


class _NoOps:
    """Packs nothing and computes nothing."""

    name = "none"
    fused = None

    def pack(self, weights: Sequence[Tensor], bias_N: Tensor | None, precision: WeightPrecision) -> _Unpacked:
        return _Unpacked(sum(len(matrix) for matrix in weights), weights[0].shape[1])

    def pack_gated(self, gate_NK: Tensor, up_NK: Tensor, precision: WeightPrecision) -> _Unpacked:
        return _Unpacked(*gate_NK.shape)

    def pack_quantized(
        self, matrices: Sequence[StoredMatrix], bias_N: Tensor | None, precision: WeightPrecision, *, gated: bool
    ) -> _Unpacked:
        rows = sum(matrix.shape[0] for matrix in matrices)
        return _Unpacked(rows // 2 if gated else rows, matrices[0].shape[1])
