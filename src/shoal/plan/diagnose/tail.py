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
    slow: Percentile
    """The p99, or the p90 of too few observations: their p99 would be the one slowest, as the first after a start."""
    target: float | None
    """Seconds that the p99 may take; None: compared with the p50."""
    ratio: float
    """Over the p50, from which on it is high if there is no target."""
    metric: str

    @property
    def is_p99(self) -> bool:
        return self.slow.count >= limit.ENOUGH_FOR_P99

    @property
    def is_high(self) -> bool:
        return self.slow.value > (self.ratio * self.p50.value if self.target is None else self.target)

    @property
    def is_certain(self) -> bool:
        """Wherever in their buckets both lie."""
        return self.is_p99 and self.slow.low >= (self.ratio * self.p50.high if self.target is None else self.target)

    def evidence(self) -> Evidence:
        which = "p99" if self.is_p99 else f"p90 (of {self.slow.count} observations, too few for a p99)"
        bucket = f"in its bucket of {seconds(self.slow.low)} to {seconds(self.slow.high)}"
        against = f"p50 {seconds(self.p50.value)}" if self.target is None else f"target {seconds(self.target)}"
        says = f"{self.title}: {which} {seconds(self.slow.value)}, {bucket}; {against}"
        return Evidence(says, self.slow.value, self.metric)


_LATENCIES: tuple[tuple[Literal["ttft", "itl"], str, float], ...] = (
    ("ttft", "time to first token", limit.TTFT_TAIL),
    ("itl", "time between tokens", limit.ITL_TAIL),
)


def tails(reading: Reading, targets: Targets) -> list[Tail]:
    """Of the latencies that were observed."""
    found = []
    for name, title, ratio in _LATENCIES:
        histogram = reading.histogram(name)
        if histogram is None:
            continue
        enough = histogram.count >= limit.ENOUGH_FOR_P99
        p50, slow = histogram.percentile(0.5), histogram.percentile(0.99 if enough else 0.9)
        target = targets.ttft_p99 if name == "ttft" else targets.itl_p99
        if p50 is not None and slow is not None:
            found.append(Tail(name, title, p50, slow, target, ratio, reading.metric(name)))
    return found


def front_end_seconds(reading: Reading) -> float | None:
    """Of the mean time to first token, what is neither queue nor prefill. None where one of them is not known."""
    means = [
        histogram.mean
        for name in ("ttft", "queue_time", "prefill_time")
        if (histogram := reading.histogram(name)) is not None and histogram.mean is not None
    ]
    return means[0] - means[1] - means[2] if len(means) == 3 else None
