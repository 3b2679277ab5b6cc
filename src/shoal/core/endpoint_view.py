"""One endpoint as a gateway sees it: what it was sent, how fast it was, and how long a further request would wait.

What this gateway sent is counted exactly. Reports of the endpoint add what others sent, for as long as they are fresh.
No call costs more than a few microseconds: work over all running requests is done once in so many events.
"""

from __future__ import annotations

import msgspec

from shoal.core.estimates import PEERS_RATE, Coefficients, Line, OutputLengths
from shoal.core.fleet_types import EndpointReport, RouteRequest

REPORT_SECONDS = 5.0
"""A report counts less the older it is, and nothing after so long."""
FORGET_SECONDS = 15.0
"""A speed that was not seen is believed less and less, and no more after so long: that of its peers is, instead. So an
endpoint that was slow and gets nothing for it comes to look worth a try, gets a request, and is seen anew."""
TOLERANCE = 0.2
"""Part of a typical speed by which an endpoint may differ from its peers and be taken for one of them. What runs there
explains as much, and over an output of hundreds of steps it would outweigh any queue."""
LONGEST_PERIOD = 8
"""Requests after which prefill that goes on without a break is observed."""
TYPICAL_PROMPT = 512.0
"""Tokens of the prompt by which speeds of prefill are compared."""
REFRESH_SECONDS = 0.5
"""How long what depends only slowly on time is kept."""


class FleetSpeeds:
    """What the endpoints of a model showed together: the shape of their lines, and the speed of the median one, which
    is supposed of those that were not seen of late. A GPU's, if none was ever seen."""

    def __init__(self) -> None:
        self.prefill = Line(proportional=1.0, rate=PEERS_RATE)
        self.decode = Line(proportional=0.0, rate=PEERS_RATE)
        self.typical_prefill = Coefficients(0.01, 1e-4)
        self.typical_decode = Coefficients(0.02, 1e-4)


class Work(msgspec.Struct):
    """A request at an endpoint."""

    num_new: int
    """Tokens to prefill: those that were not expected in its prefix cache."""
    limit: int
    expected: float
    """Tokens of output, as expected when it was sent."""
    started: float = 0.0
    """What `EndpointView.progress` was at its first token."""


