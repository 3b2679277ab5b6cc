"""A fleet in virtual time: real engine cores behind a real gateway; only what a step takes is made up.

The clock jumps from event to event: a request arrives, a step ends, an engine's report comes in, something is done to
the fleet. Equal arguments give equal runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import heapreplace

import msgspec

from shoal.core.config import SchedulerConfig
from shoal.core.fleet_types import FleetEvent, RouteRequest
from shoal.core.hashing import chain
from shoal.sim.clock import Action, Clock
from shoal.sim.flight import Flight, Member
from shoal.sim.gateway import OPEN, TICK_SECONDS, Chooser, Gateway, Rules
from shoal.sim.histogram import Histogram
from shoal.sim.law import Laws, StepLaw
from shoal.sim.replica import Replica
from shoal.sim.requests import Arrival, Outcome


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Of the fleet over one interval, which ends at `at`."""

    at: float
    arrived: int
    completed: int
    output_tokens_per_second: float
    running: int
    waiting: int
    """In engines."""
    queued: int
    """In the gateway."""
    kv_usage: float
    """Share of the blocks of replicas that are up, at the end."""
    ready: int
    """Replicas."""
    busy: float
    """Share of the time of replicas that are up in which a step was computed."""


class FrontEnd(msgspec.Struct, frozen=True, kw_only=True):
    """What is between a client and the queue: HTTP, a chat template, text to tokens."""

    delay: float = 0.0
    """Seconds, of each request beside others."""
    request_seconds: float = 0.0
    """That a request keeps a process to itself."""
    token_seconds: float = 0.0
    """The same, for every token of the prompt."""
    processes: int = 1

    def passed(self, arrivals: Sequence[Arrival]) -> list[tuple[float, Arrival]]:
        """When each is through, in that order: first come, first served."""
        free = [0.0] * self.processes
        through = []
        for number, arrival in enumerate(sorted(arrivals, key=lambda one: one.at)):
            begun = max(arrival.at, free[0])
            done = begun + self.request_seconds + self.token_seconds * arrival.num_prompt
            heapreplace(free, done)
            through.append((done + self.delay, number, arrival))
        return [(at, arrival) for at, _, arrival in sorted(through, key=lambda item: item[:2])]


