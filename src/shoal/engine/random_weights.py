"""A checkpoint that is not there: random tensors of the shapes that a configuration asks for, made on the device.

For benchmarks and profiles of models whose weights nobody wants to fetch. Steps take the time that they take with real
weights, for nothing in them depends on values but which experts are chosen; what is generated means nothing.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor

from shoal.core.model_spec import ModelSpec
from shoal.core.sharding import Span
from shoal.engine.checkpoint_shapes import expected_shapes
from shoal.engine.weights import FLOATS

DEVIATION = 0.02
"""Of matrices, as models are initialised: activations keep a size that no precision overflows at."""


class RandomWeights:
    """A TensorSource. Equal names give equal values on one kind of device, whichever rows of them are asked for."""

    def __init__(self, path: Path, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        """`path` is of the configuration, for messages. `dtype` is what tensors are made in."""
        self.path = path
        self._shapes = expected_shapes(spec)
        self._device = device
        self._dtype = dtype

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str, kinds: tuple[str, ...] = FLOATS) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        shape = self._shapes[name]
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        if len(shape) < 2:
            # Norms near 1, biases likewise: what is multiplied by them keeps its size.
            made = torch.empty(shape, device=self._device)
            return made.normal_(1.0, DEVIATION, generator=generator)
        made = torch.empty(shape, dtype=self._dtype, device=self._device)
        made.normal_(0.0, DEVIATION, generator=generator)
        made = made if rows is None else made[rows.slice]
        return made if columns is None else made[:, columns.slice]

    def close(self) -> None:
        """Nothing is open."""
