"""Router: which endpoint of one model gets a request. Called for each request and each step, never for each token.

    add / remove     an endpoint can be used, or is gone
    route            where a request should go; changes nothing
    dispatched       it went there
    first_token, progressed, finished      what came of it
    reported         what an endpoint says of itself: may be missing, late or wrong, and refines only

Names and ids that are not known are ignored: what an endpoint says after it was removed is nothing to a router.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from shoal.core.endpoint_view import TYPICAL_PROMPT, EndpointView, FleetSpeeds
from shoal.core.estimates import Line, OutputLengths
from shoal.core.fleet_types import EndpointReport, RouteRequest
from shoal.core.prefix_index import PrefixIndex
from shoal.core.routing_policies import Question, make_policy

PolicyName = Literal["predicted_completion", "least_tokens", "prefix_affinity", "session_affinity", "round_robin"]
DEFAULT_CAPACITY = 1 << 18
"""Tokens of prompts remembered of an endpoint that does not say how large its KV cache is."""
SPEEDS_A_MEDIAN = 64
"""Observations of speed after which the median endpoint is looked for again, or as many as there are endpoints if these
are more; at first after 1, 2, 4, 8 and so on."""


class RoutingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    policy: PolicyName = "predicted_completion"
    load_limit: float = 1.25
    """An endpoint with more than so many times the mean of outstanding tokens gets nothing for affinity's sake."""
    first_token_weight: float = 6.0
    """Of predicted_completion: what a second until the first token counts for, in seconds of the rest of the output.
    1 ends requests soonest; more lets a request rather run slower than wait."""
    block_size: int = 64
    """Tokens of a block in `RouteRequest.blocks`. The gateway's own: endpoints may have any other."""

    def __post_init__(self) -> None:
        if self.load_limit < 1:
            raise ValueError(f"load_limit must be at least 1, got {self.load_limit}")
        if not self.first_token_weight > 0:
            raise ValueError(f"first_token_weight must be greater than 0, got {self.first_token_weight}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds from now, in the mean."""

    name: str
    first_token: float
    completion: float


class LearnedSpeed(msgspec.Struct, frozen=True, kw_only=True):
    prefill: float
    """Tokens a second, beside what decodes meanwhile."""
    decode_seconds: float
    """Between two tokens of a sequence, with as many running as do now."""
    decode_base: float
    decode_each: float
    """Seconds of a step: base, and for each sequence that runs."""
    known: bool
    """False for what is only supposed of it."""


class Router:
    def __init__(self, config: RoutingConfig) -> None:
        self.config = config
        self.policy = make_policy(config.policy, config.load_limit, config.first_token_weight)
        self.lengths = OutputLengths()
        self.prefixes = PrefixIndex()
        self.views: dict[str, EndpointView] = {}
        self._speeds = FleetSpeeds()
        self._turn = 0
        self._learned = 0
        self._next_median = 1
        """How many speeds will have been learned when the median endpoint is looked for again."""

    # --- endpoints --------------------------------------------------------------------------------------------------

    def add(self, name: str, max_sequences: int | None, num_blocks: int | None, block_size: int, now: float) -> None:
        """An endpoint of which nothing is known yet, in the place of one of the same name. Its cache is empty."""
        capacity = None if num_blocks is None else num_blocks * block_size
        self._find_typical()
        view = EndpointView(name, max_sequences, capacity, self.lengths, self._speeds)
        view.turn = self._next_turn()
        self.views[name] = view
        self.prefixes.add(name, (capacity or DEFAULT_CAPACITY) // self.config.block_size)

    def remove(self, name: str) -> None:
        self.views.pop(name, None)
        self.prefixes.forget(name)

    # --- requests ---------------------------------------------------------------------------------------------------

    def route(self, request: RouteRequest, candidates: Sequence[str], now: float) -> str | None:
        """Where it should go: one of the candidates, None if none is known. Those to avoid are taken only alone."""
        views = [self.views[name] for name in candidates if name in self.views]
        if request.avoid:
            views = [view for view in views if view.name not in request.avoid] or views
        if not views:
            return None
        question = self._question(request, now, prefix=self.policy.uses_prefix)
        return self.policy.choose(question, views).name

    def predict(self, request: RouteRequest, candidates: Sequence[str], now: float) -> list[Prediction]:
        """What the request could expect of each candidate: for deadlines and hedging, and for people who ask why."""
        question = self._question(request, now, prefix=True)
        predictions = []
        for name in candidates:
            view = self.views.get(name)
            if view is not None:
                first = view.first_token_in(question.num_new(view), now)
                rest = question.expected * view.step_seconds
                predictions.append(Prediction(name=name, first_token=first, completion=first + rest))
        return predictions

    def dispatched(self, request: RouteRequest, name: str, now: float) -> None:
        view = self.views.get(name)
        if view is None:
            return
        cached = self.prefixes.depth(name, request.blocks) * self.config.block_size
        view.dispatched(request, cached, self.lengths.remaining(0, request.num_output), now)
        view.turn = self._next_turn()
        self.prefixes.insert(name, request.blocks)

    def first_token(self, request_id: str, name: str, now: float) -> None:
        view = self.views.get(name)
        if view is not None and view.first_token(request_id, now):
            self._has_learned()

    def progressed(self, name: str, tokens: int, now: float) -> None:
        """Tokens came, of whichever requests: one call for all of a step, or one for each token."""
        view = self.views.get(name)
        if view is not None and view.progressed(tokens, now):
            self._has_learned()

    def finished(self, request_id: str, name: str, num_generated: int, now: float, ok: bool) -> None:
        """It ended there, or was moved, or its client left. Only an output that is whole (`ok`) tells of lengths."""
        view = self.views.get(name)
        if view is not None and view.finished(request_id, now) is not None and ok:
            self.lengths.observe(num_generated)

    def reported(self, name: str, report: EndpointReport, now: float) -> None:
        view = self.views.get(name)
        if view is not None:
            view.reported(report, now)

    # --- what is known ----------------------------------------------------------------------------------------------

    def requests(self, name: str) -> int:
        """Of this gateway, under way there."""
        view = self.views.get(name)
        return 0 if view is None else view.num_requests

    def outstanding(self, name: str) -> float:
        """Tokens to be prefilled or generated there for this gateway, as estimated."""
        view = self.views.get(name)
        return 0.0 if view is None else view.outstanding

    def speed(self, name: str, now: float) -> LearnedSpeed | None:
        view = self.views.get(name)
        if view is None:
            return None
        prefill, decode = view.speeds(now)
        return LearnedSpeed(
            prefill=1 / max(prefill.slope, 1e-9),
            decode_seconds=decode.at(max(len(view.running), 1)),
            decode_base=decode.intercept,
            decode_each=decode.slope,
            known=bool(view.prefill.count and view.decode.count),
        )

    def _question(self, request: RouteRequest, now: float, *, prefix: bool) -> Question:
        cached: dict[str, int] = {}
        wanted = 0
        if prefix and request.blocks:
            size = self.config.block_size
            depths = self.prefixes.match(request.blocks)
            cached = {name: depth * size for name, depth in depths.items()}
            wanted = self.prefixes.wanted(request.blocks, depths.values(), len(self.views)) * size
        return Question(request, self.lengths.remaining(0, request.num_output), cached, wanted, now)

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn

    def _has_learned(self) -> None:
        self._learned += 1
        if self._learned >= self._next_median:
            self._next_median = self._learned + min(self._learned, max(SPEEDS_A_MEDIAN, len(self.views)))
            self._find_typical()

    def _find_typical(self) -> None:
        """The median endpoint, for prefill and for decode: what is supposed of those that were not seen of late."""
        prefill = _median([view.prefill for view in self.views.values()], TYPICAL_PROMPT)
        if prefill is not None:
            self._speeds.typical_prefill = prefill.coefficients
        decode = _median([view.decode for view in self.views.values()], 8.0)
        if decode is not None:
            self._speeds.typical_decode = decode.coefficients

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds."""
        self.prefixes.check()
        for view in self.views.values():
            view.check()
        turns = [view.turn for view in self.views.values()]
        if len(set(turns)) != len(turns):
            raise AssertionError("router: two endpoints have the same turn")


def _median(lines: list[Line], x: float) -> Line | None:
    """The line whose value at x is the median of those that have been observed; the lower one of two."""
    seen = sorted((line for line in lines if line.count), key=lambda line: line.coefficients.at(x))
    return seen[(len(seen) - 1) // 2] if seen else None
