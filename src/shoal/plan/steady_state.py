"""What an engine gives under a steady load: TTFT, TPOT, ITL, throughput, with intervals.

By a short run of the cost model in virtual time (event_loop.py): queueing and chunked prefill decide TTFT, and no
closed form has both.
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush
from math import log, sqrt

import msgspec

from shoal.core.cost.model import CostModel
from shoal.core.cost.types import StepShape
from shoal.plan.event_loop import Loop, Outcome
from shoal.plan.workload import Lengths, Weighted, Workload, scattered

__all__ = [
    "Distribution",
    "Lengths",
    "ServingEstimate",
    "Workload",
    "closed_loop",
    "disaggregated",
    "offline",
    "open_loop",
    "static_batch",
    "steady",
]


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. `low` and `high` are where the mean lies in nine of ten cases."""

    mean: float
    p50: float
    p90: float
    p99: float
    low: float
    high: float


class ServingEstimate(msgspec.Struct, frozen=True, kw_only=True):
    refused: str = ""
    """Why the engine cannot serve this at all; then every time is infinite."""
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    end_to_end: Distribution
    output_tokens_per_second: float
    low: float
    """Of output_tokens_per_second: nine of ten cases lie between."""
    high: float
    requests_per_second: float
    utilisation: float
    """Of the time in which steps run."""
    concurrency: float
    """Mean number of sequences that decode."""
    cache_share: float
    """Of the cache that was in use at most."""
    preemptions: int = 0
    saturated: bool = False
    """Requests came faster than they were served: the queue grows as long as the load lasts."""


_NEVER = Distribution(
    mean=float("inf"), p50=float("inf"), p90=float("inf"), p99=float("inf"), low=float("inf"), high=float("inf")
)


def refused(reason: str) -> ServingEstimate:
    return ServingEstimate(
        refused=reason,
        ttft=_NEVER,
        tpot=_NEVER,
        itl=_NEVER,
        end_to_end=_NEVER,
        output_tokens_per_second=0.0,
        low=0.0,
        high=0.0,
        requests_per_second=0.0,
        utilisation=0.0,
        concurrency=0.0,
        cache_share=0.0,
    )


def refusal(cost: CostModel, workload: Workload) -> str:
    """Why the engine's memory cannot hold one sequence of this workload; empty if it can."""
    budget = cost.memory()
    if budget.cache <= 0:
        return (
            f"weights and workspace take {-budget.cache / 1e9:.1f} GB more than a device's {budget.total / 1e9:.1f} GB"
        )
    longest = workload.inputs.longest + workload.outputs.longest
    if budget.bytes_per_token and budget.cache_tokens < longest:
        return f"the cache holds {budget.cache_tokens} tokens, and one sequence takes up to {longest}"
    return ""


def closed_loop(
    cost: CostModel,
    workload: Workload,
    concurrency: int,
    *,
    requests: int | None = None,
    poll_steps: int = 1,
    wait_steps: int = 0,
) -> ServingEstimate:
    """As many clients as `concurrency`, each sending its next request when the last is answered. All begin at once, as
    load generators do, and `requests` (10 a client, if few) are counted, the first ones included."""
    reason = refusal(cost, workload)
    if reason:
        return refused(reason)
    total = requests or max(4 * concurrency, min(10 * concurrency, 640))
    loop = Loop(cost, workload, poll_steps=poll_steps, wait_steps=wait_steps)

    def again(now: float) -> None:
        if loop.added < total:
            loop.add(now)

    loop.finished = again
    for _ in range(min(concurrency, total)):
        loop.add(0.0)
    loop.run(float("inf"))
    return _estimate(cost, loop, loop.now)


