"""When a mock engine says its tokens: slots, one prompt after another, then a token of each sequence every so often."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

TICK = 0.001
"""Seconds. Everything that is due within one is done in one go: event loops do not wake more precisely, and spin when
they are asked for less."""


@dataclass(frozen=True)
class Law:
    """How fast a mock is."""

    ttft: float = 0.02
    """Seconds between the end of a prompt's prefill and its first token."""
    itl: float = 0.02
    """Seconds between two tokens of a sequence, however many run beside it."""
    prefill_rate: float = 0.0
    """Prompt tokens a second, of all prompts together, one after another; 0 is at once."""
    slots: int = 1 << 20
    """Sequences that run at once; what is beyond them waits."""

    def capacity(self, num_prompt: int, num_output: int) -> float:
        """Requests a second that one engine carries for long."""
        seconds = self.ttft + self.itl * (num_output - 1)
        by_slots = self.slots / (seconds + (num_prompt / self.prefill_rate if self.prefill_rate else 0.0))
        return min(by_slots, self.prefill_rate / num_prompt) if self.prefill_rate else by_slots


class Job(Protocol):
    """A sequence, as the clock sees it."""

    num_prompt: int

    def step(self) -> bool:
        """Say the next token. False after the last."""


class Schedule:
    """Runs jobs by the law. For one event loop."""

    def __init__(self, law: Law) -> None:
        self._law = law
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Job] = deque()
        self._running: set[Job] = set()
        self._due: dict[int, list[tuple[Job, float]]] = {}
        """Jobs with the exact time of their next token, by the tick in which it comes."""
        self._ticks: list[int] = []
        """Those of `_due`, a heap."""
        self._timer: asyncio.TimerHandle | None = None
        self._prefill_until = 0.0
        self.steps = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, job: Job) -> None:
        self._waiting.append(job)
        self._admit()

    def remove(self, job: Job) -> None:
        """Its client has left: its slot is free at once, what was due for it is passed over."""
        if job in self._running:
            self._running.remove(job)
            self._admit()
        elif job in self._waiting:
            self._waiting.remove(job)

    def _admit(self) -> None:
        now = time.monotonic()
        while self._waiting and len(self._running) < self._law.slots:
            job = self._waiting.popleft()
            self._running.add(job)
            prefill = job.num_prompt / self._law.prefill_rate if self._law.prefill_rate else 0.0
            self._prefill_until = max(now, self._prefill_until) + prefill
            self._at(self._prefill_until + self._law.ttft, job)
        self._set_timer()

    def _at(self, moment: float, job: Job) -> None:
        tick = int(moment / TICK) + 1
        if tick not in self._due:
            self._due[tick] = []
            heapq.heappush(self._ticks, tick)
        self._due[tick].append((job, moment))

    def _set_timer(self) -> None:
        if self._ticks and self._timer is None:
            delay = self._ticks[0] * TICK - time.monotonic()
            self._timer = self._loop.call_later(max(TICK, delay), self._fire)

    def _fire(self) -> None:
        self._timer = None
        now = time.monotonic()
        freed = False
        while self._ticks and self._ticks[0] * TICK <= now:
            for job, moment in self._due.pop(heapq.heappop(self._ticks)):
                if job not in self._running:
                    continue
                if job.step():
                    # An engine that was held up goes on from where it is: it does not make up for steps.
                    late = now - moment > self._law.itl
                    self._at((now if late else moment) + self._law.itl, job)
                else:
                    self._running.remove(job)
                    freed = True
            self.steps += 1
        if freed:
            self._admit()
        self._set_timer()
