"""The endpoints of all models: started, watched, fenced, started anew, added, drained and removed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable

import msgspec

from shoal import __version__
from shoal.core.degradation import Degrader
from shoal.core.fleet_types import (
    EndpointFailure,
    EndpointReport,
    FleetEvent,
    FleetStatus,
    ModelStatus,
    Percentiles,
)
from shoal.core.health import HealthConfig
from shoal.serve.endpoint import Endpoint, EndpointStartError
from shoal.serve.errors import ApiError
from shoal.serve.member import Member
from shoal.serve.pool import Pool

_TICK_SECONDS = 0.1
_REMEMBERED_EVENTS = 200


class SupervisionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times in seconds."""

    restart_seconds: float = 0.2
    """Before an endpoint that was lost is started anew, or connected to again; twice as long after each failure."""
    restart_most_seconds: float = 30.0
    reconnect_most_seconds: float = 2.0
    """The same of an endpoint that somebody else starts: to ask whether it is back costs next to nothing."""
    steady_seconds: float = 60.0
    """An endpoint that ran for so long is started at once again."""
    hung_seconds: float = 30.0
    """An engine of the fleet's own that was fenced for so long is killed and started anew."""


class Fleet:
    """`start` it, and `stop` it. Pools are to be there before; members may come and go."""

    def __init__(
        self, pools: dict[str, Pool], degrader: Degrader, health: HealthConfig, supervision: SupervisionConfig
    ) -> None:
        self.pools = pools
        self.degrader = degrader
        self.health = health
        self.supervision = supervision
        self.events: deque[FleetEvent] = deque(maxlen=_REMEMBERED_EVENTS)
        self.draining = False
        self.on_event: Callable[[FleetEvent], None] = lambda event: None
        self.journal_state: Callable[[], str] = lambda: "off"
        self.audit_state: Callable[[], str] = lambda: "off"
        self.percentiles: Callable[[str, float], tuple[Percentiles, Percentiles, Percentiles]] | None = None
        """Of a model: time to first token, between tokens, and to the end."""
        self._began = time.monotonic()
        self._members: dict[str, tuple[Member, Pool]] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._lost: dict[str, asyncio.Event] = {}
        self._ticking: asyncio.Task[None] | None = None

    # --- members ----------------------------------------------------------------------------------------------------

    def member(self, name: str) -> Member:
        """Raises ApiError 404."""
        if name not in self._members:
            known = ", ".join(self._members) or "none"
            raise ApiError(404, f"there is no endpoint {name!r}; there are: {known}", code="unknown_endpoint")
        return self._members[name][0]

    def members(self) -> list[Member]:
        return [member for member, _ in self._members.values()]

    def add(self, endpoint: Endpoint, pool: Pool, *, spare: bool = False) -> asyncio.Future[None]:
        """Start an endpoint and keep it running. The future is done, or has EndpointStartError, after the first try."""
        if endpoint.name in self._members:
            raise ApiError(409, f"there is an endpoint {endpoint.name!r} already", code="endpoint_exists")
        member = Member(endpoint, pool.router, self.health, spare=spare)
        pool.members[member.name] = member
        self._members[member.name] = member, pool
        self._lost[member.name] = asyncio.Event()
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keepers[member.name] = asyncio.create_task(self._keep(member, pool, first))
        return first

    async def _keep(self, member: Member, pool: Pool, first: asyncio.Future[None]) -> None:
        """Start it; whenever it is lost, start it anew."""
        config, failures = self.supervision, 0
        longest = config.restart_most_seconds if member.endpoint.kind == "shoal" else config.reconnect_most_seconds
        lost = self._lost[member.name]
        while True:
            lost.clear()
            try:
                await member.endpoint.start(self)
            except EndpointStartError as error:
                failures += 1
                member.become("down", f"{error}")
                if not first.done():
                    first.set_exception(error)
            else:
                began = time.monotonic()
                member.restarts += first.done()
                member.started(began)
                if first.done():
                    self.say("endpoint_ready", f"{member.name} is ready again", member.name)
                else:
                    first.set_result(None)
                pool.pump_soon()
                await lost.wait()
                failures = 0 if time.monotonic() - began > config.steady_seconds else failures + 1
            await asyncio.sleep(min(config.restart_seconds * 2 ** min(failures - 1, 16), longest))

    async def remove(self, name: str) -> None:
        """At once: what it has is moved."""
        member = self.member(name)
        _, pool = self._members.pop(name)
        await self._end_keeper(name)
        del pool.members[name], self._lost[name]
        pool.removed(member)
        member.become("down", "it was removed")
        pool.move_all(member, EndpointFailure(kind="drained", message="the endpoint was removed"))
        pool.router.remove(name)
        await member.endpoint.stop()
        self.say("removed", f"{name} was removed")

    async def drain(self, name: str, seconds: float) -> None:
        """Send it nothing new and wait for what it has. What is not done in time is moved, if there are others."""
        member = self.member(name)
        _, pool = self._members[name]
        member.draining = True
        self.say("draining", f"{name} is draining")
        until = time.monotonic() + seconds
        while member.attempts and name in self._members:
            now = time.monotonic()
            if now >= until and any(other.takes(now, spares=True) for other in pool.members.values()):
                failure = EndpointFailure(kind="drained", message="the endpoint is being drained")
                pool.move_all(member, failure)
            await asyncio.sleep(0.02)
        self.say("drained", f"{name} has nothing to do any more")

    async def restart(self, name: str, seconds: float) -> None:
        """Drain, stop and start: for one endpoint after the other this is a rolling restart."""
        member = self.member(name)
        _, pool = self._members[name]
        await self.drain(name, seconds)
        await self._end_keeper(name)
        member.become("starting", "it is restarted")
        await member.endpoint.stop()
        member.draining = False
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keepers[name] = asyncio.create_task(self._keep(member, pool, first))
        try:
            await first
        except EndpointStartError as error:
            raise ApiError(503, f"{name} did not start again: {error}", code="endpoint_failed") from None
        member.restarts += 1

    async def _end_keeper(self, name: str) -> None:
        keeper = self._keepers.pop(name)
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)

    # --- what endpoints say (EndpointListener) ----------------------------------------------------------------------

    def reported(self, name: str, report: EndpointReport) -> None:
        found = self._members.get(name)
        if found is None:
            return
        member, pool = found
        if member.reported(report) and member.state in ("suspect", "fenced"):
            self.say("endpoint_ready", f"{name} moves again after {time.monotonic() - member.since:.1f} s", name)
            member.become("ready")
            pool.pump_soon()

    def gone(self, name: str, reason: str) -> None:
        if name not in self._members:
            return
        member, pool = self._members[name]
        if member.state == "down":
            return
        member.epoch += 1
        member.become("down", reason)
        self.say("endpoint_lost", f"{name}: {reason}", name)
        pool.move_all(member, EndpointFailure(kind="lost", message=reason))
        self._lost[name].set()
        pool.pump_soon()

    # --- watching ---------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            now = time.monotonic()
            # This loop stood still itself: nobody could have been heard.
            late, last = now - last > 10 * _TICK_SECONDS, now
            for member, pool in list(self._members.values()):
                if not late:
                    self._watch(member, pool, now)
            for name, pool in self.pools.items():
                pool.measure(now)
                pool.expire(now)
                pool.pump_soon()
                if pool.is_starting:
                    continue
                change = self.degrader.observe(name, pool.num_ready, pool.expected_wait(now), now)
                if change is not None:
                    pool.degradations += change.phase == "degraded"
                    kind = {"degraded": "degraded", "returning": "returning", "own": "restored"}[change.phase]
                    self.say(kind, f"{name} is served by {change.served_by}: {change.reason}")

    def _watch(self, member: Member, pool: Pool, now: float) -> None:
        judgement = member.judge(
            now,
            others=any(other.state == "ready" and other is not member for other in pool.members.values()),
            hung_seconds=self.supervision.hung_seconds,
            restartable=member.endpoint.kind == "shoal",
        )
        if judgement is None:
            return
        if judgement.state == "down":
            self.gone(member.name, judgement.reason or "")
            return
        member.become(judgement.state, judgement.reason)
        if judgement.state == "fenced":
            member.epoch += 1
            message = f"{member.name} made {judgement.reason}; others go on with its work"
            self.say("endpoint_hung", message, member.name)
            pool.move_all(member, EndpointFailure(kind="hung", message=judgement.reason or ""))

    def say(self, kind: str, message: str, endpoint: str = "") -> None:
        event = FleetEvent(time=time.time(), kind=kind, message=message, endpoint=endpoint)
        self.events.append(event)
        self.on_event(event)

    # --- all of it --------------------------------------------------------------------------------------------------

    def start_watching(self) -> None:
        self._ticking = asyncio.create_task(self._tick())

    @property
    def num_flights(self) -> int:
        return sum(len(pool.flights) for pool in self.pools.values())

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Wait for what runs, at most so long, then end every endpoint. Nothing of it is left afterwards."""
        self.draining = True
        until = time.monotonic() + drain_seconds
        while self.num_flights and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
        for pool in self.pools.values():
            for flight in list(pool.flights.values()):
                flight.fail(ApiError(503, "the server was stopped", code="stopped"))
        members, self._members = self._members, {}
        for name in members:
            await self._end_keeper(name)
        stops = [member.endpoint.stop() for member, _ in members.values()]
        with contextlib.suppress(Exception):
            await asyncio.gather(*stops, return_exceptions=True)

    def status(self) -> FleetStatus:
        now = time.monotonic()
        return FleetStatus(
            version=__version__,
            uptime=now - self._began,
            draining=self.draining,
            models=[self._model_status(name, pool, now) for name, pool in self.pools.items()],
            events=list(self.events),
            journal=self.journal_state(),
            audit=self.audit_state(),
        )

    def _model_status(self, name: str, pool: Pool, now: float) -> ModelStatus:
        status = msgspec.structs.replace(pool.status(now), served_by=self.degrader.served_by(name))
        if self.percentiles is None:
            return status
        ttft, itl, e2e = self.percentiles(name, now)
        return msgspec.structs.replace(status, ttft=ttft, itl=itl, e2e=e2e)
