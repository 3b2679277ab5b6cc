"""A fleet in virtual time: real engine cores behind a real router; only what a step takes is made up.

The clock jumps from event to event: a request arrives, a step ends, an engine's report comes in, something is done to
the fleet. Equal arguments give equal runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Protocol

import msgspec

from shoal.core.config import SchedulerConfig
from shoal.core.engine_core import EngineCore
from shoal.core.fleet_types import EndpointReport, RouteRequest
from shoal.core.types import Output, Request, Sampled, Sampling, StepPlan, StepResult

GREEDY = Sampling(temperature=0.0)


class StepTime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a step as a sum: fixed, for each token prefilled, for each sequence that decodes, for each KV token
    that the step reads. The defaults are of the order of a 70B model on four large GPUs."""

    base: float = 0.012
    prefill_token: float = 8e-5
    sequence: float = 1e-4
    kv_token: float = 3e-8

    def of(self, plan: StepPlan) -> float:
        prefill = decode = kv = 0
        for row in plan.rows:
            kv += row.start + row.num_tokens
            if row.num_tokens > 1:
                prefill += row.num_tokens
            else:
                decode += 1
        return self.base + self.prefill_token * prefill + self.sequence * decode + self.kv_token * kv


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """A request of a trace. It generates exactly `num_output` tokens, which nobody knows before."""

    id: str
    at: float
    runs: tuple[tuple[int, int], ...]
    """The prompt, as runs of (token id, times): equal runs at equal positions are equal prefixes."""
    num_output: int
    limit: int
    """What the client allows: all that a router is told of the length."""
    blocks: tuple[bytes, ...] = ()
    session: str = ""

    @property
    def num_prompt(self) -> int:
        return sum(times for _, times in self.runs)

    def prompt(self) -> list[int]:
        tokens: list[int] = []
        for token, times in self.runs:
            tokens += [token] * times
        return tokens


class Outcome(msgspec.Struct, kw_only=True):
    """What became of a request; times of the simulation's clock, None for what never was."""

    id: str
    arrived: float
    num_prompt: int
    num_output: int
    endpoint: str = ""
    num_cached: int = 0
    first_token: float | None = None
    end: float | None = None
    rejected: bool = False


class Chooser(Protocol):
    """The part of `core.router.Router` that a fleet talks to, so that others can be put in its place."""

    def add(
        self, name: str, max_sequences: int | None, num_blocks: int | None, block_size: int, now: float
    ) -> None: ...

    def remove(self, name: str) -> None: ...

    def route(self, request: RouteRequest, candidates: Sequence[str], now: float) -> str | None: ...

    def dispatched(self, request: RouteRequest, name: str, now: float) -> None: ...

    def first_token(self, request_id: str, name: str, now: float) -> None: ...

    def progressed(self, name: str, tokens: int, now: float) -> None: ...

    def finished(self, request_id: str, name: str, num_generated: int, now: float, ok: bool) -> None: ...

    def reported(self, name: str, report: EndpointReport, now: float) -> None: ...


class Replica:
    """An engine core and its clockwork."""

    def __init__(self, name: str, config: SchedulerConfig, step_time: StepTime) -> None:
        self.name = name
        self.core = EngineCore(config)
        self.step_time = step_time
        self.slowness = 1.0
        """Factor on the time of every step planned from now on."""
        self.busy_seconds = 0.0
        self.plans: deque[StepPlan] = deque()
        """Computed one after another; the first of them now."""
        self.reported_at = float("-inf")


