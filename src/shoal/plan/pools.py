"""Prefill and decode in pools of their own: the fewest engines of each that meet the targets.

A prompt waits for its pool as at a server (Pollaczek-Khinchine), is computed without sequences beside it, and its KV
crosses a link, each device of the prefill engine sending its part. A decode step then has no prompts in it. What the
closed form chooses is run in the event loop, one engine of each pool, and given more engines until it meets the goal.
"""

from __future__ import annotations

from math import ceil, log
from typing import TypeVar

import msgspec

from shoal.core.cost.calibration import Calibration
from shoal.core.cost.types import StepShape
from shoal.core.hardware import LinkSpec
from shoal.plan.candidates import CACHE_BYTES, engines_that_fit, lost_engines, replicas_for
from shoal.plan.engines import Engine
from shoal.plan.estimate import Runs
from shoal.plan.goal import Goal
from shoal.plan.screen import GROWTH, TAIL
from shoal.plan.setups import Pool, Prediction, Setup, Verdict, verdict
from shoal.plan.workload import Lengths, Workload

MOST_TRIES = 4
"""Times that pools are given more engines."""


class _Prefill(msgspec.Struct, kw_only=True):
    engine: Engine
    replicas: int
    ttft_p99: float
    transfer: float
    capacity: float
    """Requests a second that the pool could take, in closed form."""


class _Decode(msgspec.Struct, kw_only=True):
    engine: Engine
    replicas: int
    capacity: float


Stage = TypeVar("Stage", _Prefill, _Decode)


class Pair:
    """Two pools that may do. The decode engine is one whose prompts are cached but for a token, so that its steps are
    those of sequences that come with their KV."""

    def __init__(self, prefill: _Prefill, decode: _Decode, goal: Goal, calibration: Calibration | None) -> None:
        self.prefill, self.decode, self._goal, self._calibration = prefill, decode, goal, calibration
        workload = goal.demand.workload()
        self._prompts = msgspec.structs.replace(workload, outputs=Lengths.fixed(1))
        self._arrived = msgspec.structs.replace(workload, cached_share=1 - 1 / max(2, workload.inputs.longest))
        self._ttft = tuple(target for target in goal.targets if target.metric == "ttft")
        self._later = tuple(target for target in goal.targets if target.metric != "ttft")

    @property
    def devices(self) -> int:
        return _devices(self.prefill) + _devices(self.decode)

    def judge(self) -> Verdict | None:
        """By the event loop, with as many more engines as that asks for; None where they would be too many."""
        rate = self._goal.demand.rate
        for _ in range(MOST_TRIES):
            if self.devices > _affordable(self._goal):
                return None
            first = self._first(self._lost(self.prefill)).at(rate)
            second = self._second(self._lost(self.decode)).at(rate)
            late = first is None or first.excess(self._ttft) > 1
            slow = second is None or second.excess(self._later) > 1
            if first is not None and second is not None and not late and not slow:
                return self._verdict(first, second)
            if late:
                self.prefill = _with_more(self.prefill)
            if slow:
                self.decode = _with_more(self.decode)
        return None

    def carries(self) -> float:
        """Requests a second under the targets: what the pool carries that carries less."""
        rate = self._goal.demand.rate
        return min(
            self._first().carries(self._ttft, self.prefill.capacity, rate),
            self._second().carries(self._later, self.decode.capacity, rate),
        )

    def _first(self, lost: int = 0) -> Runs:
        return self._runs(self.prefill, lost, self._prompts, self.prefill.transfer)

    def _second(self, lost: int = 0) -> Runs:
        return self._runs(self.decode, lost, self._arrived, 0.0)

    def _runs(self, one: _Prefill | _Decode, lost: int, workload: Workload, transfer: float) -> Runs:
        most = one.engine.choice.max_sequences
        return Runs(one.engine, one.replicas - lost, most, workload, self._calibration, transfer=transfer)

    def _lost(self, one: _Prefill | _Decode) -> int:
        return lost_engines(one.replicas, one.engine.choice.shape.devices, self._goal.cluster, self._goal.survive)

    def _verdict(self, first: Prediction, second: Prediction) -> Verdict:
        price = self._goal.cluster.dollars_per_device_hour
        pools = (
            Pool(engine=self.prefill.engine.choice, replicas=self.prefill.replicas, role="prefill"),
            Pool(engine=self.decode.engine.choice, replicas=self.decode.replicas, role="decode"),
        )
        dollars = None if price is None else price * self.devices
        prediction = msgspec.structs.replace(
            second,
            ttft_p50=first.ttft_p50,
            ttft_p90=first.ttft_p90,
            ttft_p99=first.ttft_p99,
            utilisation=max(first.utilisation, second.utilisation),
        )
        setup = Setup(pools=pools, devices=self.devices, dollars_per_hour=dollars)
        return verdict(setup, prediction, None, self._goal, True)


def best_pools(
    engines: list[Engine], goal: Goal, calibration: Calibration | None = None
) -> tuple[Pair, Verdict] | None:
    """The cheapest pair of pools in one precision; None where none meets the targets on this cluster."""
    pairs: list[Pair] = []
    kinds = sorted({(engine.choice.weights, engine.choice.cache) for engine in engines})
    for kind in kinds:
        own = [engine for engine in engines if (engine.choice.weights, engine.choice.cache) == kind]
        prefills = [found for engine in own if (found := _prefill(engine, goal)) is not None]
        decodes = [kept for engine in _one_a_shape(own) if (kept := _decode(engine, goal)) is not None]
        if prefills and decodes:
            prefill = min(prefills, key=lambda one: (_devices(one), one.ttft_p99))
            decode = min(decodes, key=lambda one: (_devices(one), -one.capacity))
            pairs.append(Pair(prefill, decode, goal, calibration))
    pairs.sort(key=lambda pair: pair.devices)
    judged = ((pair, made) for pair in pairs if (made := pair.judge()) is not None)
    return next(judged, None)


