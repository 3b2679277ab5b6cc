"""The smallest setup that meets a goal, and why none of the others is it.

Every engine that fits is given a curve of loads in closed form (screen.py); the most that it carries under the targets
says how many engines are needed, and so the cost. Setups are then looked at from the cheapest on by the event loop
(estimate.py), until one has met every target; of those that cost the same the one that carries most is the answer.
No rule of thumb is in here: what practice knows of tensor parallelism and networks must come out of times and bytes.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from math import ceil

import msgspec

from shoal.core.cost.calibration import Calibration
from shoal.core.model_shape import ModelShape
from shoal.plan.candidates import engines_that_fit, lost_engines, replicas_for
from shoal.plan.engines import SLACK, Engine, Options, Workshop, floor_reason, network_share
from shoal.plan.estimate import Runs
from shoal.plan.goal import Goal, Target
from shoal.plan.pools import best_pools
from shoal.plan.rejections import Ledger, Rejection
from shoal.plan.screen import Load
from shoal.plan.setups import EngineChoice, Pool, Prediction, Setup, Verdict, verdict
from shoal.plan.units import show_duration, show_money, show_rate

NEARLY = 0.05
"""A difference that no prediction is exact enough for."""
MUCH_LESS = 0.7
"""Of what the answer carries, both in closed form: setups of the same cost that carry no more are not looked at."""
MOST_MORE = 3
"""Engines that are tried beyond what the closed form asks for."""


class Found(msgspec.Struct, kw_only=True):
    """What a search came to, before it is told."""

    answer: Verdict | None = None
    pools: Verdict | None = None
    """The cheapest with prefill and decode apart."""
    colocated: Verdict | None = None
    """The cheapest that is not, where pools are the answer."""
    equals: list[Verdict] = []
    """Others that meet the goal at the same cost."""
    near: list[Verdict] = []
    """Cheaper ones that miss a target by less than the band of the prediction."""
    rejections: list[Rejection] = []
    looked_at: int = 0
    closer: int = 0


class Candidate(msgspec.Struct, kw_only=True):
    """An engine, how many of it, and what the closed form says of them."""

    engine: Engine
    replicas: int
    lost: int
    load: Load
    """The busiest at which an engine meets the targets, within SLACK."""
    limit: int
    """Sequences at once that the engine is to allow."""
    more: int = 0
    """Replicas beyond those that the closed form asks for."""
    others: list[tuple[Load, Engine]] = []
    """The same split with other chunk sizes, the next best first."""

    @property
    def capacity(self) -> float:
        """Requests a second under the targets, in closed form."""
        return self.load.rate * self.replicas

    @property
    def devices(self) -> int:
        return self.replicas * self.engine.choice.shape.devices


class Search:
    def __init__(
        self, model: ModelShape, goal: Goal, options: Options | None = None, calibration: Calibration | None = None
    ) -> None:
        self.model, self.goal, self.calibration = model, goal, calibration
        self.options = options or Options()
        self.ledger = Ledger(goal.cluster)
        self.workshop = Workshop(model, goal, self.options, calibration, self.ledger)
        self.engines: list[Engine] = []
        """All that fit and pass for one request alone."""
        self._workload = goal.demand.workload()
        self._runs: dict[tuple[EngineChoice, int], Runs] = {}

    def run(self) -> Found:
        found = Found()
        heap: list[tuple[float, float, int, Candidate]] = []
        for made in self.workshop.engines():
            self.engines += made
            candidate = self._candidate(made)
            if candidate is not None:
                heap.append((*self._rank(candidate), len(heap), candidate))
                self._look_no_further_than(candidate)
        heapify(heap)
        found.looked_at = self.workshop.looked_at
        self._descend(heap, found)
        self._part(found)
        for _, _, _, candidate in sorted(heap, key=lambda entry: entry[:3]):
            self._larger(candidate, found.answer)
        found.rejections = self.ledger.lines()
        return found

    def _part(self, found: Found) -> None:
        """Pools are two engines at least; what fits may compute prompts even if it is too slow for tokens."""
        if not self.options.pools or self.goal.cluster.num_devices < 2:
            return
        best = best_pools(self.workshop.fitting, self.goal, self.calibration)
        if best is None:
            return
        pair, found.pools = best
        if found.answer is None or found.pools.setup.cost < found.answer.setup.cost:
            found.pools = found.pools.carrying(pair.carries(), self.goal.demand.output)
            found.colocated, found.answer, found.equals = found.answer, found.pools, []

    # --- from engines to candidates ----------------------------------------------------------------------------------

    def _candidate(self, made: list[Engine]) -> Candidate | None:
        """Of the chunk sizes, the one whose engine carries most under the targets."""
        targets = self.goal.targets
        loads: list[tuple[Load, Engine]] = []
        for engine in made:
            load = engine.curve.best(targets, SLACK)
            if load is not None and load.rate > 0:
                loads.append((load, engine))
            elif loads:
                break  # a larger chunk only makes the steps longer that it is in
        if not loads:
            self._no_load(made)
            return None
        loads.sort(key=lambda pair: -pair[0].rate)
        return self._placed(loads)

    def _look_no_further_than(self, candidate: Candidate) -> None:
        """An engine of many times the devices that are known to do cannot be the smallest setup."""
        carried = candidate.engine.capacity
        if not carried:
            return
        shape = candidate.engine.choice.shape
        needed = ceil(self.goal.demand.rate / carried)
        devices = replicas_for(needed, shape.devices, self.goal.cluster, self.goal.survive) * shape.devices
        if devices <= self.goal.cluster.num_devices:
            known = self.workshop.enough
            self.workshop.enough = devices if known is None else min(known, devices)

    def _placed(self, loads: list[tuple[Load, Engine]], more: int = 0) -> Candidate | None:
        """The first of `loads`, as often as the rate asks for and `more`. None where the cluster has no room for so
        many, or the budget no money."""
        load, engine = loads[0]
        devices, cluster, survive = engine.choice.shape.devices, self.goal.cluster, self.goal.survive
        needed = max(1, ceil(self.goal.demand.rate / load.rate - 1e-9))
        replicas = replicas_for(needed, devices, cluster, survive) + more
        goal, shape = self.goal, engine.choice.shape
        fits = engines_that_fit(devices, cluster)
        if replicas > fits:
            lost = lost_engines(replicas, devices, cluster, survive)
            carried = load.rate * (fits - lost_engines(fits, devices, cluster, survive))
            self.ledger.add(
                "survive" if lost and replicas - lost <= fits else "rate",
                shape,
                engine.precision,
                replicas / max(1, fits),
                lambda: self._too_many(engine, replicas, fits, lost, carried),
            )
            return None
        candidate = msgspec.structs.replace(self.candidate(engine, replicas, load), more=more, others=loads[1:])
        dollars = self._dollars(candidate.devices)
        if goal.budget is not None and dollars is not None and dollars > goal.budget:
            over = f"{replicas} x {shape} cost {show_money(dollars)}/h, the budget is {show_money(goal.budget)}/h"
            relaxed = f"--budget {show_money(dollars)}/h"
            self.ledger.add("budget", shape, engine.precision, dollars, lambda: (over, relaxed))
            return None
        return candidate

    def candidate(self, engine: Engine, replicas: int, load: Load) -> Candidate:
        lost = lost_engines(replicas, engine.choice.shape.devices, self.goal.cluster, self.goal.survive)
        return Candidate(engine=engine, replicas=replicas, lost=lost, load=load, limit=limit_of(engine, load))

    def _no_load(self, made: list[Engine]) -> None:
        """One request alone passes, and none beside another does."""
        engine = max(made, key=lambda engine: len(engine.curve.loads))
        loads, shape = engine.curve.loads, engine.choice.shape
        if len(loads) < 2:
            held = f"its KV holds {engine.curve.held:.1f} sequences of this workload at once"
            self.ledger.add("cache", shape, engine.precision, 1.0, lambda: (held, "a smaller precision of weights"))
            return
        load = min(loads[1:], key=lambda load: load.excess(self.goal.targets))
        missed = max(self.goal.targets, key=lambda target: load.value(target) / target.seconds)
        told = floor_reason if missed.metric == "ttft" else _interference
        distance = load.value(missed) / missed.seconds
        self.ledger.add(missed.metric, shape, engine.precision, distance, lambda: told(engine, load, missed))

    def _too_many(self, engine: Engine, replicas: int, fits: int, lost: int, carried: float) -> tuple[str, str]:
        goal = self.goal
        shape = engine.choice.shape
        needed = replicas * shape.devices
        if lost and replicas - lost <= fits:
            why = f"{replicas} engines are needed to survive the loss of a {goal.survive}, and {_engines(fits)}"
            return why, f"{needed} GPUs, or no --survive"
        why = (
            f"{_engines(fits)}, in closed form carrying {show_rate(carried)} under the targets where"
            f" {show_rate(goal.demand.rate)} are asked for ({replicas} would do)"
        )
        return why, f"{needed} GPUs, or --rate {show_rate(carried)}"

    # --- from candidates to an answer ---------------------------------------------------------------------------------

    def _descend(self, heap: list[tuple[float, float, int, Candidate]], found: Found) -> None:
        """From the cheapest on, until one has met the goal and its equals have been looked at."""
        number, best = len(heap), 0.0
        while heap and found.closer < self.options.closer:
            cost, _, _, candidate = heap[0]
            if found.answer is not None and (
                self.options.first or cost > found.answer.setup.cost or candidate.capacity < MUCH_LESS * best
            ):
                return
            heappop(heap)
            found.closer += 1
            one = self.judge(candidate)
            if one is not None and one.meets:
                one = one if self.options.first else self.carried(candidate, one)
                if found.answer is None:
                    found.answer, best = one, candidate.capacity
                elif self._prefer(one, found.answer):
                    found.equals.append(found.answer)
                    found.answer, best = one, candidate.capacity
                else:
                    found.equals.append(one)
                continue
            if one is not None and one.tie:
                found.near.append(one)
            self._missed(candidate, one)
            for further in self._further(candidate, one):
                number += 1
                heappush(heap, (*self._rank(further), number, further))

    def _further(self, candidate: Candidate, one: Verdict | None) -> list[Candidate]:
        """What else the same split may do after it missed: another chunk size, or more engines where load is what it
        missed by."""
        found = []
        if candidate.others:
            found.append(self._placed(candidate.others))
        if candidate.more < MOST_MORE and (one is None or candidate.load.batch > 2):
            own = [(candidate.load, candidate.engine)]
            found.append(self._placed(own, candidate.more + 1))
        return [one for one in found if one is not None]

    def judge(self, candidate: Candidate) -> Verdict | None:
        """At the asked rate, by the event loop; None where requests come faster than they are served."""
        goal, left = self.goal, candidate.replicas - candidate.lost
        degraded = self.runs(candidate, left).at(goal.demand.rate) if left else None
        whole = self.runs(candidate, candidate.replicas).at(goal.demand.rate)
        if degraded is None or whole is None:
            return None
        meets = degraded.excess(goal.targets) <= 1.0
        setup = self.setup(candidate)
        return verdict(setup, whole, degraded if candidate.lost else None, goal, meets, self._tie(degraded, meets))

    def carried(self, candidate: Candidate, one: Verdict) -> Verdict:
        """The same with the most that it carries while all of it is there; as it is where it misses a target."""
        goal = self.goal
        if one.prediction.excess(goal.targets) > 1.0:
            return one
        runs = self.runs(candidate, candidate.replicas)
        most = runs.carries(goal.targets, candidate.engine.capacity * candidate.replicas, goal.demand.rate)
        return one.carrying(most, goal.demand.output)

    def runs(self, candidate: Candidate, replicas: int) -> Runs:
        """So many of its engines in the event loop."""
        choice = msgspec.structs.replace(candidate.engine.choice, max_sequences=candidate.limit)
        known = self._runs.get((choice, replicas))
        if known is None:
            known = Runs(candidate.engine, replicas, candidate.limit, self._workload, self.calibration)
            self._runs[choice, replicas] = known
        return known

    def _tie(self, prediction: Prediction, meets: bool) -> str:
        """Where a target lies within the band of what is predicted, a measurement may decide the other way."""
        for target in self.goal.targets:
            band = prediction.interval(target)
            if meets and band.high > target.seconds:
                return f"may miss {target}: nine of ten cases are up to {show_duration(band.high)}"
            if not meets and band.value > target.seconds and band.low <= target.seconds:
                others = [other for other in self.goal.targets if other != target]
                if all(prediction.interval(other).low <= other.seconds for other in others):
                    return (
                        f"may meet {target}: predicted {show_duration(band.value)}, down to {show_duration(band.low)}"
                    )
        return ""

    def _prefer(self, one: Verdict, other: Verdict) -> bool:
        """Of two that cost the same: the one that carries more; where that is nearly the same, the one whose tokens
        come faster; then the one with fewer ranks in an engine."""
        most, known = one.capacity or 0.0, other.capacity or 0.0
        if abs(most / max(1e-12, known) - 1) > NEARLY:
            return most > known
        if abs(one.prediction.tpot.value / other.prediction.tpot.value - 1) > NEARLY:
            return one.prediction.tpot.value < other.prediction.tpot.value
        sizes = [verdict.setup.pools[0].engine.shape.devices for verdict in (one, other)]
        return sizes[0] < sizes[1]

    def setup(self, candidate: Candidate) -> Setup:
        choice = msgspec.structs.replace(candidate.engine.choice, max_sequences=candidate.limit)
        devices = candidate.devices
        pool = Pool(engine=choice, replicas=candidate.replicas)
        return Setup(pools=(pool,), devices=devices, dollars_per_hour=self._dollars(devices))

    def cost(self, devices: int) -> float:
        """Dollars an hour; where no price is known, devices."""
        dollars = self._dollars(devices)
        return float(devices) if dollars is None else dollars

    def _dollars(self, devices: int) -> float | None:
        price = self.goal.cluster.dollars_per_device_hour
        return None if price is None else price * devices

    def _rank(self, candidate: Candidate) -> tuple[float, float]:
        return self.cost(candidate.devices), -candidate.capacity

    # --- what is written down -----------------------------------------------------------------------------------------

    def _missed(self, candidate: Candidate, one: Verdict | None) -> None:
        engine = candidate.engine
        shape = engine.choice.shape
        if one is None:
            self.ledger.add(
                "estimate",
                shape,
                engine.precision,
                2.0 + candidate.devices,
                lambda: (f"{candidate.replicas} x {shape}: requests come faster than they are served", ""),
            )
            return
        prediction = one.degraded or one.prediction
        worst = max(self.goal.targets, key=lambda target: prediction.interval(target).value / target.seconds)
        value = prediction.interval(worst).value
        after = f" after the loss of a {self.goal.survive}" if one.degraded else ""
        self.ledger.add(
            "estimate",
            shape,
            engine.precision,
            value / worst.seconds,
            lambda: (
                f"{one.setup}: {worst.flag.removeprefix('--')} would be {show_duration(value)}{after}, the target is"
                f" {show_duration(worst.seconds)}",
                f"{worst.flag} {show_duration(value).replace(' ', '')}",
            ),
        )

    def _larger(self, candidate: Candidate, answer: Verdict | None) -> None:
        if answer is None:
            return
        engine = candidate.engine
        setup = self.setup(candidate)
        if setup.cost > answer.setup.cost:
            why = f"needs {candidate.devices} GPUs, the answer {answer.setup.devices}"
        else:
            why = f"as many GPUs, and in closed form would carry {show_rate(candidate.capacity)}, less than the answer"
        load = engine.curve.at(self.goal.demand.rate / candidate.replicas)
        told = (
            ""
            if load is None
            else f" (in closed form ITL p99 {show_duration(load.itl_p99)}, TTFT p99 {show_duration(load.ttft_p99)})"
        )
        self.ledger.add(
            "larger",
            engine.choice.shape,
            engine.precision,
            candidate.devices,
            lambda: (f"{setup}: {why}{told}{network_share(engine.cost, engine.traffic, engine.choice.shape)}", ""),
        )


def _interference(engine: Engine, load: Load, missed: Target) -> tuple[str, str]:
    value = show_duration(load.value(missed))
    why = (
        f"a step that also computes {engine.choice.max_batch_tokens} tokens of a prompt takes {value},"
        f" {missed.flag} is {show_duration(missed.seconds)}"
    )
    return why, f"{missed.flag} {value.replace(' ', '')}"


def _engines(count: int) -> str:
    return "1 engine fits" if count == 1 else f"{count} engines fit"


def limit_of(engine: Engine, load: Load) -> int:
    """Sequences at once: a quarter more than arrivals at random bring together, so that more wait instead of slowing
    those that run."""
    groups = engine.choice.shape.attention_dp
    wanted = 1.25 * (load.batch + 2.33 * load.batch**0.5) / groups
    return int(max(1, min(engine.choice.max_sequences, 8 * ceil(wanted / 8))))