class FleetSimulation:
    def __init__(
        self,
        chooser: Chooser,
        arrivals: Sequence[Arrival],
        replicas: int,
        config: SchedulerConfig,
        step_time: StepTime,
        *,
        report_interval: float | None = None,
        report_delay: float = 0.0,
        until: float = float("inf"),
    ) -> None:
        """Reports come with steps, at most one an interval (None: never), and arrive late by `report_delay`."""
        self.chooser = chooser
        self.config = config
        self.step_time = step_time
        self.report_interval = report_interval
        self.report_delay = report_delay
        self.until = until
        self.now = 0.0
        self.replicas: dict[str, Replica] = {}
        self.candidates: list[str] = []
        """Names of replicas that get requests."""
        self.outcomes: dict[str, Outcome] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._unplaced: deque[Arrival] = deque()
        """Arrived while there was no candidate."""
        for number in range(replicas):
            self.add(f"r{number:03d}")
        for arrival in arrivals:
            self.at(arrival.at, lambda arrival=arrival: self._arrive(arrival))  # type: ignore[misc]

    # --- what is done to the fleet ----------------------------------------------------------------------------------

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Do something at a time; of several at one time the one that was asked for first."""
        self._num_events += 1
        heappush(self._events, (time, self._num_events, action))

    def add(self, name: str, step_time: StepTime | None = None) -> Replica:
        replica = Replica(name, self.config, step_time or self.step_time)
        self.replicas[name] = replica
        self.candidates.append(name)
        self.chooser.add(name, self.config.max_sequences, self.config.num_blocks, self.config.block_size, self.now)
        while self._unplaced:
            self._place(self._unplaced.popleft())
        return replica

    def run(self) -> list[Outcome]:
        """All that arrived, in that order, once nothing is left to happen or `until` has come."""
        while self._events and self._events[0][0] <= self.until:
            self.now, _, action = heappop(self._events)
            action()
        return list(self.outcomes.values())

    # --- requests ---------------------------------------------------------------------------------------------------

    def _arrive(self, arrival: Arrival) -> None:
        self.outcomes[arrival.id] = Outcome(
            id=arrival.id, arrived=self.now, num_prompt=arrival.num_prompt, num_output=arrival.num_output
        )
        self._place(arrival)

    def _place(self, arrival: Arrival) -> None:
        outcome = self.outcomes[arrival.id]
        question = RouteRequest(
            id=arrival.id,
            num_prompt=outcome.num_prompt,
            num_output=arrival.limit,
            blocks=arrival.blocks,
            session=arrival.session,
        )
        name = self.chooser.route(question, self.candidates, self.now)
        if name is None:
            self._unplaced.append(arrival)
            return
        outcome.endpoint = name
        self.chooser.dispatched(question, name, self.now)
        replica = self.replicas[name]
        request = Request(id=arrival.id, prompt=arrival.prompt(), max_tokens=arrival.num_output, sampling=GREEDY)
        if replica.core.add(request, self.now) is not None:
            outcome.rejected = True
            self.chooser.finished(arrival.id, name, 0, self.now, False)
            return
        self._plan(replica)

    # --- steps ------------------------------------------------------------------------------------------------------

    def _plan(self, replica: Replica) -> None:
        """As many plans as the core will have out; the first of them is computed at once."""
        while (plan := replica.core.plan(self.now)) is not None:
            replica.plans.append(plan)
            if len(replica.plans) == 1:
                self._compute(replica)

    def _compute(self, replica: Replica) -> None:
        seconds = replica.step_time.of(replica.plans[0]) * replica.slowness
        replica.busy_seconds += seconds
        self.at(self.now + seconds, lambda: self._commit(replica))

    def _commit(self, replica: Replica) -> None:
        plan = replica.plans.popleft()
        result = StepResult(plan.plan_id, [Sampled(row.slot, 1) for row in plan.rows if row.sample])
        outputs = replica.core.commit(plan.plan_id, result, self.now)
        if replica.plans:
            self._compute(replica)
        self._deliver(replica, outputs)
        if self.report_interval is not None and self.now - replica.reported_at >= self.report_interval:
            replica.reported_at = self.now
            report = EndpointReport(at=self.now, load=replica.core.load())
            if self.report_delay:
                self.at(self.now + self.report_delay, lambda: self.chooser.reported(replica.name, report, self.now))
            else:
                self.chooser.reported(replica.name, report, self.now)
        self._plan(replica)

    def _deliver(self, replica: Replica, outputs: list[Output]) -> None:
        name, now, chooser = replica.name, self.now, self.chooser
        tokens = 0
        ended: list[Outcome] = []
        for output in outputs:
            outcome = self.outcomes[output.request_id]
            tokens += len(output.token_ids)
            if outcome.first_token is None:
                outcome.first_token = now
                outcome.num_cached = output.num_cached
                chooser.first_token(outcome.id, name, now)
            if output.finish is not None:
                outcome.end = now
                ended.append(outcome)
        if tokens:
            chooser.progressed(name, tokens, now)
        for outcome in ended:
            chooser.finished(outcome.id, name, outcome.num_output, now, True)
