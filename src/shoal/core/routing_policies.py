"""How an endpoint is chosen, one small class a way. A policy is told everything and changes nothing.

Ties go to the endpoint whose last request is longest ago (`EndpointView.turn`, no two are equal), so every choice
follows from the calls alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

import msgspec

from shoal.core.endpoint_view import EndpointView
from shoal.core.fleet_types import RouteRequest

SLACK_REQUESTS = 2
"""By how many requests an endpoint may be over the load limit."""

COPY_RELIEF = 0.9
"""Part of the prefill of what more endpoints should have that a request is not charged for: the next ones there are
spared it. Not all, so that a request does not leave its home while that has nothing else to do."""


class Question(msgspec.Struct, frozen=True):
    request: RouteRequest
    expected: float
    """Tokens of output, in the mean."""
    cached: dict[str, int]
    """Tokens of the prompt that endpoints probably have; those that have none are left out."""
    wanted: int
    """Tokens at the beginning of the prompt that more endpoints should have: the share of the prompts that begin with
    them is larger than the share of the endpoints that do."""
    now: float

    def num_new(self, view: EndpointView) -> int:
        """Tokens to prefill there: the last one is computed in any case."""
        return max(self.request.num_prompt - self.cached.get(view.name, 0), 1)


class Policy(Protocol):
    uses_prefix: bool
    """Whether it looks at `Question.cached`."""

    def choose(self, question: Question, views: Sequence[EndpointView]) -> EndpointView:
        """One of at least one."""


class RoundRobin:
    """Each in turn, whatever it has to do."""

    uses_prefix = False

    def choose(self, question: Question, views: Sequence[EndpointView]) -> EndpointView:
        return min(views, key=_by_turn)


class LeastTokens:
    """The one with the fewest tokens to prefill and to generate, as far as this gateway knows."""

    uses_prefix = False

    def choose(self, question: Question, views: Sequence[EndpointView]) -> EndpointView:
        return min(views, key=_by_outstanding)


class PredictedCompletion:
    """The one where the request ends first, where a second until the first token counts for a few, and where others
    lose little by it.

    A request's end: what is queued ahead of it, its own prefill without what the endpoint has cached, and as many steps
    as its output is expected to take, all at the endpoint's own speed. Others lose the time that it is prefilled, in
    which they do not stream, and what their steps are longer with one more. Without that term a prompt that is cached
    somewhere fills that endpoint up before the next one gets to know it.

    What a larger share of the prompts begins with than the share of endpoints that have it will be computed by more of
    them in any case. So that is charged at a discount, and done early where there is time for it, not once a queue at
    those that have it is longer than it takes.
    """

    uses_prefix = True

    def __init__(self, first_token_weight: float) -> None:
        self.first_token_weight = first_token_weight

    def choose(self, question: Question, views: Sequence[EndpointView]) -> EndpointView:
        now, expected, cached, wanted = question.now, question.expected, question.cached, question.wanted
        weight = self.first_token_weight
        num_prompt = question.request.num_prompt
        best, least = views[0], float("inf")
        for view in views:
            if cached:
                have = cached.get(view.name, 0)
                if have < wanted:
                    have += int(COPY_RELIEF * (wanted - have))
                num_new = max(num_prompt - have, 1)
            else:
                num_new = num_prompt
            cost = weight * view.first_token_in(num_new, now) + expected * view.output_cost + num_new * view.prompt_cost
            if cost < least or (cost == least and view.turn < best.turn):
                best, least = view, cost
        return best


class PrefixAffinity:
    """The one with most of the prompt cached, among those that are not over the limit; else the one with the fewest
    tokens."""

    uses_prefix = True

    def __init__(self, load_limit: float) -> None:
        self.load_limit = load_limit

    def choose(self, question: Question, views: Sequence[EndpointView]) -> EndpointView:
        cached = question.cached
        allowed = _under_limit(question, views, self.load_limit)
        return min(allowed, key=lambda view: (-cached.get(view.name, 0), view.outstanding, view.turn))


class SessionAffinity:
    """Requests of a session go to the same endpoint, on every gateway, by rendezvous hashing: each endpoint has a
    pseudo-random rank for each session, and the first that is not over the limit gets it. When an endpoint comes or
    goes only its own sessions move. Requests without a session go where the fewest tokens are."""

    uses_prefix = False

    def __init__(self, load_limit: float) -> None:
        self.load_limit = load_limit
        self._seeds: dict[str, int] = {}

    def choose(self, question: Question, views: Sequence[EndpointView]) -> EndpointView:
        session = question.request.session
        if not session:
            return min(views, key=_by_outstanding)
        digest = _number(session)
        allowed = _under_limit(question, views, self.load_limit)
        return max(allowed, key=lambda view: (_mix(digest ^ self._seed(view.name)), view.name))

    def _seed(self, name: str) -> int:
        seed = self._seeds.get(name)
        if seed is None:
            if len(self._seeds) > 4096:
                self._seeds.clear()
            seed = self._seeds[name] = _number(name)
        return seed


def make_policy(name: str, load_limit: float, first_token_weight: float) -> Policy:
    """ValueError for a name that is no policy; its message is for the user."""
    if name == "predicted_completion":
        return PredictedCompletion(first_token_weight)
    if name == "least_tokens":
        return LeastTokens()
    if name == "prefix_affinity":
        return PrefixAffinity(load_limit)
    if name == "session_affinity":
        return SessionAffinity(load_limit)
    if name == "round_robin":
        return RoundRobin()
    known = "predicted_completion, least_tokens, prefix_affinity, session_affinity, round_robin"
    raise ValueError(f"policy {name!r} is not known; the policies are {known}")


def _by_turn(view: EndpointView) -> int:
    return view.turn


def _by_outstanding(view: EndpointView) -> tuple[float, int]:
    return view.outstanding, view.turn


def _under_limit(question: Question, views: Sequence[EndpointView], limit: float) -> list[EndpointView]:
    """Those with at most `limit` times the mean of outstanding tokens, and a few requests like this one: never none,
    for the least is no more than the mean. Without those few, a fleet with little to do would have no affinity."""
    loads = [view.outstanding for view in views]
    most, expected = limit * sum(loads) / len(views), question.expected
    return [
        view
        for view, load in zip(views, loads, strict=True)
        if load <= most + SLACK_REQUESTS * (question.num_new(view) + expected)
    ]


def _number(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """A bijection of 64 bits in which every bit depends on every other: two rounds of multiply and shift."""
    value = (value * 0x9E3779B97F4A7C15) & MASK
    value ^= value >> 32
    value = (value * 0xD6E8FEB86659FD93) & MASK
    return value ^ (value >> 32)