class FleetSimulation:
    def __init__(
        self,
        chooser: Chooser,
        arrivals: Sequence[Arrival],
        replicas: int,
        config: SchedulerConfig,
        law: StepLaw,
        *,
        stage_law: StepLaw | None = None,
        rules: Rules = OPEN,
        spares: int = 0,
        report_interval: float | None = None,
        report_delay: float = 0.0,
        start_seconds: float = 0.0,
        front: FrontEnd | None = None,
        router_block_size: int = 64,
        sample_interval: float | None = None,
        until: float = float("inf"),
        on_tick: Callable[[FleetSimulation], None] | None = None,
    ) -> None:
        """`stage_law`: see Laws. `start_seconds`: of an engine that is started meanwhile. `on_tick`: ten
        times a second of virtual time."""
        self.chooser = chooser
        self.config = config
        self.laws = Laws(law, stage_law)
        self.start_seconds = start_seconds
        self.until = until
        self.clock = Clock()
        self.gaps = Histogram()
        """Seconds between two tokens of a sequence, of all sequences."""
        self.replicas: dict[str, Replica] = {}
        self.members: dict[str, Member] = {}
        """All that there ever were."""
        self.outcomes: dict[str, Outcome] = {}
        self.events: list[FleetEvent] = []
        self.samples: list[Sample] = []
        self.gateway = Gateway(
            chooser,
            rules,
            self.clock,
            report_interval=report_interval,
            report_delay=report_delay,
            on_gap=self.gaps.add,
            on_event=self.say,
            restart=lambda member, reason: self.kill(member.name, reason),
        )
        self._arrivals = (front or FrontEnd()).passed(arrivals)
        """With when the gateway sees each."""
        self._to_come = len(self._arrivals)
        self._router_block_size = router_block_size
        self._interval = sample_interval
        self.on_tick = on_tick
        self._sampled = (0.0, 0, 0, 0, 0.0, 0.0)
        self._created: dict[str, float] = {}
        self._removed: dict[str, float] = {}
        self.most_replicas = 0
        """That there were at one time."""
        for number in range(replicas + spares):
            self.add(f"r{number:03d}", spare=number >= replicas)

    @property
    def now(self) -> float:
        return self.clock.now

    def say(self, kind: str, endpoint: str, message: str) -> None:
        self.events.append(FleetEvent(time=self.now, endpoint=endpoint, kind=kind, message=message))

    def run(self) -> list[Outcome]:
        """All that arrived, in that order, once nothing is left to happen or `until` has come."""
        if self.gateway.rules.watch or self.on_tick is not None:
            self.clock.at(TICK_SECONDS, self._tick)
        if self._interval is not None:
            self.clock.at(self._interval, self._sample)
        self.clock.run(self._coming(), self.until)
        if self._interval is not None and self.now > self._sampled[0]:
            self._take_sample()
        for flight in self.gateway.flights.values():
            flight.outcome.generated = flight.delivered
        return list(self.outcomes.values())

    # --- what is done to the fleet ----------------------------------------------------------------------------------

    def at(self, time: float, action: Action) -> None:
        """Do something at a time; of several at one time the one that was asked for first."""
        self.clock.at(time, action)

    def add(self, name: str, *, after: float = 0.0, spare: bool = False) -> Replica:
        """A further engine, of use once it was started."""
        self._created[name] = self.now
        replica = Replica(name, self.config, self.laws, self.clock, self.gateway.stepped)
        rules = self.gateway.rules
        member = Member(replica, rules.health, self.now, queue=rules.queue, spare=spare)
        self.replicas[name], self.members[name] = replica, member
        self._start(member, after)
        self.most_replicas = max(self.most_replicas, self.num_replicas)
        return replica

    @property
    def num_replicas(self) -> int:
        """That hold devices: also while they start, are down, or end what they have."""
        return len(self.members) - len(self._removed)

    def kill(self, name: str, reason: str, *, back_after: float | None = None) -> None:
        """Its process dies, and is started anew; None: that takes `start_seconds`."""
        member = self.members[name]
        if not member.is_up:
            return
        member.replica.die()
        self.gateway.gone(member, reason)
        self._start(member, self.start_seconds if back_after is None else back_after)

    def lose_rank(self, name: str, noticed_after: float, back_after: float) -> None:
        """One of its ranks dies: nothing moves until that is noticed, then what runs is lost, and new workers are
        there `back_after` later."""
        member = self.members[name]
        if not member.is_up:
            return
        epoch = member.replica.epoch
        member.replica.freeze(noticed_after)

        def notice() -> None:
            if member.replica.epoch != epoch:
                return  # it was started anew meanwhile
            self.say("rank_lost", name, f"a rank was lost; new workers in {back_after:.1f} s")
            self.gateway.lost_sequences(member, member.replica.lose_workers("a rank was lost", back_after))

        self.clock.at(self.now + noticed_after, notice)

    def hang(self, name: str, seconds: float) -> None:
        """Nothing of it moves for so long; then it goes on where it was."""
        member = self.members[name]
        if member.is_up:
            self.say("hang", name, f"nothing moves for {seconds:g} s")
            member.replica.freeze(seconds)

    def drain(self, name: str) -> None:
        """Nothing new; it is gone once it has nothing left."""
        member = self.members[name]
        member.draining = True
        self.say("draining", name, "it gets no new requests")

    def _start(self, member: Member, after: float) -> None:
        member.enter("starting", self.now)
        if after <= 0.0:
            self.gateway.started(member)
            return

        def ready() -> None:
            if member.state == "starting":
                self.say("endpoint_ready", member.name, f"started in {after:.1f} s")
                self.gateway.started(member)

        self.clock.at(self.now + after, ready)

    def allocated_seconds(self, name: str, end: float) -> float:
        """For how long its devices were taken until `end`, while it started or was down too."""
        return max(min(self._removed.get(name, end), end) - self._created[name], 0.0)

    # --- what happens -----------------------------------------------------------------------------------------------

    def _coming(self) -> Iterator[tuple[float, Action]]:
        for at, arrival in self._arrivals:
            yield at, lambda arrival=arrival: self._arrive(arrival)  # type: ignore[misc]

    def _arrive(self, arrival: Arrival) -> None:
        self._to_come -= 1
        length, longest = arrival.num_prompt, self.config.max_len - 1
        outcome = Outcome(id=arrival.id, arrived=arrival.at, num_prompt=length, num_output=arrival.num_output)
        self.outcomes[arrival.id] = outcome
        if length > longest:
            # Live, the gateway says so before it queues anything.
            outcome.status, outcome.reason = "rejected", f"the prompt has {length} tokens; at most {longest} fit"
            return
        prompt, blocks = arrival.prompt(), arrival.blocks
        route = RouteRequest(
            id=arrival.id,
            num_prompt=length,
            num_output=arrival.limit,
            blocks=tuple(chain(prompt, self._router_block_size)) if blocks is None else blocks,
            session=arrival.session,
        )
        self.gateway.submit(Flight(arrival, outcome, prompt, route, self.now))

    @property
    def is_over(self) -> bool:
        """Nothing runs, waits or is to come."""
        return not self._to_come and not self.gateway.flights

    def _tick(self) -> None:
        self.gateway.tick()
        for member in list(self.gateway.members.values()):
            if member.draining and not member.attempts:
                self.gateway.remove(member, "it was drained")
                self._removed[member.name] = self.now
        if self.on_tick is not None:
            self.on_tick(self)
        if not self.is_over:
            self.clock.at(self.now + TICK_SECONDS, self._tick)

    def _sample(self) -> None:
        self._take_sample()
        if not self.is_over:
            self.clock.at(self.now + (self._interval or 1.0), self._sample)

    def _take_sample(self) -> None:
        """Of what happened since the last one."""
        since, arrived_before, ended_before, tokens_before, busy_before, up_before = self._sampled
        up = [member for member in self.members.values() if member.is_up]
        loads = [member.replica.core.load() for member in up]
        blocks = sum(load.num_blocks for load in loads)
        tokens = self.gateway.generated_tokens
        arrived, ended = len(self.outcomes), len(self.outcomes) - len(self.gateway.flights)
        busy = sum(member.replica.busy_until(self.now) for member in self.members.values())
        up_seconds = sum(member.up_seconds(self.now) for member in self.members.values())
        self._sampled = (self.now, arrived, ended, tokens, busy, up_seconds)
        self.samples.append(
            Sample(
                at=self.now,
                arrived=arrived - arrived_before,
                completed=ended - ended_before,
                output_tokens_per_second=(tokens - tokens_before) / max(self.now - since, 1e-9),
                running=sum(load.num_running for load in loads),
                waiting=sum(load.num_waiting for load in loads),
                queued=self.gateway.dispatch.num_waiting,
                kv_usage=1 - sum(load.num_free_blocks for load in loads) / blocks if blocks else 0.0,
                ready=sum(member.state == "ready" for member in up),
                # Sums of many floats: what is left of them in a moment without work may lie below 0.
                busy=min(max(busy - busy_before, 0.0) / max(up_seconds - up_before, 1e-9), 1.0),
            )
        )
