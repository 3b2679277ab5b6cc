"""Request traces, as a workload to plan for: lengths, and the rate of the busiest minute."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal.core.request_trace import TraceRow

WINDOW = 60.0
"""Seconds over which the busiest rate is counted."""


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """What a trace says of a workload."""

    name: str
    lengths: tuple[tuple[int, int], ...]
    """Of each request: tokens in, tokens out."""
    arrivals: tuple[float, ...] = ()
    """Seconds since the first; empty where the file has no times."""

    @property
    def mean_rate(self) -> float | None:
        """Requests a second, over the whole trace."""
        span = self.arrivals[-1] if self.arrivals else 0.0
        return (len(self.arrivals) - 1) / span if span > 0 else None

    @property
    def busiest_rate(self) -> float | None:
        """In the busiest minute, or over the whole if that is shorter."""
        if not self.arrivals or self.arrivals[-1] <= WINDOW:
            return self.mean_rate
        most, first = 0, 0
        for number, arrival in enumerate(self.arrivals):
            while arrival - self.arrivals[first] > WINDOW:
                first += 1
            most = max(most, number - first + 1)
        return most / WINDOW


def trace_of(rows: Sequence[TraceRow], name: str) -> Trace:
    return Trace(
        name=name,
        lengths=tuple((row.num_prompt, row.num_output) for row in rows),
        arrivals=tuple(row.at for row in rows if row.at is not None),
    )
