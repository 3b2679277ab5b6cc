"""Autoscaling as Kubernetes does it: wanted = ceil(replicas * measure / target), within bounds.

A change within `tolerance` of the target is none. Fewer replicas are wanted only once they were for `down_seconds`. New
ones are of use after the time that a start takes; those taken away end what they have first.
"""

from __future__ import annotations

from collections import deque
from math import ceil
from typing import Literal

import msgspec

from shoal.sim.fleet_simulation import FleetSimulation

Measure = Literal["queue", "running", "kv"]
"""queue: requests that wait, in the gateway and in engines, a replica · running: share of the slots in use · kv: share
of the KV blocks in use."""


class Autoscaling(msgspec.Struct, frozen=True, kw_only=True):
    measure: Measure
    target: float
    least: int
    most: int
    interval: float = 15.0
    tolerance: float = 0.1
    down_seconds: float = 300.0


class AutoscalingError(Exception):
    pass


def check(policy: Autoscaling) -> None:
    if not policy.target > 0:
        raise AutoscalingError(f"the target of {policy.measure} must be above 0, got {policy.target:g}")
    if policy.measure != "queue" and policy.target > 1:
        raise AutoscalingError(f"the target of {policy.measure} is a share, at most 1, got {policy.target:g}")
    if not 1 <= policy.least <= policy.most:
        raise AutoscalingError(f"replicas must go from at least 1 up, got {policy.least} to {policy.most}")


class Autoscaler:
    def __init__(self, policy: Autoscaling, simulation: FleetSimulation) -> None:
        check(policy)
        self.policy = policy
        self._simulation = simulation
        self._wanted: deque[tuple[float, int]] = deque()
        """Of late: when, and how many were wanted."""
        self._spares = sum(member.spare for member in simulation.members.values())
        simulation.at(policy.interval, self._look)

    def _look(self) -> None:
        simulation, policy = self._simulation, self.policy
        # Spares are kept whatever the load is.
        kept = [m for m in simulation.members.values() if m.state != "down" and not (m.spare or m.draining)]
        count = len(kept)
        wanted = self._want(count)
        now = simulation.now
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - policy.down_seconds:
            self._wanted.popleft()
        stable = max(number for _, number in self._wanted)
        if wanted > count:
            # Those that end what they have hold their devices until then.
            self._grow(min(wanted - count, policy.most - simulation.num_replicas + self._spares))
        elif stable < count:
            # Those that do least go.
            ready = sorted((m for m in kept if m.state == "ready"), key=lambda m: (len(m.attempts), m.name))
            for member in ready[: count - stable]:
                simulation.drain(member.name)
        if not simulation.is_over:
            simulation.at(now + policy.interval, self._look)

    def _want(self, count: int) -> int:
        policy = self.policy
        ratio = self._measured(count) / policy.target
        wanted = count if abs(ratio - 1) <= policy.tolerance else ceil(max(count, 1) * ratio)
        return min(max(wanted, policy.least), policy.most)

    def _measured(self, count: int) -> float:
        gateway = self._simulation.gateway
        loads = [m.replica.core.load() for m in gateway.members.values() if m.state != "down" and not m.spare]
        if self.policy.measure == "queue":
            return (gateway.dispatch.num_waiting + sum(load.num_waiting for load in loads)) / max(count, 1)
        config = self._simulation.config
        slots = len(loads) * config.max_sequences
        if self.policy.measure == "running":
            return sum(load.num_running for load in loads) / max(slots, 1)
        blocks = len(loads) * config.num_blocks
        return 1 - sum(load.num_free_blocks for load in loads) / blocks if blocks else 0.0

    def _grow(self, count: int) -> None:
        simulation = self._simulation
        for _ in range(count):
            name = f"r{len(simulation.members):03d}"
            simulation.say("scaled_up", name, f"of use in {simulation.start_seconds:.0f} s")
            simulation.add(name, after=simulation.start_seconds)
