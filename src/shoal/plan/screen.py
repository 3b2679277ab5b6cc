"""What one engine does under load, in closed form: latencies and rate as functions of its batch. No event loop.

With b sequences that generate and prompts arriving as fast as answers end, a step brings p = b I / O tokens of prompts
(I tokens in, O out), whatever the step takes. So the mix of a step follows from b alone; its time gives the rate,
b / (O T). With a pipeline, as many steps are under way as it has stages, each with its share; one that
is longer than those ahead of it leaves stages idle. Arrivals at random make
the batch vary like a Poisson number, and prompts wait as at a server with their step's time as its service
(Pollaczek-Khinchine, and its exponential tail).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import ceil, log, sqrt

import msgspec

from shoal.core.cost.types import StepShape
from shoal.plan.goal import Demand, Target

Seconds = Callable[[StepShape], float]
TAIL = 2.33
"""Standard deviations to the 99th percentile."""
GROWTH = 1.6
"""From one batch to the next that is tried."""
GIVE_UP = 1.6
"""A target that is missed by more is not looked at under more load still."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One engine at one batch."""

    batch: float
    rate: float
    """Requests a second."""
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    itl_mean: float
    utilisation: float
    """Of what its prefill could take."""

    def value(self, target: Target) -> float:
        if target.metric == "ttft":
            return self.ttft_p99 if target.percentile in ("p99", "p90") else self.ttft_p50
        if target.metric == "tpot":
            return self.itl_mean
        return self.itl_p99 if target.percentile in ("p99", "p90") else self.itl_p50

    def excess(self, targets: tuple[Target, ...]) -> float:
        """The most by which a target is missed, as a factor; at most 1 where all are met."""
        return max((self.value(target) / target.seconds for target in targets), default=0.0)


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """Of a workload, as the closed form needs them."""

    input: float
    output: float
    long_input: float
    """99th percentile."""
    spread: float
    """Squared coefficient of variation of the input."""

    @property
    def context(self) -> float:
        """Of a sequence that generates, on average."""
        return self.input + self.output / 2


def traffic_of(demand: Demand) -> Traffic:
    if not demand.lengths:
        return Traffic(input=demand.input, output=demand.output, long_input=demand.input, spread=0.0)
    inputs = sorted(tokens for tokens, _ in demand.lengths)
    mean = demand.input
    variance = sum((tokens - mean) ** 2 for tokens in inputs) / len(inputs)
    return Traffic(
        input=mean,
        output=demand.output,
        long_input=max(1.0, inputs[min(len(inputs) - 1, int(len(inputs) * 0.99))]),
        spread=variance / mean**2,
    )


