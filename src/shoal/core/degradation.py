"""Graceful degradation: when requests for one model are served by a smaller one, and when they go back.

A model is left once its trouble has lasted, and goes back once it has been clear for longer; the wait for the return
doubles with every relapse, and traffic returns by shares. So it cannot flap, and it always returns.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Collection, Mapping
from typing import Literal

import msgspec

Trouble = Literal["down", "over_limit"]
"""down: no endpoint is ready · over_limit: a request would wait longer than `max_wait`, or its queue is full."""
Phase = Literal["own", "degraded", "returning"]


class DegradationPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one model. Times are seconds."""

    fallback: str
    """Name of the model that serves instead; it may have a fallback itself."""
    when: tuple[Trouble, ...] = ("down", "over_limit")
    max_wait: float = 10.0
    """An expected wait beyond this is over the limit."""
    down_seconds: float = 2.0
    """How long no endpoint may be ready before requests go elsewhere."""
    over_limit_seconds: float = 5.0
    leave_seconds: float = 15.0
    """How long the trouble must have been over before requests come back; doubles with each relapse."""
    max_leave_seconds: float = 240.0
    relapse_seconds: float = 300.0
    """Trouble within this long after a return began is a relapse; later it is a new one."""
    ramp_seconds: float = 10.0
    """Over which traffic comes back, from none of it to all."""

    def hold(self, trouble: Trouble) -> float:
        return self.down_seconds if trouble == "down" else self.over_limit_seconds


class BadDegradation(ValueError):
    """The policies contradict themselves. The message is for the user."""


class DegradationChange(msgspec.Struct, frozen=True, kw_only=True):
    """For the fleet's events, metrics and audit log."""

    model: str
    phase: Phase
    served_by: str
    reason: str


class _Model:
    """What is remembered of one model with a fallback."""

    def __init__(self, policy: DegradationPolicy) -> None:
        self.policy = policy
        self.phase: Phase = "own"
        self.trouble_since: dict[Trouble, float] = {}
        self.clear_since: float | None = None
        self.returning_since: float | None = None
        """When the last return began; kept after its end, for a relapse is counted from it."""
        self.leave_seconds = policy.leave_seconds

    def observe(self, troubles: list[Trouble], now: float) -> Trouble | None:
        """Note what is so, and return the trouble that has lasted, if any."""
        self.trouble_since = {trouble: self.trouble_since.get(trouble, now) for trouble in troubles}
        self.clear_since = None if troubles else (now if self.clear_since is None else self.clear_since)
        lasting = (t for t, since in self.trouble_since.items() if now - since >= self.policy.hold(t))
        return next(lasting, None)

    def degrade(self, now: float) -> None:
        is_relapse = self.returning_since is not None and now - self.returning_since < self.policy.relapse_seconds
        longer = min(2 * self.leave_seconds, self.policy.max_leave_seconds)
        self.leave_seconds = max(longer, self.policy.leave_seconds) if is_relapse else self.policy.leave_seconds
        self.phase = "degraded"

    def share(self, now: float) -> float:
        """Of its requests, what the model serves itself."""
        if self.phase == "own":
            return 1.0
        if self.phase == "degraded" or self.returning_since is None:
            return 0.0
        ramp = self.policy.ramp_seconds
        return min(1.0, max(0.0, (now - self.returning_since) / ramp)) if ramp > 0 else 1.0


