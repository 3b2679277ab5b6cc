"""Health is progress: an endpoint that has work and makes no step is not well, whatever its process says.

Nothing is sent to find that out. Each endpoint's steps are watched by themselves, and how long one may take is learned
from those before it. Failures are counted only if they are the endpoint's: what a client did wrong says nothing of it.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

import msgspec

from shoal.core.fleet_types import FailureKind


class HealthConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times in seconds."""

    stall_seconds: float = 2.0
    """An endpoint with work may always take so long for a step."""
    stall_steps: float = 20.0
    """Or so many times its median step, if that is longer."""
    stall_longest: float = 3.0
    """Or so many times the longest of its last steps: among steps that decode there are some that prefill."""
    first_seconds: float = 30.0
    """Until it has made a step, of which nothing is known yet."""
    idle_seconds: float = 5.0
    """One without work that has said nothing for so long gets none."""
    fence_seconds: float = 0.5
    """A suspect that makes no step for so long after that loses what it has to others."""
    breaker_failures: int = 5
    """Failures in a row after which an endpoint gets nothing for a while."""
    breaker_seconds: float = 2.0
    """For the first time; twice as long after each failed try, at most `breaker_most_seconds`."""
    breaker_most_seconds: float = 60.0


_REMEMBERED_STEPS = 64


class ProgressWatch:
    """Of one endpoint: whether it moves."""

    def __init__(self, config: HealthConfig, now: float) -> None:
        self._config = config
        self._steps: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        """Durations of steps that followed one another while there was work."""
        self._busy = False
        self.progress_at = now
        """Of the last step, or sign of life, or of the moment at which it got work after it had none."""

    def working(self, busy: bool, now: float) -> None:
        """Whether it has work from now on."""
        if busy and not self._busy:
            self.progress_at = max(self.progress_at, now)
        self._busy = busy

    def stepped(self, now: float) -> None:
        if now > self.progress_at:
            if self._busy:
                self._steps.append(now - self.progress_at)
            self.progress_at = now

    def alive(self, now: float) -> None:
        """A sign of life: as good as a step for one that has nothing to do, and nothing otherwise."""
        if not self._busy:
            self.progress_at = max(self.progress_at, now)

    @property
    def median_step(self) -> float | None:
        return sorted(self._steps)[len(self._steps) // 2] if self._steps else None

    @property
    def patience(self) -> float:
        """Seconds without progress after which something is wrong."""
        config = self._config
        if not self._busy:
            return config.idle_seconds
        if (median := self.median_step) is None:
            return max(config.stall_seconds, config.first_seconds)
        learned = max(config.stall_steps * median, config.stall_longest * max(self._steps))
        return max(config.stall_seconds, learned)

    def silence(self, now: float) -> float:
        return now - self.progress_at

    def is_suspect(self, now: float) -> bool:
        return self.silence(now) > self.patience

    def is_hung(self, now: float) -> bool:
        """It was suspect for long enough that others should go on with what it has."""
        return self.silence(now) > self.patience + self._config.fence_seconds


BreakerState = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """Keeps requests from an endpoint that fails them. One request at a time tries whether it is well again."""

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._failures = 0
        self._times_opened = 0
        self._open_until = 0.0
        self._trying: str | None = None
        self.state: BreakerState = "closed"

    def allows(self, now: float) -> bool:
        """Whether a request may be sent now."""
        if self.state == "open" and now >= self._open_until:
            self.state, self._trying = "half_open", None
        return self.state == "closed" or (self.state == "half_open" and self._trying is None)

    def sent(self, attempt_id: str) -> None:
        if self.state == "half_open" and self._trying is None:
            self._trying = attempt_id

    def worked(self, attempt_id: str) -> None:
        """A request got its first token, or an answer that is the client's own fault."""
        if self.state == "open" or (self.state == "half_open" and attempt_id != self._trying):
            return  # of a request sent before it opened
        self._failures = 0
        self._times_opened = 0
        self.state = "closed"
        self._trying = None

    def ended(self, attempt_id: str) -> None:
        """Neither: the client left, or the request went elsewhere."""
        if attempt_id == self._trying:
            self._trying = None

    def failed(self, attempt_id: str, kind: FailureKind, now: float, retry_after: float | None = None) -> None:
        if kind in ("lost", "hung", "drained"):
            self.ended(attempt_id)  # it is started anew, fenced or taken away: that is not for the breaker to decide
            return
        was_trying = self.state == "half_open" and attempt_id == self._trying
        self._failures += 1
        is_one_of_few = self.state != "closed" or self._failures < self._config.breaker_failures
        if is_one_of_few and not was_trying and retry_after is None:
            return
        seconds = min(self._config.breaker_seconds * 2**self._times_opened, self._config.breaker_most_seconds)
        self._times_opened = min(self._times_opened + 1, 16)
        self._open_until = now + max(seconds, retry_after or 0.0)
        self._trying = None
        self.state = "open"

    def reset(self) -> None:
        """It was started anew."""
        self._failures = self._times_opened = 0
        self._trying = None
        self.state = "closed"