class Curve:
    """An engine's loads by batch, rising, as far as its memory and its prefill go."""

    def __init__(
        self,
        seconds: Seconds,
        traffic: Traffic,
        *,
        chunk: int,
        max_sequences: int,
        cache_tokens: float,
        front_seconds: float = 0.0,
        stages: int = 1,
        stage_seconds: Seconds | None = None,
        bubble: float = 0.0,
        targets: tuple[Target, ...] = (),
    ) -> None:
        """Of a pipeline: `stage_seconds`, how long a step keeps its slowest stage; `bubble`, for how much of what a
        step is longer than the one ahead stages are idle."""
        self._alone, self._stage_seconds, self._bubble = seconds, stage_seconds, bubble
        self._traffic, self._chunk = traffic, chunk
        self._front, self._stages, self._targets = front_seconds, stages, targets
        self.full = False
        """The loads end where memory or prefill do, not where targets are missed by far."""
        self._most = min(float(max_sequences), cache_tokens / max(1.0, traffic.context))
        self.held = self._most
        """Sequences that memory and limit allow at once."""
        self.idle = self._at(0.0) if self._most >= 1 else None
        """With one request at a time: what no load makes better. None where not one sequence has room."""

    @cached_property
    def loads(self) -> list[Load]:
        if self.idle is None:
            return []
        loads, batch = [self.idle], 1.0
        while batch + TAIL * sqrt(batch) <= self._most or batch == 1.0:
            load = self._at(batch)
            if load is None or load.rate < loads[-1].rate:
                break
            loads.append(load)
            if load.excess(self._targets) > GIVE_UP:
                return loads
            batch *= GROWTH
        self.full = True
        return loads

    def _seconds(self, shape: StepShape) -> float:
        """With as many steps under way as there are stages, where there are sequences for them."""
        alone = self._alone(shape)
        if self._stage_seconds is None or not shape.decode_rows:
            return alone
        return max(alone, self._stages * self._stage_seconds(shape))

    def _decode(self, batch: float) -> float:
        rows = max(1, round(batch))
        return self._seconds(
            StepShape(decode_rows=rows, decode_context=int(rows * self._traffic.context), sampled=rows)
        )

    def _mixed(self, batch: float, tokens: float, of: float) -> float:
        """A step with so many tokens of prompts that are `of` long, at their middle."""
        rows, count = round(batch), max(1, round(tokens))
        prompts = max(1, round(count / of))
        each = count / prompts
        before = max(0.0, (of - each) / 2)
        return self._seconds(
            StepShape(
                prefill_tokens=count,
                prefill_rows=prompts,
                prefill_pairs=count * (before + (each + 1) / 2),
                prefill_context=int(prompts * (before + each)),
                decode_rows=rows,
                decode_context=int(rows * self._traffic.context),
                sampled=rows + prompts,
            )
        )

    def _passes(self, tokens: float) -> float:
        """Steps that a prompt takes; behind the first, the next piece is one stage later."""
        return 1 + (ceil(tokens / self._chunk) - 1) / self._stages

    def _at(self, batch: float) -> Load | None:
        traffic, chunk, whole = self._traffic, float(self._chunk), batch
        batch = batch / self._stages
        needed = batch * traffic.input / traffic.output
        piece = min(traffic.input, chunk)
        share = min(1.0, needed / piece)
        if needed >= chunk:
            return None
        mixed = self._mixed(batch, max(piece, needed), traffic.input)
        plain = self._decode(batch)
        mean = share * mixed + (1 - share) * plain
        tail = min(batch + TAIL * sqrt(whole) / self._stages, self._most / self._stages)
        crowded = min(chunk, max(piece, needed + TAIL * sqrt(needed * piece), min(chunk, traffic.long_input)))
        worst = self._mixed(tail, crowded, traffic.long_input) if share >= 0.01 else self._decode(tail)
        mean += self._bubble * share * (1 - share) * max(0.0, mixed - plain)
        worst += self._bubble * max(0.0, worst - plain)
        used = needed / chunk
        service = self._passes(traffic.input) * mixed
        wait = used * service * (1 + traffic.spread) / (2 * (1 - used))
        long_piece = self._mixed(tail, min(chunk, traffic.long_input), traffic.long_input)
        late = max(0.0, log(max(used, 1e-9) / 0.01)) * service * (1 + traffic.spread) / (2 * (1 - used))
        waiting = batch > 0
        return Load(
            batch=whole,
            rate=whole / (traffic.output * mean),
            ttft_p50=self._front + service + waiting * (mean / 2 + wait),
            ttft_p99=self._front + self._passes(traffic.long_input) * long_piece + waiting * (worst + late),
            itl_p50=mixed if share > 0.5 else plain,
            itl_p99=worst,
            itl_mean=mean,
            utilisation=max(used, whole / self._most),
        )

    def best(self, targets: tuple[Target, ...], slack: float = 1.0) -> Load | None:
        """The busiest load at which every target is met within a factor."""
        met = [load for load in self.loads if load.excess(targets) <= slack]
        if not met:
            return None
        best = met[-1]
        after = self.loads.index(best) + 1
        if after == len(self.loads) or best.batch < 1:
            return best
        low, high = best.batch, self.loads[after].batch
        for _ in range(3):
            middle = self._at((low + high) / 2)
            if middle is not None and middle.excess(targets) <= slack and middle.rate > best.rate:
                low, best = middle.batch, middle
            else:
                high = (low + high) / 2
        return best

    def at(self, rate: float) -> Load | None:
        """At a rate, between the two batches beside it; None where that is more than it takes."""
        for below, above in zip(self.loads, self.loads[1:], strict=False):
            if rate <= above.rate:
                part = (rate - below.rate) / (above.rate - below.rate) if above.rate > below.rate else 0.0
                names = Load.__struct_fields__
                return Load(
                    **{
                        name: getattr(below, name) + part * (getattr(above, name) - getattr(below, name))
                        for name in names
                    }
                )
        return None