def offline(cost: CostModel, workload: Workload, *, requests: int | None = None) -> ServingEstimate:
    """Everything is queued at the start: the most that the engine gives, while the batch is full."""
    reason = refusal(cost, workload)
    if reason:
        return refused(reason)
    loop = Loop(cost, workload)
    each = workload.inputs.mean + workload.outputs.mean / 2
    rows = min(cost.engine.max_sequences * cost.engine.attention_dp, max(1, int(loop.capacity / each)))
    total = requests or max(256, 4 * rows)
    ends: list[float] = []
    loop.finished = ends.append
    for _ in range(total):
        loop.add(0.0)
    loop.run(float("inf"))
    estimate = _estimate(cost, loop, loop.now)
    # Between the first and the last fifth of the answers: neither the filling nor the emptying of the batch.
    first, last = total // 5, total - total // 5 - 1
    if ends[last] <= ends[first]:
        return estimate
    rate = (last - first) * workload.outputs.mean / (ends[last] - ends[first])
    low, high = cost.interval("throughput")
    return msgspec.structs.replace(
        estimate,
        output_tokens_per_second=rate,
        low=rate * low,
        high=rate * high,
        requests_per_second=rate / workload.outputs.mean,
    )


def open_loop(cost: CostModel, workload: Workload, rate: float, *, requests: int | None = None) -> ServingEstimate:
    """Requests come by themselves, `rate` a second, with exponential gaps: what a load generator sees that sends so
    many and counts all of them; without `requests`, five times what is under way at once."""
    reason = refusal(cost, workload)
    if reason:
        return refused(reason)
    count = requests or 400
    loop = _offered(cost, workload, rate, count)
    while requests is None and count < MOST_REQUESTS and count < 5 * rate * loop.out.end_to_end.mean():
        count *= 4
        loop = _offered(cost, workload, rate, count)
    return _estimate(cost, loop, loop.now)


MOST_REQUESTS = 6400


def _offered(cost: CostModel, workload: Workload, rate: float, count: int) -> Loop:
    loop, at = Loop(cost, workload), 0.0
    for number in range(count):
        at += exponential(number) / rate
        loop.arrive(at, number)
    loop.run(float("inf"))
    return loop


FIRST = 110_000
"""Number of the first gap. Of a queue with even service, 1,600 arrivals from there on wait as those of a long run do,
in the mean and at the 99th percentile, within 15% from 60% to 90% of its capacity; from 0 on they wait up to 29%
less."""
WARM = 4
"""The batch has filled once so many times the requests under way have come."""
FEWEST_COME = 100
"""Before the window, at least."""
LONGEST_RAMP = 4
"""Windows that the batch may take to fill."""
GROWS = 0.05
"""Of the requests that come in the window: so many more under way at its end, and more than chance brings (two standard
deviations), are a queue that grows."""


def steady(
    cost: CostModel, workload: Workload, rate: float, *, engines: int = 1, requests: int = 1600
) -> ServingEstimate:
    """Requests come without end, `rate` a second to all `engines`, each to the one with least to do. What happens while
    `requests` come is counted: neither the filling of the batch before it nor its emptying."""
    reason = refusal(cost, workload)
    if reason:
        return refused(reason)
    loops = [Loop(cost, workload) for _ in range(engines)]
    at, number, ends, began, before = 0.0, 0, LONGEST_RAMP * requests, 0.0, -1
    while number < ends:
        at += exponential(FIRST + number) / rate
        for loop in loops:
            loop.run(at)
        _least_busy(loops, at).arrive(at, number)
        number += 1
        if before < 0 and number >= FEWEST_COME and sum(loop.under_way for loop in loops) <= number / WARM:
            before, began, ends = sum(loop.under_way for loop in loops), at, number + requests
            for loop in loops:
                loop.out = Outcome()
    more = sum(loop.under_way for loop in loops) - before
    grows = before < 0 or more > GROWS * requests + 2 * sqrt(2 * before)
    return msgspec.structs.replace(_together(cost, loops, at - began), saturated=grows)


def _least_busy(loops: list[Loop], now: float) -> Loop:
    """By prompts first, for they are what a new one waits for; then by sequences that decode."""
    return min(loops, key=lambda loop: (loop.prompts(now), loop.rows))