class Degrader:
    def __init__(self, policies: Mapping[str, DegradationPolicy], models: Collection[str]) -> None:
        """`policies` by the name of the model that has a fallback, `models` all names. Raises BadDegradation."""
        check_policies(policies, models)
        self._models = {name: _Model(policy) for name, policy in policies.items()}
        self._down: dict[str, bool] = {}

    def observe(self, model: str, ready: int, expected_wait: float, now: float) -> DegradationChange | None:
        """Say how a model is: its ready endpoints, and how long a request that comes now would wait.

        `expected_wait` is infinite where the queue is full. To be called for every model at least once a second:
        phases change here and nowhere else.
        """
        self._down[model] = ready == 0
        held = self._models.get(model)
        if held is None:
            return None
        policy = held.policy
        troubles: list[Trouble] = []
        if ready == 0 and "down" in policy.when:
            troubles.append("down")
        if expected_wait > policy.max_wait and "over_limit" in policy.when:
            troubles.append("over_limit")
        lasting = held.observe(troubles, now)
        if held.phase != "degraded":
            if lasting is not None:
                held.degrade(now)
                return self._change(model, _reason(lasting, expected_wait, policy))
            if held.phase == "returning" and held.share(now) == 1.0:
                held.phase = "own"
                return self._change(model, "all of its traffic is back")
        elif held.clear_since is not None and now - held.clear_since >= held.leave_seconds:
            held.phase, held.returning_since = "returning", now
            return self._change(model, f"clear for {held.leave_seconds:g} s")
        return None

    def serve_by(self, model: str, opt_out: bool, request_key: str, now: float) -> str:
        """The model that is to serve a request for `model`.

        `request_key` decides who goes back first while traffic returns: equal keys go together, so a conversation does
        best with one key, and a key that has gone back stays back. A fallback without a ready endpoint is never used:
        its requests would be no better off there.
        """
        held = self._models.get(model)
        if opt_out or held is None or _position(model, request_key) < held.share(now):
            return model
        instead = self.serve_by(held.policy.fallback, False, request_key, now)
        return model if self._down.get(instead, False) else instead

    def served_by(self, model: str) -> str:
        """For people: the model that serves its requests where that is another one, else empty."""
        held = self._models.get(model)
        if held is None or held.phase == "own":
            return ""
        instead = self.served_by(held.policy.fallback) or held.policy.fallback
        return "" if self._down.get(instead, False) else instead

    def phase(self, model: str) -> Phase:
        held = self._models.get(model)
        return "own" if held is None else held.phase

    def _change(self, model: str, reason: str) -> DegradationChange:
        return DegradationChange(
            model=model, phase=self.phase(model), served_by=self.served_by(model) or model, reason=reason
        )

    def check(self) -> None:
        """Invariants, for tests."""
        for name, held in self._models.items():
            policy = held.policy
            assert policy.leave_seconds <= held.leave_seconds <= max(policy.leave_seconds, policy.max_leave_seconds)
            assert (held.clear_since is None) or not held.trouble_since, name
            assert held.phase != "returning" or held.returning_since is not None, name


def check_policies(policies: Mapping[str, DegradationPolicy], models: Collection[str]) -> None:
    """Every name is known, no chain of fallbacks comes back to where it began. Raises BadDegradation."""
    for name, policy in policies.items():
        fields = ("max_wait", "down_seconds", "over_limit_seconds", "leave_seconds", "relapse_seconds", "ramp_seconds")
        for field in fields:
            if not getattr(policy, field) >= 0:
                raise BadDegradation(f"models.{name}.{field} is {getattr(policy, field)}; it must be 0 or more seconds")
        chain = [name]
        while chain[-1] in policies:
            fallback = policies[chain[-1]].fallback
            if fallback not in models:
                near = difflib.get_close_matches(fallback, sorted(models), n=1, cutoff=0.0)
                hint = f"; the nearest model is {near[0]!r}" if near else ""
                raise BadDegradation(f"models.{chain[-1]}.fallback names {fallback!r}, which is no model{hint}")
            if fallback in chain:
                loop = " -> ".join([*chain[chain.index(fallback) :], fallback])
                raise BadDegradation(f"models.{chain[-1]}.fallback makes a circle: {loop}")
            chain.append(fallback)


def _position(model: str, request_key: str) -> float:
    """Of a request in [0, 1), the same in every gateway; another one for each model of a chain."""
    return zlib.crc32(f"{model}\0{request_key}".encode()) / 2**32


def _reason(trouble: Trouble, expected_wait: float, policy: DegradationPolicy) -> str:
    if trouble == "down":
        return f"no endpoint ready for {policy.down_seconds:g} s"
    return f"expected wait {expected_wait:.1f} s over {policy.max_wait:g} s for {policy.over_limit_seconds:g} s"
