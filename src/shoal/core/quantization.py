"""QuantScheme: how weights are stored in few bits, in one neutral form. `quantization_config` reads it from files.

Shapes: N output features of a linear layer, K input features.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Quantization = Literal["fp8", "int8", "int4"]
"""What weights are stored as: FP8 is e4m3."""
ActivationScale = Literal["none", "tensor", "token", "group"]
"""none: products are of float activations. tensor: one scale from the file; token: each row's own, computed as it
comes; group: as token, for each `group` features of a row."""
Form = Literal["at_load", "compressed-tensors", "fp8", "gptq", "awq"]


class QuantScheme(msgspec.Struct, frozen=True, kw_only=True):
    """weight[n, k] = (stored[n, k] - zero[n, k // group]) * scale[n // rows, k // group]."""

    weights: Quantization
    form: Form
    """Who wrote the file: what its tensors are called and how they are laid out."""
    group: int = 0
    """Input features that share a scale; 0: all of them."""
    rows: int = 1
    """Output features that share a scale; 0: all of them."""
    symmetric: bool = True
    """No zero points in the file."""
    activations: ActivationScale = "none"
    zero_offset: int = 0
    """Added to the file's zero points: GPTQ's first format stores them less one."""
    scales_are_powers_of_two: bool = False
    """Of activations too (DeepSeek-V3.1's ue8m0)."""
    ignored: tuple[str, ...] = ()
    """Modules left as they are when quantised at load, by the last part of their names. A file shows its own."""

    def covers(self, module: str) -> bool:
        """Whether `module`, such as model.layers.0.mlp.up_proj, is quantised at load."""
        return module.rpartition(".")[2] not in self.ignored

    @property
    def alignment(self) -> int:
        """Features at multiples of which a layer is best cut: no scale is then on two ranks."""
        return max(1, self.group, self.rows)


AT_LOAD_GROUP = 128
_KEPT = ("lm_head", "embed_tokens", "gate")
"""Head, embedding and a mixture's router: few bytes of a large model, and the most to lose."""


def at_load(weights: Quantization) -> QuantScheme:
    """What `--quantize` makes of a float checkpoint."""
    if weights == "int4":
        return QuantScheme(weights=weights, form="at_load", group=AT_LOAD_GROUP, symmetric=False, ignored=_KEPT)
    return QuantScheme(weights=weights, form="at_load", activations="token", ignored=_KEPT)


def require_storable(dtype: str, quantize: Quantization | None, stored: QuantScheme | None) -> Quantization | None:
    """What the matrices will be stored as; None for floats. `stored` is how the checkpoint has them.

    Raises ValueError for wishes that exclude each other.
    """
    if quantize is not None and dtype == "int8" and quantize != "int8":
        raise ValueError(f"quantize is {quantize} and dtype is int8: leave out one of them")
    if stored is not None:
        if quantize is not None:
            raise ValueError(
                f"quantize is {quantize}, and the checkpoint is quantised already ({stored.weights}, {stored.form}): "
                "leave out quantize, or take the float checkpoint"
            )
        return stored.weights
    return "int8" if dtype == "int8" else quantize