def exponential(number: int) -> float:
    """The gap of that number, of mean 1."""
    return -log(scattered(number, 2))


def static_batch(cost: CostModel, input_length: int, output_length: int, batch: int) -> ServingEstimate:
    """One batch that is computed together from its prompts to its last token."""
    workload = Workload(inputs=Lengths.fixed(input_length), outputs=Lengths.fixed(output_length))
    budget = cost.memory()
    if budget.cache <= 0:
        return refused(refusal(cost, workload))
    prompts = StepShape(
        prefill_tokens=batch * input_length,
        prefill_rows=batch,
        prefill_pairs=batch * input_length * (input_length + 1) / 2,
        prefill_context=batch * input_length,
        sampled=batch,
    )
    first = cost.seconds(prompts)
    steps = max(1, output_length - 1)
    middle = batch * (input_length + (steps + 1) // 2)
    each = cost.seconds(StepShape(decode_rows=batch, decode_context=middle, sampled=batch))
    whole = first + each * (output_length - 1)
    rate = batch * output_length / whole
    low, high = cost.interval("throughput")
    return ServingEstimate(
        ttft=_one(cost, "ttft", first),
        tpot=_one(cost, "tpot", each),
        itl=_one(cost, "tpot", each),
        end_to_end=_one(cost, "ttft", whole),
        output_tokens_per_second=rate,
        low=rate * low,
        high=rate * high,
        requests_per_second=batch / whole,
        utilisation=1.0,
        concurrency=float(batch),
        cache_share=budget.bytes_per_token * batch * (input_length + output_length) / max(1, budget.cache),
    )


def disaggregated(
    prefill: CostModel,
    prefill_engines: int,
    decode: CostModel,
    decode_engines: int,
    workload: Workload,
    concurrency: int,
    *,
    transfer_seconds: float = 0.0,
    requests: int | None = None,
) -> ServingEstimate:
    """Prompts are computed by one pool of engines and go on in another, closed loop. The pools' engines share the load
    evenly; `transfer_seconds` passes between a sequence's first token and its next step."""
    for cost in (prefill, decode):
        reason = refusal(cost, workload)
        if reason:
            return refused(reason)
    engines = min(decode_engines, concurrency)
    total = requests or max(3 * concurrency, min(10 * concurrency, 640))
    pool = _PromptPool(prefill, prefill_engines, workload)
    loops = [Loop(decode, workload) for _ in range(engines)]
    ready: list[tuple[float, int]] = []
    ttft = Weighted()
    numbers = iter(range(total))

    def send(now: float) -> None:
        number = next(numbers, None)
        if number is not None:
            pool.waiting.append((now, number))

    for loop in loops:
        loop.finished = send
    for _ in range(min(concurrency, total)):
        send(0.0)
    while pool.waiting or ready or any(loop.rows or loop.waiting for loop in loops):
        # Whatever is first: a batch of prompts begins, a sequence reaches its decode engine, or one of those ends.
        at = min(pool.next_start(), ready[0][0] if ready else float("inf"))
        busy = [loop for loop in loops if (loop.rows or loop.waiting) and loop.now < at]
        if busy:
            # The one that is behind goes on, not beyond the next: what ends there is the next prompt's arrival.
            behind = min(busy, key=lambda each: each.now)
            others = [loop.now for loop in busy if loop is not behind]
            behind.run(min(at, max(min(others, default=at), behind.now + 1e-3)), one_end=True)
            continue
        if ready and ready[0][0] <= at:
            now, number = heappop(ready)
            loop = min(loops, key=lambda each: each.rows + len(each.waiting))
            loop.now = max(loop.now, now)
            loop.add_prefilled(now, number)
        elif pool.next_start() <= at:
            for end, arrival, number in pool.start():
                ttft.add(end - arrival)
                heappush(ready, (end + transfer_seconds, number))
    loops[0].out.ttft = ttft
    return _together(decode, loops, max(loop.now for loop in loops))


class _PromptPool:
    """Engines that only compute prompts, first come first served; what waits is computed together, up to a chunk."""

    def __init__(self, cost: CostModel, engines: int, workload: Workload) -> None:
        self.cost, self.workload = cost, workload
        self.free = [0.0] * engines
        heapify(self.free)
        self.waiting: deque[tuple[float, int]] = deque()
        self.limit = cost.engine.max_batch_tokens * cost.engine.attention_dp

    def next_start(self) -> float:
        return max(self.free[0], self.waiting[0][0]) if self.waiting else float("inf")

    def start(self) -> list[tuple[float, float, int]]:
        """(end, arrival, number) of a batch that begins at next_start()."""
        now = max(heappop(self.free), self.waiting[0][0])
        batch: list[tuple[float, int]] = []
        lengths: list[int] = []
        while self.waiting and self.waiting[0][0] <= now:
            length = self.workload.request(self.waiting[0][1])[0]
            if batch and sum(lengths) + length > self.limit:
                break
            batch.append(self.waiting.popleft())
            lengths.append(length)
        end = now + self._seconds(lengths)
        heappush(self.free, end)
        return [(end, arrival, number) for arrival, number in batch]

    def _seconds(self, lengths: list[int]) -> float:
        chunks = max(1, -(-sum(lengths) // self.limit))
        rows = len(lengths)
        shape = StepShape(
            prefill_tokens=-(-sum(lengths) // chunks),
            prefill_rows=rows,
            prefill_pairs=sum(n * (n + 1) / 2 for n in lengths) / chunks,
            prefill_context=sum(lengths),
            sampled=rows,
        )
        return chunks * self.cost.seconds(shape)


# --- from a run to an estimate ----------------------------------------------------------------------------------------


def _together(cost: CostModel, loops: list[Loop], seconds: float) -> ServingEstimate:
    """Of all engines; batch and utilisation are the mean engine's."""
    first, count = loops[0], len(loops)
    for other in loops[1:]:
        first.out.absorb(other.out)
    found = _estimate(cost, first, seconds)
    return msgspec.structs.replace(found, utilisation=found.utilisation / count, concurrency=found.concurrency / count)


def _estimate(cost: CostModel, loop: Loop, seconds: float) -> ServingEstimate:
    out: Outcome = loop.out
    front = cost.profile.front_seconds
    per_second = out.output_tokens / seconds if seconds else 0.0
    low, high = cost.interval("throughput")
    return ServingEstimate(
        ttft=_distribution(cost, "ttft", out.ttft, front),
        tpot=_distribution(cost, "tpot", out.tpot, 0.0),
        itl=_distribution(cost, "tpot", out.itl, 0.0),
        end_to_end=_distribution(cost, "ttft", out.end_to_end, front),
        output_tokens_per_second=per_second,
        low=per_second * low,
        high=per_second * high,
        requests_per_second=out.requests / seconds if seconds else 0.0,
        utilisation=out.busy_seconds / seconds if seconds else 0.0,
        concurrency=out.rows_seconds / seconds if seconds else 0.0,
        cache_share=min(1.0, out.cache_peak / loop.capacity) if loop.capacity else 0.0,
        preemptions=out.preemptions,
    )


def _distribution(cost: CostModel, metric: str, values: Weighted, plus: float) -> Distribution:
    p50, p90, p99 = values.quantiles((0.5, 0.9, 0.99))
    mean = values.mean() + plus
    low, high = cost.interval(metric)
    return Distribution(mean=mean, p50=p50 + plus, p90=p90 + plus, p99=p99 + plus, low=mean * low, high=mean * high)


def _one(cost: CostModel, metric: str, value: float) -> Distribution:
    low, high = cost.interval(metric)
    return Distribution(mean=value, p50=value, p90=value, p99=value, low=value * low, high=value * high)
