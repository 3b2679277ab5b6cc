"""Faults that are somebody's decision, or several faults in a row: drain, rolling restart, a gateway that ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from functools import partial

from shoal.bench.faults.deployment import Deployment, FleetWatch
from shoal.bench.faults.injectors import Kill, NotInjected, Operation
from shoal.bench.processes import Process, comes_true
from shoal.core.fleet_types import EndpointStatus

_DRAIN_SECONDS = 0.5
"""Shorter than most requests last, so that they have to move."""
_RETURN_SECONDS = 120.0
"""In which an engine must be loaded again."""


def drain(deployment: Deployment, watch: FleetWatch, aim: str, target: EndpointStatus) -> Operation:
    """Drained, seen to be, and made to serve again."""

    def happened() -> str | None:
        seen = watch.endpoints.get(target.name)
        if seen is None:
            return f"{target.name} is gone"
        return f"{target.name} is {seen.state}" if seen.state == "draining" or seen.epoch > target.epoch else None

    async def act() -> str:
        return await deployment.operate("drain", aim, within=_DRAIN_SECONDS)

    async def undo() -> str:
        return await deployment.operate("undrain", target.name)

    return Operation(act, happened, undo=undo, seconds=5.0)


class RollingRestart:
    """Every engine in turn: the next one once the last serves again."""

    def __init__(self, deployment: Deployment, watch: FleetWatch, *, aimed_at_nothing: bool) -> None:
        self.breaches: list[str] = []
        self._deployment = deployment
        self._watch = watch
        self._aimed_at_nothing = aimed_at_nothing
        self._before: dict[str, Process] = {}

    async def inject(self) -> None:
        for name, endpoint in list(self._watch.endpoints.items()):
            process = self._deployment.process_of(endpoint)
            if process is None:
                continue
            self._before[name] = process
            said = await self._deployment.operate(
                "restart", "nobody" if self._aimed_at_nothing else name, within=_DRAIN_SECONDS
            )
            if said and not self._aimed_at_nothing:
                raise NotInjected(said)
            if not self._aimed_at_nothing and not await comes_true(partial(self._is_new, name), _RETURN_SECONDS):
                raise NotInjected(f"{name} was not back within {_RETURN_SECONDS:g} s")

    def _is_new(self, name: str) -> bool:
        endpoint = self._watch.endpoints.get(name)
        process = None if endpoint is None else self._deployment.process_of(endpoint)
        return endpoint is not None and endpoint.state == "ready" and process not in (None, self._before[name])

    async def verify(self) -> str:
        old = [name for name in self._before if not self._is_new(name)]
        if old or not self._before:
            raise NotInjected(f"{len(old)} of {len(self._before)} endpoints run as the process that they were")
        return f"{len(self._before)} endpoints run as new processes"

    async def heal(self) -> None:
        pass


class KillTwice:
    """A second engine is killed as soon as requests of the first have begun to move."""

    def __init__(
        self,
        deployment: Deployment,
        watch: FleetWatch,
        target: EndpointStatus,
        decoy: Callable[[], Process] | None,
    ) -> None:
        self.breaches: list[str] = []
        self._deployment = deployment
        self._watch = watch
        self._target = target
        self._decoy = decoy
        self._kills: list[Kill] = []

    async def inject(self) -> None:
        moved = self._migrations()
        await self._kill(self._target)
        await comes_true(lambda: self._migrations() > moved, 2.0)
        second = max(
            (endpoint for endpoint in self._watch.ready if endpoint.name != self._target.name),
            key=lambda endpoint: (endpoint.requests, endpoint.name),
            default=None,
        )
        await self._kill(second)

    async def _kill(self, endpoint: EndpointStatus | None) -> None:
        process = None if endpoint is None else self._deployment.process_of(endpoint)
        if process is None:
            raise NotInjected("no engine was there to be killed")
        self._kills.append(Kill(process if self._decoy is None else self._decoy(), process))
        await self._kills[-1].inject()

    def _migrations(self) -> int:
        return 0 if self._watch.status is None else sum(model.migrations for model in self._watch.status.models)

    async def verify(self) -> str:
        return ", ".join([await kill.verify() for kill in self._kills])

    async def heal(self) -> None:
        pass


def stop_gateway(deployment: Deployment, decoy: Process | None, *, with_kill: bool) -> Operation:
    """The first gateway ends, proved by its exit status, and is started again when healed."""
    gateway = deployment.gateways[0]
    number = signal.SIGKILL if with_kill else signal.SIGTERM
    expected = -signal.SIGKILL if with_kill else 0

    async def act() -> str:
        os.kill(gateway.pid if decoy is None else decoy.pid, number)
        return ""

    def happened() -> str | None:
        status = gateway.status
        return f"the gateway of pid {gateway.pid} exited with status {status}" if status == expected else None

    async def undo() -> str:
        if gateway.status is not None:
            gateway.start()
            await gateway.until_answers("/ready", _RETURN_SECONDS, deployment.headers)
            await asyncio.sleep(0.5)  # so that the watch has seen it
        return ""

    return Operation(act, happened, undo=undo, seconds=2.0 if with_kill or decoy is not None else 40.0)