def _affordable(goal: Goal) -> int:
    """Devices that there are and that the budget pays for."""
    price, devices = goal.cluster.dollars_per_device_hour, goal.cluster.num_devices
    return devices if goal.budget is None or not price else min(devices, int(goal.budget / price + 1e-9))


def _with_more(one: Stage) -> Stage:
    count = one.replicas + 1
    return msgspec.structs.replace(one, replicas=count, capacity=one.capacity * count / one.replicas)


def _one_a_shape(engines: list[Engine]) -> list[Engine]:
    """Token budgets do not matter to a decode step: of each split, the engine with most room for KV."""
    best: dict[object, Engine] = {}
    for engine in engines:
        known = best.get(engine.choice.shape)
        if known is None or engine.memory.cache > known.memory.cache:
            best[engine.choice.shape] = engine
    return list(best.values())


def _devices(one: _Prefill | _Decode) -> int:
    return one.replicas * one.engine.choice.shape.devices


def link_between_pools(goal: Goal, devices: int) -> LinkSpec | None:
    """What KV crosses: the network, unless both pools are in one node."""
    cluster = goal.cluster
    return cluster.scale_up if devices <= cluster.devices_per_node else cluster.network


def transfer_seconds(engine: Engine, tokens: float, link: LinkSpec) -> float:
    model = engine.cost.engine.model
    size = model.kv_bytes_per_token(CACHE_BYTES[engine.choice.cache]) * tokens
    return link.latency + size / (engine.choice.shape.devices * link.bandwidth * link.reached)


def _prompt_seconds(engine: Engine, tokens: float) -> float:
    """A prompt alone, all its pieces."""
    chunk = engine.choice.max_batch_tokens * engine.choice.shape.attention_dp
    whole, done = 0.0, 0.0
    pieces = ceil(tokens / chunk)
    for number in range(pieces):
        size = min(chunk, tokens - done)
        seconds = engine.cost.seconds(
            StepShape(
                prefill_tokens=round(size),
                prefill_rows=1,
                prefill_pairs=size * (done + (size + 1) / 2),
                prefill_context=round(done + size),
                sampled=1 if number == pieces - 1 else 0,
            )
        )
        whole += seconds if number == 0 else seconds / engine.choice.shape.pp
        done += size
    return whole


def _prefill(engine: Engine, goal: Goal) -> _Prefill | None:
    """The fewest engines that meet the TTFT targets."""
    traffic, shape = engine.traffic, engine.choice.shape
    rate = goal.demand.rate
    fits = engines_that_fit(shape.devices, goal.cluster)
    most_left = fits - lost_engines(fits, shape.devices, goal.cluster, goal.survive)
    link = link_between_pools(goal, shape.devices + 1)
    if link is None:
        return None
    service, long = _prompt_seconds(engine, traffic.input), _prompt_seconds(engine, traffic.long_input)
    transfer = transfer_seconds(engine, traffic.long_input, link)
    limits = {target.percentile: target.seconds for target in goal.targets if target.metric == "ttft"}
    for left in range(max(1, ceil(rate * service)), most_left + 1):
        used = rate * service / left
        if used >= 1:
            continue
        slope = service * (1 + traffic.spread) / (2 * (1 - used))
        middle = engine.front_seconds + service + used * slope + transfer
        late = engine.front_seconds + long + max(0.0, log(used / 0.01)) * slope + transfer
        if middle <= limits.get("p50", middle) and late <= min(limits.get("p90", late), limits.get("p99", late)):
            replicas = replicas_for(left, shape.devices, goal.cluster, goal.survive)
            capacity = replicas / service
            return _Prefill(engine=engine, replicas=replicas, ttft_p99=late, transfer=transfer, capacity=capacity)
    return None


def _decode(engine: Engine, goal: Goal) -> _Decode | None:
    """The fewest engines that meet the targets for tokens."""
    traffic, shape = engine.traffic, engine.choice.shape
    rate = goal.demand.rate
    fits = engines_that_fit(shape.devices, goal.cluster)
    targets = [target for target in goal.targets if target.metric != "ttft"]
    most = min(engine.choice.max_sequences * shape.attention_dp, engine.held_tokens / max(1.0, traffic.context))
    best: _Decode | None = None
    batch = 1.0
    while batch + TAIL * batch**0.5 <= most or batch == 1.0:
        step, tail = (_decode_seconds(engine, size / shape.pp) for size in (batch, batch + TAIL * batch**0.5))
        values = {"itl": tail, "tpot": step}
        if any((step if target.percentile == "p50" else values[target.metric]) > target.seconds for target in targets):
            break
        each = batch / (traffic.output * step)
        left = max(1, ceil(rate / each - 1e-9))
        replicas = replicas_for(left, shape.devices, goal.cluster, goal.survive)
        if replicas <= fits and (best is None or replicas < best.replicas):
            total = each * replicas
            best = _Decode(engine=engine, replicas=replicas, capacity=total)
        batch *= GROWTH
    return best


def _decode_seconds(engine: Engine, batch: float) -> float:
    rows = max(1, round(batch))
    context = int(rows * engine.traffic.context)
    return engine.cost.seconds(StepShape(decode_rows=rows, decode_context=context, sampled=rows))