class EndpointView:
    def __init__(
        self, name: str, max_sequences: int | None, capacity: int | None, lengths: OutputLengths, speeds: FleetSpeeds
    ) -> None:
        self.name = name
        self.max_sequences = max_sequences
        self.capacity = capacity
        """Tokens of its KV cache."""
        self.turn = 0
        """Number of the last request that any endpoint of the model was sent, when this one was: breaks ties."""
        self.waiting: dict[str, Work] = {}
        """Without a first token, oldest first."""
        self.running: dict[str, Work] = {}
        self.backlog = 0
        """Tokens to prefill for those that wait."""
        self._fleet = speeds
        self.prefill = Line(peers=speeds.prefill)
        """Seconds that something waited without a break, by the tokens prefilled meanwhile: not of one request alone,
        for an engine fills what one leaves of a step with the next, and their sum is all that can be told."""
        self.decode = Line(peers=speeds.decode)
        """Seconds of a step, by the sequences running."""
        self.progress = 0.0
        """Tokens that a sequence running all the time would have: the sum of tokens / running over all steps. What a
        request has generated is the growth of this since its first token, without counting for each at every step."""
        self._lengths = lengths
        self._promised = 0.0
        """Expected tokens of output of those that wait."""
        self._remaining = 0.0
        """Tokens of output still to come for those that run, when last counted, less what came since."""
        self._held = 0.0
        """KV tokens of those that run or wait, alike."""
        self._uncounted = 0
        self._came = 0
        """Requests that came, began or went, and tokens that came, since the count."""
        self._sign = 0.0
        """When it last did what it should."""
        self._prefill_since = 0.0
        """Since when the oldest request that waits may have been prefilled."""
        self._period: tuple[float, int, int] | None = None
        """Prefill observed: since when, tokens and requests since. None while nothing waits."""
        self._window: tuple[float, int] | None = None
        """Decoding observed: since the end of a step, and tokens since. None until those that run now end a step."""
        self._stepped = 0.0
        """When tokens last came."""
        self._measured = (0.0, 0.0)
        """When prefill and decode were last observed."""
        self._report: EndpointReport | None = None
        self._steps = -1
        self._others = 0.0
        self._others_backlog = 0.0
        """Sequences and prompt tokens that others have there, by its last report."""
        self.output_cost = 0.0
        """Seconds of one more token of output: of the request, and of all that run beside it."""
        self.prompt_cost = 0.0
        """Seconds that those that run lose, in sum, while one more token is prefilled."""
        self._stale = True
        self._refreshed = 0.0
        self._refresh(0.0)

    # --- what happens -----------------------------------------------------------------------------------------------

    def dispatched(self, request: RouteRequest, num_cached: int, expected: float, now: float) -> None:
        self.finished(request.id, now)
        if not self.waiting:
            self._prefill_since = now
            self._period = (now, 0, 0)
            if not self.running:
                self._sign = max(self._sign, now)
        work = Work(max(request.num_prompt - num_cached, 1), request.num_output, expected)
        self.waiting[request.id] = work
        self.backlog += work.num_new
        self._promised += expected
        self._held += work.num_new
        self._changed(now)

    def first_token(self, request_id: str, now: float) -> bool:
        """Whether a speed was learned."""
        work = self.waiting.pop(request_id, None)
        if work is None:
            return False
        self.backlog -= work.num_new
        self._promised -= work.expected
        learned = self._observe_prefill(work.num_new, now)
        self._prefill_since = now
        work.started = self.progress
        self.running[request_id] = work
        self._remaining += work.expected
        self._sign = max(self._sign, now)
        self._changed(now)
        return learned

    def progressed(self, tokens: int, now: float) -> bool:
        """Whether a speed was learned."""
        running = len(self.running)
        if now > self._sign:
            self._sign = now
        if not running or tokens < 1:
            return False
        self.progress += tokens / running
        self._remaining -= tokens
        self._held += tokens
        self._came += tokens
        if self._came * 4 > self._remaining and self._came > 8 * running:
            self._count()
        self._stepped = now
        since, seen = self._window or (now, 0)
        if now <= since:
            self._window = (since, seen)
            return False  # these came with what began the window, they are not of it
        seen += tokens
        if seen < running:
            self._window = (since, seen)
            return False
        self._window = (now, 0)
        sequences = running + self._others
        seconds = (now - since) * running / seen
        # A step that prefills too is longer: of those it only counts that a decode cannot be slower than they are.
        mixed = bool(self.waiting) or self._others_backlog > 0
        if mixed and (not self.decode.count or seconds >= self.decode.coefficients.at(sequences)):
            return False
        self.decode.observe(sequences, seconds)
        self._measured = (self._measured[0], now)
        return True

    def finished(self, request_id: str, now: float) -> Work | None:
        work = self.waiting.get(request_id)
        if work is not None:
            self._hold_up(now)
            del self.waiting[request_id]
            self.backlog -= work.num_new
            self._held -= work.num_new
            self._promised -= work.expected
        else:
            if self._departures(0) > 0:
                self._hold_up(now)  # until now the oldest could not be let in
            work = self.running.pop(request_id, None)
            if work is None:
                return None
            generated = self.progress - work.started
            self._remaining -= max(self._lengths.remaining(generated, work.limit), 1.0)
            self._held -= work.num_new + generated
        self._changed(now)
        return work

    def reported(self, report: EndpointReport, now: float) -> None:
        if self._report is not None and report.at < self._report.at:
            return
        load = report.load
        steps = report.steps if load is None else load.steps
        if steps is not None and steps != self._steps:
            self._steps = steps
            self._sign = max(self._sign, min(report.at, now))
        self._report = report
        running, waiting = report.num_running, report.num_waiting
        backlog: float | None = None
        if load is not None:
            running, waiting, backlog = load.num_running, load.num_waiting, load.num_waiting_tokens
        if running is None and waiting is None:
            return
        own = len(self.waiting) + len(self.running)
        others = max((running or 0) + (waiting or 0) - own, 0)
        if backlog is None:
            backlog = min(others, waiting or 0) * (self._held / own if own else 0.0)
        else:
            backlog = max(backlog - self.backlog, 0) if others else 0.0
        if not others and not self._others:
            return
        # Half of the last value: own requests that are on their way are counted here and not there for a moment.
        self._others = (self._others + others) / 2 if self._others >= 0.25 or others else 0.0
        self._others_backlog = (self._others_backlog + backlog) / 2 if others else 0.0
        self._stale = True

    # --- what is expected -------------------------------------------------------------------------------------------

    @property
    def num_requests(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def outstanding(self) -> float:
        """Tokens to be prefilled or generated for this gateway's requests."""
        return self.backlog + self._promised + max(self._remaining, float(len(self.running)))

    def first_token_in(self, num_new: int, now: float) -> float:
        """Seconds until a request that comes now and has so many tokens to prefill would have its first token.

        What is kept of predictions is as of the last call of this: ask for it before `step_seconds` and the costs.
        """
        if self._stale or now - self._refreshed > REFRESH_SECONDS:
            self._refresh(now)
        wait = self._queue + self._overhead + num_new * self._token_seconds
        if self._busy:
            if self._head:
                done = now - self._prefill_since
                if done > 0:
                    wait -= done if done < self._head else self._head
            # What is late is expected to be late for as long again: a hang looks slower from moment to moment.
            late = now - self._sign - self._patience
            if late > 0:
                wait += late
        if self._tight:
            wait += self._departures(num_new) * self._departure_seconds
        return wait

    @property
    def step_seconds(self) -> float:
        """Between two tokens of a sequence, once another one runs there."""
        return self._step

    def speeds(self, now: float) -> tuple[Coefficients, Coefficients]:
        """Prefill and decode, as believed now."""
        prefill, decode = self._fleet.typical_prefill, self._fleet.typical_decode
        sequences = max(len(self.running), 1)
        if self.prefill.count:
            prefill = _believed(self.prefill, prefill, TYPICAL_PROMPT, now - self._measured[0])
        if self.decode.count:
            decode = _believed(self.decode, decode, sequences, now - self._measured[1])
        return prefill, decode

    def _refresh(self, now: float) -> None:
        """Everything about a prediction that does not depend on the request, and on time only slowly."""
        self._stale = False
        self._refreshed = now
        fresh = 0.0
        if self._report is not None:
            fresh = max(1 - max(now - self._report.at, 0.0) / REPORT_SECONDS, 0.0)
        others, backlog = self._others * fresh, self._others_backlog * fresh
        prefill, decode = self.speeds(now)
        running = len(self.running) + others
        self._token_seconds = prefill.slope
        self._overhead = prefill.intercept
        self._step = decode.at(running + len(self.waiting) + 1)
        self.output_cost = self._step + running * decode.slope
        self.prompt_cost = running * prefill.slope
        self._queue = (self.backlog + backlog) * prefill.slope
        self._busy = bool(self.waiting or self.running)
        head = next(iter(self.waiting.values())).num_new * prefill.slope if self.waiting else 0.0
        self._patience = 2 * (self._step + prefill.intercept + head)
        self._load = running + len(self.waiting)
        self._tight = (self.max_sequences is not None and self._load >= self.max_sequences) or (
            self.capacity is not None and self._held > self.capacity / 2
        )
        blocked = self.max_sequences is not None and running >= self.max_sequences
        self._head = 0.0 if blocked else head
        each = max(self._remaining / max(len(self.running), 1), 1.0)
        self._departure_seconds = each * self._step / max(running, 1.0)

    def _departures(self, num_new: int) -> float:
        """How many of its sequences must end before one more, with so many tokens of its own, is let in."""
        needed = 0.0
        if self.max_sequences is not None:
            needed = self._load + 1 - self.max_sequences
        if self.capacity is not None and self._held + num_new > self.capacity:
            each = self._held / max(self.num_requests, 1)
            needed = max(needed, (self._held + num_new - self.capacity) / max(each, 1.0))
        return min(max(needed, 0.0), self._load)

    # --- bookkeeping ------------------------------------------------------------------------------------------------

    def _changed(self, now: float) -> None:
        """Who waits and who runs has changed: decoding is observed anew, from the end of a step on."""
        self._window = (now, 0) if now == self._stepped else None
        self._stale = True
        self._uncounted += 1
        requests = len(self.running) + len(self.waiting)
        if not requests or (self._uncounted >= 4 and self._uncounted * 8 >= requests):
            self._count()

    def _count(self) -> None:
        """What those that run have still to come and hold, from each one's own length. Rounding is gone afterwards."""
        self._uncounted = self._came = 0
        self._stale = True
        remaining = held = 0.0
        for work in self.running.values():
            generated = self.progress - work.started
            remaining += max(self._lengths.remaining(generated, work.limit), 1.0)
            held += work.num_new + generated
        self._remaining = remaining
        self._held = held + self.backlog
        self._promised = sum(work.expected for work in self.waiting.values())

    def _observe_prefill(self, num_new: int, now: float) -> bool:
        if self._period is None:
            return False
        since, tokens, requests = self._period
        tokens, requests = tokens + num_new, requests + 1
        self._period = (since, tokens, requests)
        if (self.waiting and requests < LONGEST_PERIOD) or now <= since:
            return False
        self._period = (now, 0, 0) if self.waiting else None
        self.prefill.observe(tokens, now - since)
        self._measured = (now, self._measured[1])
        return True

    def _hold_up(self, now: float) -> None:
        """What waits was not prefilled all the time until now, or not all of what was prefilled was seen."""
        self._prefill_since = now
        self._period = (now, 0, 0) if self.waiting else None

    def check(self) -> None:
        """Raise AssertionError unless the sums are those of the requests."""
        if self.backlog != sum(work.num_new for work in self.waiting.values()):
            raise AssertionError(f"endpoint view {self.name}: the backlog differs from the requests that wait")
        if self.waiting.keys() & self.running.keys():
            raise AssertionError(f"endpoint view {self.name}: a request waits and runs")
        promised = sum(work.expected for work in self.waiting.values())
        if abs(self._promised - promised) > 1e-6 * (1 + promised):
            raise AssertionError(f"endpoint view {self.name}: the promised tokens differ from the requests that wait")


def _believed(own: Line, typical: Coefficients, x: float, age: float) -> Coefficients:
    """A speed that was observed, the more toward the peers' the fewer and the older the observations are, and by the
    part of its difference from theirs, at x, that is tolerated."""
    share = max(1 / (1 + own.count), min(age / FORGET_SECONDS, 1.0))
    usual = typical.at(x)
    difference = abs(own.coefficients.at(x) - usual)
    if difference * share < TOLERANCE * usual:
        share = min(TOLERANCE * usual / difference, 1.0) if difference else 1.0
    return own.coefficients.toward(typical, share)
