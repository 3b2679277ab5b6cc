"""An engine under load in virtual time, as sums: what waits, what runs, and one step after another by the cost model.

Steps that differ only in longer contexts are taken together: of sequences that decode, and of one long prompt's pieces.
The simulator drives the real scheduler; this is the planner's, which must answer in milliseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

import msgspec

from shoal.core.cost.memory import sequence_bytes
from shoal.core.cost.model import CostModel
from shoal.core.cost.types import StepShape
from shoal.plan.workload import Weighted, Workload


def bubble(cost: CostModel) -> float:
    """In a pipeline, of what a step is longer than those ahead of it: the time for which stages wait for it, idle."""
    return 0.0 if cost.profile.even_batches else 1 - 1 / cost.engine.layout.pp


class Outcome(msgspec.Struct, kw_only=True):
    """Of one run, or of a part of one; seconds."""

    ttft: Weighted = msgspec.field(default_factory=Weighted)
    tpot: Weighted = msgspec.field(default_factory=Weighted)
    itl: Weighted = msgspec.field(default_factory=Weighted)
    end_to_end: Weighted = msgspec.field(default_factory=Weighted)
    output_tokens: int = 0
    requests: int = 0
    seconds: float = 0.0
    busy_seconds: float = 0.0
    preemptions: int = 0
    rows_seconds: float = 0.0
    """Sum over time of rows that decode."""
    cache_peak: float = 0.0
    waiting: int = 0
    """Left in the queue at the end."""

    def absorb(self, other: Outcome) -> None:
        """Of another engine at the same time."""
        for name in ("ttft", "tpot", "itl", "end_to_end"):
            getattr(self, name).values.extend(getattr(other, name).values)
        self.output_tokens += other.output_tokens
        self.requests += other.requests
        self.busy_seconds += other.busy_seconds
        self.preemptions += other.preemptions
        self.rows_seconds += other.rows_seconds
        self.cache_peak = max(self.cache_peak, other.cache_peak)


class _Sequence(msgspec.Struct):
    arrival: float
    input: int
    """To compute before its next token: the prompt, and what was generated before a preemption."""
    output: int
    """Still to generate."""
    total_output: int
    done: int = 0
    """Of the input."""
    first: float = -1.0
    ready: float = 0.0
    """When the front has passed it on."""
    held: int = 0
    """Tokens reserved in the cache beyond what is counted as it grows."""


class Loop:
    """`poll_steps`: while rows decode, the scheduler looks for new requests every so many steps alone.
    `wait_steps`: it lets requests wait for so many steps while they are too few to fill one (batch_wait_timeout_iters).
    """

    def __init__(
        self,
        cost: CostModel,
        workload: Workload,
        *,
        poll_steps: int = 1,
        wait_steps: int = 0,
    ) -> None:
        engine = cost.engine
        self.cost, self.workload = cost, workload
        self.stages = engine.layout.pp
        self.bubble = bubble(cost)
        self.groups = engine.attention_dp
        self.token_limit = engine.max_batch_tokens * self.groups
        self.row_limit = engine.max_sequences * self.groups
        budget = cost.memory()
        mean = workload.inputs.mean + workload.outputs.mean / 2
        each = sequence_bytes(engine, mean)
        self.capacity = max(0, budget.cache) * mean / each * self.groups if each else float("inf")
        """Tokens, in sequences of the mean length."""
        self.reserve = cost.profile.reserves_output
        self.mixes = cost.profile.mixes_prefill
        self.poll_steps, self.next_poll = poll_steps, 0
        self.wait_steps, self.wait_from = wait_steps, -1
        self.now = 0.0
        self.waiting: deque[_Sequence] = deque()
        self.prefilling: deque[_Sequence] = deque()
        self.ends: list[tuple[int, int, _Sequence]] = []
        """Running sequences by the number of the step that ends them."""
        self.steps = 0
        self.rows = 0
        """That decode."""
        self.context = 0
        """Tokens that they have in the cache."""
        self.used = 0.0
        self.added = 0
        self.begun = 0
        self.front_free = 0.0
        self.stall = 0.0
        """Since the rows that decode had their last token, by steps that were not theirs."""
        self.completing = 0
        """Prompts that end with the last step."""
        self.round = 0.0
        """Seconds of the last step through all stages."""
        self.out = Outcome()
        self.finished: Callable[[float], None] | None = None

    def prompts(self, now: float) -> int:
        """That wait or are computed then; the last step may be under way still."""
        return len(self.waiting) + len(self.prefilling) + (self.completing if self.now > now else 0)

    @property
    def under_way(self) -> int:
        """Sequences that wait, compute their prompts or decode."""
        return self.rows + len(self.prefilling) + len(self.waiting)

    def add(self, arrival: float, number: int | None = None) -> None:
        """The request of that number; of the next one, if none is given."""
        prompt, output = self.workload.request(self.added if number is None else number)
        self.added += 1
        profile = self.cost.profile
        busy = profile.front_request_seconds + profile.front_token_seconds * prompt
        self.front_free = max(self.front_free, arrival) + busy
        cached = int(prompt * self.workload.cached_share)
        self.waiting.append(_Sequence(arrival, prompt, output, output, cached, ready=self.front_free))

    def arrive(self, at: float, number: int) -> None:
        """The request of that number comes then, after all that is done until then."""
        self.run(at)
        self.now = max(self.now, at)
        self.add(at, number)

    def add_prefilled(self, arrival: float, number: int) -> None:
        """A sequence whose cache and first token come from elsewhere."""
        prompt, output = self.workload.request(number)
        self.waiting.append(_Sequence(arrival, prompt, output, output, prompt, first=arrival))

    def run(self, next_arrival: float, *, one_end: bool = False) -> None:
        """Until it is `next_arrival`, nothing is left to do, or (`one_end`) a sequence has ended."""
        ended = self.out.requests
        while self.now < next_arrival and not (one_end and self.out.requests > ended):
            self._admit()
            if self.prefilling:
                self._mixed_step()
            elif self.rows:
                self._decode_steps(next_arrival)
            elif self.waiting and self.waiting[0].ready > self.now:
                self.now = min(next_arrival, self.waiting[0].ready)
            else:
                break

    # --- steps -------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        if self.rows and not self.prefilling:
            # A step of prompts alone is none of `steps`: who looks at every step looks after it, too.
            if self.poll_steps > 1 and self.steps < self.next_poll:
                return
            self.next_poll = self.steps + self.poll_steps
            if self.wait_steps and self.waiting and sum(each.input for each in self.waiting) < 0.8 * self.token_limit:
                if self.wait_from < 0:
                    self.wait_from = self.steps
                if self.steps - self.wait_from < self.wait_steps:
                    return
            self.wait_from = -1
        while self.waiting and self.rows + len(self.prefilling) < self.row_limit:
            sequence = self.waiting[0]
            if sequence.ready > self.now:
                return
            held = sequence.output if self.reserve else 0
            need = sequence.input + held
            if self.used + need > self.capacity and (self.rows or self.prefilling):
                return
            self.waiting.popleft()
            sequence.held = held
            self.used += need
            if sequence.done >= sequence.input:
                self._begin(sequence)
            else:
                self.prefilling.append(sequence)

    def _mixed_step(self) -> None:
        decode_rows = self.rows if self.mixes else 0
        budget = max(1, self.token_limit * self.stages - decode_rows)
        alike = self._pieces(budget, decode_rows)
        if alike > 1:
            self._piece_steps(alike, budget, decode_rows)
            return
        tokens = rows = context = 0
        pairs = 0.0
        complete: list[_Sequence] = []
        while self.prefilling and budget > 0:
            sequence = self.prefilling[0]
            n = min(budget, sequence.input - sequence.done)
            pairs += n * (sequence.done + (n + 1) / 2)
            sequence.done += n
            tokens, rows, context, budget = tokens + n, rows + 1, context + sequence.done, budget - n
            if sequence.done < sequence.input:
                break
            complete.append(self.prefilling.popleft())
        duration = self._seconds(tokens, rows, pairs, context, decode_rows, self.context + decode_rows, len(complete))
        self._advance(1, duration, decode_rows)
        self.completing = len(complete)
        for sequence in complete:
            self._begin(sequence)

    def _pieces(self, budget: int, decode_rows: int) -> int:
        """Steps that the first prompt fills alone and does not end in, before a sequence ends or the cache is full."""
        sequence = self.prefilling[0]
        count = (sequence.input - sequence.done - 1) // budget
        if decode_rows:
            count = min(count, self.ends[0][0] - self.steps)
            if not self.reserve:
                count = min(count, int((self.capacity - self.used) / decode_rows))
        return count

    def _piece_steps(self, count: int, budget: int, decode_rows: int) -> None:
        """All with the contexts of their middle. Who arrives meanwhile waits for the prompt's end in any case."""
        sequence = self.prefilling[0]
        before = sequence.done + (count - 1) * budget // 2
        pairs = budget * (before + (budget + 1) / 2)
        context = self.context + decode_rows * (count + 1) // 2
        duration = self._seconds(budget, 1, pairs, before + budget, decode_rows, context, 0)
        sequence.done += count * budget
        self._advance(count, duration, decode_rows)

    def _begin(self, sequence: _Sequence) -> None:
        """The first token came of the last chunk."""
        if sequence.first < 0:
            sequence.first = self.now
            self.out.ttft.add(self.now - sequence.arrival)
        sequence.output -= 1
        if sequence.output <= 0:
            self.used -= sequence.input + sequence.held
            self._end(sequence)
            return
        self.rows += 1
        self.context += sequence.input
        self.begun += 1
        heappush(self.ends, (self.steps + sequence.output, self.begun, sequence))

    def _decode_steps(self, next_arrival: float) -> None:
        """As many as are alike: until one ends, the cache is full, or a request arrives."""
        count = self.ends[0][0] - self.steps
        if not self.reserve:
            count = min(count, max(1, int((self.capacity - self.used) / self.rows)))
        if self.waiting and self.poll_steps > 1:
            count = max(1, min(count, self.next_poll - self.steps))
        if self.wait_from >= 0:
            count = max(1, min(count, self.wait_from + self.wait_steps - self.steps))
        middle = self.context + self.rows * (count + 1) // 2
        duration = self._seconds(0, 0, 0.0, 0, self.rows, middle, self.rows)
        if self.waiting and self.waiting[0].ready > self.now:
            next_arrival = min(next_arrival, self.waiting[0].ready)
        if self.now + count * duration > next_arrival:
            count = max(1, int((next_arrival - self.now) / duration) + 1)
        self._advance(count, duration, self.rows)

    def _seconds(
        self, tokens: int, rows: int, pairs: float, context: int, decode_rows: int, decode_context: int, sampled: int
    ) -> float:
        stages, batches = self.stages, min(self.stages, rows + decode_rows)
        if stages > 1:
            # As many batches are under way as there are stages; each has its share of the rows.
            rows, decode_rows = -(-rows // stages), -(-decode_rows // stages)
            tokens, pairs, context = -(-tokens // stages), pairs / stages, -(-context // stages)
            decode_context, sampled = -(-decode_context // stages), -(-sampled // stages)
        shape = StepShape(
            prefill_tokens=tokens,
            prefill_rows=rows,
            prefill_pairs=pairs,
            prefill_context=context,
            decode_rows=decode_rows,
            decode_context=decode_context,
            sampled=sampled,
        )
        seconds = self.cost.seconds(shape)
        return max(seconds, batches * self.cost.stage_seconds(shape)) if stages > 1 else seconds

    def _advance(self, count: int, duration: float, decode_rows: int) -> None:
        out = self.out
        idle = self.bubble * max(0.0, duration - self.round) if self.round else 0.0
        self.round = duration
        self.now += count * duration + idle
        out.busy_seconds += count * duration + idle
        if not decode_rows:
            self.stall += count * duration + idle if self.rows else 0.0
            return
        gaps = out.itl.values
        gaps.append((duration + idle + self.stall, decode_rows))
        if count > 1:
            gaps.append((duration, (count - 1) * decode_rows))
        self.stall = 0.0
        out.rows_seconds += count * duration * decode_rows
        self.steps += count
        self.context += count * decode_rows
        if not self.reserve:
            self.used += count * decode_rows
        if self.used > out.cache_peak:
            out.cache_peak = self.used
        while self.ends and self.ends[0][0] <= self.steps:
            _, _, sequence = heappop(self.ends)
            self.rows -= 1
            length = sequence.input + sequence.output
            self.context -= length
            self.used -= sequence.input + (sequence.held if self.reserve else sequence.output)
            self._end(sequence)
        while self.used > self.capacity and self.rows > 1 and not self.reserve:
            self._preempt()

    def _preempt(self) -> None:
        """The one with most left to generate gives its cache up, and computes it again."""
        last = max(self.ends)
        self.ends.remove(last)
        self.ends.sort()
        sequence = last[2]
        left = last[0] - self.steps
        made = sequence.output - left
        self.rows -= 1
        self.context -= sequence.input + made
        self.used -= sequence.input + made
        sequence.input += made
        sequence.output = left
        sequence.done = 0
        self.out.preemptions += 1
        self.waiting.appendleft(sequence)

    def _end(self, sequence: _Sequence) -> None:
        out = self.out
        out.requests += 1
        out.output_tokens += sequence.total_output
        if sequence.total_output > 1:
            out.tpot.add((self.now - sequence.first) / (sequence.total_output - 1))
        out.end_to_end.add(self.now - sequence.arrival)
        if self.finished is not None:
            self.finished(self.now)
