"""Ranges in a profiler's trace that say what each part of a step is for: attention, linear, norms, sampling, ...

They are put around the methods of the objects that a step goes through (Ops, attention, collectives, experts, sampler)
while a profile is taken, and removed behind it: a step that nobody profiles runs the code as it is. What calls what is
left alone, so it does not matter which Ops or which attention an engine has. Ranges do not nest: what is called within
one is part of it, so that the time of each part is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import record_function

from shoal.engine.model import Decoder
from shoal.engine.runner import Runner

PREFIX = "shoal::"
"""Of every range's name."""
STEP = PREFIX + "step"
"""Around a whole step, the only range that has others inside."""

OPS_PARTS = {
    "linear": "linear",
    "gated": "linear",
    "embedding": "embedding",
    "rms_norm": "norms",
    "add_rms_norm_": "norms",
    "rope_": "rope",
    "argmax": "sampling",
    "draw": "sampling",
}
OTHER_OPS = "elementwise"
"""Of a method of an Ops that the table does not name: an implementation may have more than the protocol."""
_NOT_COMPUTE = ("pack", "close", "fail")
ATTENTION_PARTS = {"write": "cache", "forward": "attention"}
COLLECTIVES = ("all_reduce_", "all_gather", "reduce_scatter", "all_to_all", "broadcast_", "send", "receive_")


@contextmanager
def ranges(decoder: Decoder, runner: Runner) -> Iterator[None]:
    """While this lasts, steps of the runner leave ranges in the trace. Not for two threads at once."""
    ranged = _Ranged()
    try:
        for owner, method, part in _seams(decoder, runner):
            ranged.wrap(owner, method, part)
        yield
    finally:
        ranged.restore()


def _seams(decoder: Decoder, runner: Runner) -> Iterator[tuple[object, str, str]]:
    """(object, method, part). Later ones may hold earlier ones: the outermost range counts."""
    ops = decoder.ops
    for method in _public_methods(ops):
        if not method.startswith(_NOT_COMPUTE):
            yield ops, method, OPS_PARTS.get(method, OTHER_OPS)
    for method in _public_methods(decoder.attention):
        if method != "allocate":
            yield decoder.attention, method, ATTENTION_PARTS.get(method, "attention")
    for comm in (decoder.tensor, decoder.context, decoder.stages):
        if comm.size > 1:
            yield from ((comm, method, "collectives") for method in COLLECTIVES)
    for layer in decoder.layers:
        mlp = getattr(layer.mlp, "mlp", layer.mlp)  # within Summed
        for name, method in (("router", "route"), ("dispatch", "run")):
            if hasattr(mlp, name):
                yield getattr(mlp, name), method, "experts"
    if hasattr(runner.cache, "write"):  # of latents, which no backend of attention writes
        yield runner.cache, "write", "cache"
    yield decoder, "logits", "head"
    yield runner.sampler, "sample", "sampling"


def _public_methods(owner: object) -> list[str]:
    """Of its class, not those that an instance was given."""
    names = [name for name in dir(type(owner)) if not name.startswith("_")]
    return [
        name
        for name in names
        if callable(getattr(type(owner), name))
        and not isinstance(_defined(type(owner), name), staticmethod | classmethod)
    ]


def _defined(kind: type, name: str) -> Any:
    """The attribute as the class or one of its bases defines it, unbound."""
    return next(vars(base)[name] for base in kind.__mro__ if name in vars(base))


class _Ranged:
    def __init__(self) -> None:
        self._wrapped: list[tuple[object, str]] = []
        self._inside = False

    def wrap(self, owner: object, method: str, part: str) -> None:
        if (owner, method) in self._wrapped:
            return  # one Comm may serve several axes
        setattr(owner, method, self._around(getattr(owner, method), PREFIX + part))
        self._wrapped.append((owner, method))

    def restore(self) -> None:
        for owner, method in self._wrapped:
            delattr(owner, method)
        self._wrapped.clear()

    def _around(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def ranged(*arguments: Any, **named: Any) -> Any:
            if self._inside:
                return call(*arguments, **named)
            self._inside = True
            try:
                with record_function(name):
                    return call(*arguments, **named)
            finally:
                self._inside = False

        return ranged
