"""What befalls a fleet, as a schedule: endpoints die, ranks are lost, engines hang, links and clocks slow down.

A fault is written as in `kill,replica=3,at=60s,for=30s`, on the command line or as a line of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cache
from math import prod
from typing import Literal, get_args

import msgspec

from shoal.sim.fleet_simulation import FleetSimulation
from shoal.sim.law import Laws

FaultKind = Literal["kill", "rank", "hang", "throttle", "link"]
"""kill: the process dies, and is started anew · rank: one rank dies, what runs is lost, new workers take over · hang:
nothing moves, then goes on · throttle: every step takes `factor` times as long, as by heat · link: collectives have
1/`factor` of the bandwidth."""
_NEEDS_FACTOR = ("throttle", "link")


class FaultError(Exception):
    """The fault cannot be. The message names the key."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    kind: FaultKind
    at: float
    replica: int | None
    """None: all that there are at the time."""
    seconds: float | None = None
    """Until it is over; None: for ever, and of `kill` and `rank`: as long as a start takes."""
    factor: float = 1.0


def parse(text: str, seconds: Callable[[str], float]) -> Fault:
    """`seconds` reads durations, and raises ValueError. Raises FaultError."""
    kind, *pairs = (part.strip() for part in text.split(","))
    kinds = get_args(FaultKind)
    if kind not in kinds:
        near = get_close_matches(kind, kinds, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise FaultError(f"fault {text!r}: {kind!r} is none of {', '.join(kinds)}{hint}")
    values: dict[str, str] = {}
    for pair in pairs:
        key, is_pair, value = pair.partition("=")
        if not is_pair or key not in ("replica", "at", "for", "factor"):
            raise FaultError(f"fault {text!r}: {pair!r} is none of replica=, at=, for=, factor=")
        if key in values:
            raise FaultError(f"fault {text!r}: {key} is given twice")
        values[key] = value
    for key in ("at", "replica", *(("factor",) if kind in _NEEDS_FACTOR else ())):
        if key not in values:
            raise FaultError(f"fault {text!r}: {key}= is missing")
    if kind == "hang" and "for" not in values:
        raise FaultError(f"fault {text!r}: for= is missing: how long does it hang?")
    if "factor" in values and kind not in _NEEDS_FACTOR:
        raise FaultError(f"fault {text!r}: factor= says nothing of {kind}")
    try:
        return Fault(
            kind=kind,  # type: ignore[arg-type]
            at=seconds(values["at"]),
            replica=None if values["replica"] == "all" else _replica(values["replica"]),
            seconds=seconds(values["for"]) if "for" in values else None,
            factor=_factor(values.get("factor", "1")),
        )
    except ValueError as error:
        raise FaultError(f"fault {text!r}: {error}") from None


def _replica(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"replica is {text!r}: write its number, from 0, or all")
    return int(text)


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 <= factor <= 1e6:
        raise ValueError(f"factor is {text}: write how many times slower, at least 1")
    return factor


def schedule(
    faults: Sequence[Fault],
    simulation: FleetSimulation,
    slower_link: Callable[[float], Laws],
    rank_seconds: float,
) -> None:
    """`slower_link`: the laws of steps with links that are so many times slower. `rank_seconds`: until a lost rank is
    noticed, during which nothing moves."""
    names = list(simulation.replicas)
    slowing = _Slowing(simulation, slower_link)
    for fault in faults:
        if fault.replica is not None and fault.replica >= len(names):
            raise FaultError(f"replica {fault.replica} does not exist: there are {len(names)}, from 0")
        name = None if fault.replica is None else names[fault.replica]
        simulation.at(fault.at, lambda fault=fault, name=name: _begin(fault, name, simulation, slowing, rank_seconds))  # type: ignore[misc]


def _begin(fault: Fault, name: str | None, simulation: FleetSimulation, slowing: _Slowing, rank_seconds: float) -> None:
    """`name` is None for all that there are by then."""
    for one in list(simulation.gateway.members) if name is None else [name]:
        if simulation.members[one].state == "down":
            continue  # it was drained and taken away
        if fault.kind == "kill":
            simulation.kill(one, "its process died", back_after=fault.seconds)
        elif fault.kind == "rank":
            back = simulation.start_seconds if fault.seconds is None else fault.seconds
            simulation.lose_rank(one, rank_seconds, back)
        elif fault.kind == "hang":
            simulation.hang(one, fault.seconds or 0.0)
        else:
            slowing.begin(one, fault)


class _Slowing:
    """What is slow, where. Faults of one kind may overlap: their factors multiply."""

    def __init__(self, simulation: FleetSimulation, slower_link: Callable[[float], Laws]) -> None:
        self._simulation = simulation
        self._slower_link = cache(slower_link)
        self._active: dict[tuple[str, str], list[float]] = {}
        """Factors by replica and kind."""

    def begin(self, name: str, fault: Fault) -> None:
        factors = self._active.setdefault((name, fault.kind), [])
        factors.append(fault.factor)
        self._apply(name, fault.kind)
        share = f"{fault.factor:g}"
        links = fault.kind == "link"
        message = f"links have 1/{share} of their bandwidth" if links else f"steps take {share} times as long"
        self._simulation.say(fault.kind, name, message)

        def end() -> None:
            factors.remove(fault.factor)
            self._apply(name, fault.kind)
            self._simulation.say(fault.kind, name, "it is over")

        if fault.seconds is not None:
            self._simulation.at(self._simulation.now + fault.seconds, end)

    def _apply(self, name: str, kind: FaultKind) -> None:
        factor = prod(sorted(self._active[name, kind]))
        replica = self._simulation.replicas[name]
        if kind == "throttle":
            replica.slowness = factor
        else:
            replica.laws = self._simulation.laws if factor == 1 else self._slower_link(factor)
