"""Faults of processes and of connections. Each acts on its `aim` and is proved on its `target`.

The two are the same but in the negative control, where the aim is something that does not matter. `verify` must then
say that nothing happened to the target, or its proof is worth nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Protocol

from shoal.bench.faults.proxy import Counters, ProxyThread, Rules
from shoal.bench.processes import Process, comes_true, descendants, find, resident_bytes
from shoal.core.fleet_types import EndpointStatus

_EFFECT_SECONDS = 1.0
"""A signal or a reset takes effect within this, or it did not take effect."""
_SAMPLE_SECONDS = 0.05


class NotInjected(Exception):
    """The fault did not take effect, so what was seen under it proves nothing."""


class Fault(Protocol):
    breaches: list[str]
    """What the fault itself saw that must not be."""

    async def inject(self) -> None: ...

    async def verify(self) -> str:
        """Proof that it took effect, for the report; called at the end of its window. Raises NotInjected."""

    async def heal(self) -> None:
        """Undo what does not undo itself. Called once, whatever happened before."""


# --- processes --------------------------------------------------------------------------------------------------------


class Kill:
    """SIGKILL."""

    def __init__(self, aim: Process, target: Process) -> None:
        self.breaches: list[str] = []
        self._aim = aim
        self._target = target

    async def inject(self) -> None:
        _require(self._target)
        _send(self._aim, signal.SIGKILL)

    async def verify(self) -> str:
        if not await comes_true(lambda: not self._target.lives, _EFFECT_SECONDS):
            raise NotInjected(f"process {self._target.pid} lives on in state {self._target.state}")
        return f"pid {self._target.pid} gone"

    async def heal(self) -> None:
        pass


class KillChild:
    """SIGKILL for a process below `target`, which itself lives on: a server loses its engine, a driver a rank."""

    def __init__(self, aim: Process, target: Process) -> None:
        self.breaches: list[str] = []
        self._aim = aim
        self._target = target
        self._child: Process | None = None

    async def inject(self) -> None:
        _require(self._target)
        self._child = _largest_child(self._target)
        if self._child is None:
            raise NotInjected(f"process {self._target.pid} has no child")
        victim = self._child if self._aim == self._target else self._aim
        _send(victim, signal.SIGKILL)

    async def verify(self) -> str:
        child = self._child
        assert child is not None, "verify comes after inject"
        if not await comes_true(lambda: not child.lives, _EFFECT_SECONDS):
            raise NotInjected(f"process {child.pid} lives on in state {child.state}")
        return f"pid {child.pid} gone, its parent {self._target.pid} was alive"

    async def heal(self) -> None:
        pass


class Hang:
    """SIGSTOP until healed: sockets stay open and nothing comes out of them."""

    def __init__(self, aim: Process, target: Process) -> None:
        self.breaches: list[str] = []
        self._aim = aim
        self._target = target
        self._states: list[str] = []
        self._sampler: asyncio.Task[None] | None = None

    async def inject(self) -> None:
        _require(self._target)
        _send(self._aim, signal.SIGSTOP)
        await comes_true(lambda: self._target.state == "T", _EFFECT_SECONDS)
        self._sampler = asyncio.create_task(self._sample())

    async def _sample(self) -> None:
        while True:
            self._states.append(self._target.state)
            await asyncio.sleep(_SAMPLE_SECONDS)

    async def verify(self) -> str:
        others = [state for state in self._states if state != "T"]
        if others or not self._states:
            raise NotInjected(
                f"process {self._target.pid} was seen {len(self._states)} times, {len(others)} times not stopped"
            )
        return f"pid {self._target.pid} stopped in all {len(self._states)} samples"

    async def heal(self) -> None:
        await _cancel(self._sampler)
        _send(self._aim, signal.SIGCONT)


class Slow:
    """Stopped for a share of every tenth of a second: it makes progress, slowly."""

    def __init__(self, aim: Process, target: Process, share: float = 0.8) -> None:
        self.breaches: list[str] = []
        self._aim = aim
        self._target = target
        self._share = share
        self._cycles = 0
        self._stopped = 0
        self._task: asyncio.Task[None] | None = None

    async def inject(self) -> None:
        _require(self._target)
        self._task = asyncio.create_task(self._cycle())

    async def _cycle(self) -> None:
        period = 0.1
        while True:
            _send(self._aim, signal.SIGSTOP)
            self._stopped += await comes_true(lambda: self._target.state == "T", period)
            await asyncio.sleep(period * self._share)
            self._cycles += 1
            _send(self._aim, signal.SIGCONT)
            await asyncio.sleep(period * (1 - self._share))

    async def verify(self) -> str:
        if self._cycles < 3 or self._stopped < 0.9 * self._cycles:
            raise NotInjected(f"process {self._target.pid} was stopped in {self._stopped} of {self._cycles} cycles")
        return f"pid {self._target.pid} stopped in {self._stopped} of {self._cycles} cycles, {self._share:.0%} of each"

    async def heal(self) -> None:
        await _cancel(self._task)
        _send(self._aim, signal.SIGCONT)


class Flap:
    """Killed again as soon as it is back: `find_target` gives the process that serves now, None meanwhile."""

    def __init__(self, aim: Process | None, find_target: Callable[[], Process | None], times: int = 3) -> None:
        self.breaches: list[str] = []
        self._aim = aim
        self._find = find_target
        self._times = times
        self._killed: list[Process] = []
        self._task: asyncio.Task[None] | None = None

    async def inject(self) -> None:
        self._task = asyncio.create_task(self._flap())

    async def _flap(self) -> None:
        while len(self._killed) < self._times:
            target = self._find()
            if target is not None and target.lives and target not in self._killed:
                self._killed.append(target)
                _send(self._aim or target, signal.SIGKILL)
            await asyncio.sleep(_SAMPLE_SECONDS)

    async def verify(self) -> str:
        """It waits for restarts, so its window is as long as they take."""
        assert self._task is not None, "verify comes after inject"
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._task), 60 if self._aim is None else _EFFECT_SECONDS)
        if len(self._killed) < self._times or not await comes_true(
            lambda: not any(process.lives for process in self._killed), _EFFECT_SECONDS
        ):
            raise NotInjected(f"killed {len(self._killed)} of {self._times} times")
        return f"pids {', '.join(str(process.pid) for process in self._killed)} gone"

    async def heal(self) -> None:
        await _cancel(self._task)


# --- connections ------------------------------------------------------------------------------------------------------


class Link:
    """Something done to all connections through a proxy, proved by a counter that grew."""

    def __init__(
        self, aim: ProxyThread, target: ProxyThread, *, rules: Rules | None, grew: Callable[[Counters], int], what: str
    ) -> None:
        """`rules`: None resets what is open, once."""
        self.breaches: list[str] = []
        self._aim = aim
        self._target = target
        self._rules = rules
        self._grew = grew
        self._what = what
        self._before = 0

    async def inject(self) -> None:
        self._before = self._grew(self._target.counters())
        if self._rules is None:
            self._aim.reset_all()
        else:
            self._aim.set_rules(self._rules)

    async def verify(self) -> str:
        if not await comes_true(lambda: self._grew(self._target.counters()) > self._before, _EFFECT_SECONDS):
            raise NotInjected(f"no {self._what} at the proxy {self._target.url}")
        return f"{self._grew(self._target.counters()) - self._before} {self._what}"

    async def heal(self) -> None:
        self._aim.set_rules(Rules())


def reset(aim: ProxyThread, target: ProxyThread) -> Link:
    return Link(aim, target, rules=None, grew=lambda c: c.resets, what="connections reset")


def partition(aim: ProxyThread, target: ProxyThread) -> Link:
    rules = Rules(blocked=("to_server", "to_client"))
    return Link(aim, target, rules=rules, grew=lambda c: c.blocked_to_client + c.blocked_to_server, what="bytes held")


def partition_replies(aim: ProxyThread, target: ProxyThread) -> Link:
    """One way: what it is told arrives, what it says does not."""
    return Link(aim, target, rules=Rules(blocked=("to_client",)), grew=lambda c: c.blocked_to_client, what="bytes held")


def delay(aim: ProxyThread, target: ProxyThread, seconds: float = 0.2) -> Link:
    return Link(aim, target, rules=Rules(delay=seconds), grew=lambda c: c.delayed, what="bytes delayed")


def throttle(aim: ProxyThread, target: ProxyThread, bytes_per_second: float = 4000.0) -> Link:
    rules = Rules(bytes_per_second=bytes_per_second)
    return Link(aim, target, rules=rules, grew=lambda c: c.throttled, what="bytes throttled")


def cut(aim: ProxyThread, target: ProxyThread, after: int = 1500) -> Link:
    return Link(aim, target, rules=Rules(cut_after=after), grew=lambda c: c.cut, what="connections cut")


# --- what an operator does --------------------------------------------------------------------------------------------


class Operation:
    """A command that an operator gives, proved by what the fleet says of an endpoint afterwards."""

    def __init__(
        self,
        act: Callable[[], Awaitable[str]],
        happened: Callable[[], str | None],
        *,
        undo: Callable[[], Awaitable[str]] | None = None,
        seconds: float = _EFFECT_SECONDS,
    ) -> None:
        """`happened`: the proof, None while there is none. `act` returns what went wrong, or an empty text."""
        self.breaches: list[str] = []
        self._act = act
        self._happened = happened
        self._undo = undo
        self._seconds = seconds
        self._said = ""

    async def inject(self) -> None:
        self._said = await self._act()

    async def verify(self) -> str:
        if not await comes_true(lambda: self._happened() is not None, self._seconds):
            raise NotInjected(f"the fleet does not show it{': ' + self._said if self._said else ''}")
        return self._happened() or ""

    async def heal(self) -> None:
        if self._undo is not None and (said := await self._undo()):
            self.breaches.append(said)


def process_of(status: EndpointStatus) -> Process | None:
    """Of an engine that the fleet started; None of an endpoint elsewhere, or between two starts."""
    word, _, number = status.address.partition(" ")
    return find(int(number)) if word == "pid" and number.isdigit() else None


def _require(target: Process) -> None:
    if not target.lives:
        raise NotInjected(f"process {target.pid} was gone before the fault")


def _largest_child(process: Process) -> Process | None:
    """What computes: beside it a server has helpers whose end nobody notices."""
    children = descendants(process.pid)
    return max(children, key=lambda child: (resident_bytes(child.pid), child.pid), default=None)


def _send(process: Process, number: signal.Signals) -> None:
    """To that very process: a pid that was given to another since is left alone."""
    if process.lives:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


async def _cancel(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
