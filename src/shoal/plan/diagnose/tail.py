"""How far the slowest requests lie from the usual ones, as far as buckets can tell."""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.plan.diagnose import thresholds as limit
from shoal.plan.diagnose.findings import Evidence, Targets
from shoal.plan.diagnose.findings import shown_seconds as seconds
from shoal.plan.diagnose.histogram import Percentile
from shoal.plan.diagnose.reading import Reading


class Tail(msgspec.Struct, frozen=True):
    name: Literal["ttft", "itl"]
    title: str
    p50: Percentile
    p99: Percentile
    target: float | None
    """Seconds that the p99 may take; None: compared with the p50."""
    ratio: float
    """p99 over p50, from which on it is high if there is no target."""
    metric: str

    @property
    def is_high(self) -> bool:
        return self.p99.value > (self.ratio * self.p50.value if self.target is None else self.target)

    @property
    def is_certain(self) -> bool:
        """Wherever in their buckets both lie, and with enough observations for a 99th percentile."""
        enough = self.p99.count >= limit.ENOUGH_FOR_P99
        return enough and self.p99.low >= (self.ratio * self.p50.high if self.target is None else self.target)

    def evidence(self) -> Evidence:
        bucket = f"in its bucket of {seconds(self.p99.low)} to {seconds(self.p99.high)}"
        few = f", of only {self.p99.count} observations" if self.p99.count < limit.ENOUGH_FOR_P99 else ""
        against = f"p50 {seconds(self.p50.value)}" if self.target is None else f"target {seconds(self.target)}"
        return Evidence(
            f"{self.title} p99 {seconds(self.p99.value)} ({bucket}{few}), {against}", self.p99.value, self.metric
        )


def tails(reading: Reading, targets: Targets) -> list[Tail]:
    """Of the latencies that were observed."""
    found = []
    for name, title, target, ratio in (
        ("ttft", "time to first token", targets.ttft_p99, limit.TTFT_TAIL),
        ("itl", "time between tokens", targets.itl_p99, limit.ITL_TAIL),
    ):
        histogram = reading.histogram(name)
        p50, p99 = (histogram.percentile(0.5), histogram.percentile(0.99)) if histogram else (None, None)
        if p50 is not None and p99 is not None:
            found.append(Tail(name, title, p50, p99, target, ratio, reading.metric(name)))  # type: ignore[arg-type]
    return found


def front_end_seconds(reading: Reading) -> float | None:
    """Of the mean time to first token, what is neither queue nor prefill. None where one of them is not known."""
    means = [
        histogram.mean
        for name in ("ttft", "queue_time", "prefill_time")
        if (histogram := reading.histogram(name)) is not None and histogram.mean is not None
    ]
    return means[0] - means[1] - means[2] if len(means) == 3 else None
