"""EngineCore: requests in, step plans out, step results in, outputs out.

The driver owns the clock and the device. It calls, in this order and as often as it likes:

    add / abort      a client came or left
    plan             the next step, or None: nothing to do, or `depth` plans are out already
    commit           the result of the oldest plan, or its failure
    take_outputs     what ended outside of a commit: aborts and missed deadlines

Nothing here knows of torch, sockets or time, so that the simulator runs this very object.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

from shoal.core.config import SchedulerConfig
from shoal.core.scheduler import Scheduler, Sequence
from shoal.core.types import (
    Drawn,
    EngineLoad,
    FinishReason,
    Output,
    Rejected,
    Request,
    Row,
    Sampled,
    StepPlan,
    StepResult,
    TokenLogprobs,
    WorkerFailure,
)


class InFlight:
    """A plan without a result: its rows, their sequences, and the admission that each row belongs to."""

    __slots__ = ("epochs", "plan_id", "rows", "sequences")

    def __init__(self, plan_id: int, rows: list[Row], sequences: list[Sequence]) -> None:
        self.plan_id = plan_id
        self.rows = rows
        self.sequences = sequences
        self.epochs = [sequence.epoch for sequence in sequences]


class EngineCore:
    def __init__(self, config: SchedulerConfig) -> None:
        _validate(config)
        self.config = config
        self.scheduler = Scheduler(config)
        self._sequences: dict[str, list[Sequence]] = {}
        """Sequences of each request that has not ended, by request id."""
        self._in_flight: deque[InFlight] = deque()
        self._deadlines: list[tuple[float, str]] = []
        """A heap. Entries of requests that have ended are dropped when they come up."""
        self._outputs: list[Output] = []
        self._num_arrivals = 0
        self._next_plan_id = 0
        self._drawn: list[Drawn] = []
        """For the next plan."""
        self._steps = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generated_tokens = 0
        self._failures = 0

    # --- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> Rejected | None:
        """Accept a request, which then ends with outputs whatever happens; or say why not, and keep nothing of it."""
        rejected = self._refuse(request)
        if rejected is not None:
            return rejected
        limit = min(len(request.prompt) + request.max_tokens, self.config.max_len)
        order = now + request.priority * self.config.priority_aging
        sequences = []
        for index, generated in sequences_of(request).items():
            self._num_arrivals += 1
            sequence = Sequence(request, index, (order, self._num_arrivals), limit)
            sequence.tokens += generated
            sequences.append(sequence)
            self.scheduler.enqueue(sequence)
        self._sequences[request.id] = sequences
        if request.deadline is not None:
            heappush(self._deadlines, (request.deadline, request.id))
        return None

    def abort(self, request_id: str, now: float, index: int | None = None) -> None:
        """End a request, or one of its sequences. Blocks and slot are free at once; unknown ids are ignored.

        `now` is unused by the core but is recorded with the call.
        """
        for sequence in list(self._sequences.get(request_id, ())):
            if index is None or sequence.index == index:
                self._end(sequence, "abort")

    def _refuse(self, request: Request) -> Rejected | None:
        config = self.config

        def no(reason: str, field: str | None, retryable: bool = False) -> Rejected:
            return Rejected(request.id, reason, field, retryable)

        if request.id in self._sequences:
            return no(f"a request with id {request.id!r} is running", "id")
        if not request.prompt:
            return no("the prompt has no tokens", "prompt")
        if len(request.prompt) >= config.max_len:
            return no(
                f"the prompt has {len(request.prompt)} tokens; with one token of output the longest that fits is "
                f"{config.max_len - 1}",
                "prompt",
            )
        if min(request.prompt) < 0 or max(request.prompt) >= config.vocab_size:
            return no(f"token ids must lie in [0, {config.vocab_size})", "prompt")
        if request.max_tokens < 1:
            return no(f"max_tokens must be at least 1, got {request.max_tokens}", "max_tokens")
        if request.n < 1:
            return no(f"n must be at least 1, got {request.n}", "n")
        if (reason := resume_error(request, config.max_len, config.vocab_size)) is not None:
            return no(reason, "resume")
        num_waiting = len(self.scheduler.waiting)
        if num_waiting + len(sequences_of(request)) > config.max_waiting:
            return no(f"{num_waiting} sequences are waiting; the limit is {config.max_waiting}", None, retryable=True)
        return None

    # --- steps ------------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None. Blocks are reserved and `num_scheduled` advanced as if it had run."""
        self._end_overdue(now)
        if len(self._in_flight) >= self.config.depth:
            return None
        batch = self.scheduler.fill()
        if not batch.rows:
            return None
        for assignment in batch.assigned:
            self._cached_tokens += len(assignment.block_ids) * self.config.block_size
        drawn, self._drawn = self._drawn, []
        plan = StepPlan(self._next_plan_id, self.scheduler.take_released_slots(), batch.assigned, batch.rows, drawn)
        self._next_plan_id += 1
        self._in_flight.append(InFlight(plan.plan_id, batch.rows, batch.sequences))
        return plan

    def commit(self, plan_id: int, result: StepResult | WorkerFailure, now: float) -> list[Output]:
        """Take in the result of the oldest plan in flight and return what it yields, one output a sequence.

        A `WorkerFailure` ends everything that runs and drops every plan in flight; what waits goes on, on workers that
        start afresh. Results of dropped plans are ignored.
        """
        step = self._in_flight[0] if self._in_flight else None
        if step is None or plan_id < step.plan_id:
            return []
        if plan_id != step.plan_id:
            raise ValueError(f"commit of plan {plan_id}, but plan {step.plan_id} is the oldest in flight")
        if isinstance(result, WorkerFailure):
            return self._fail_all(result.message)
        self._in_flight.popleft()
        self._steps += 1
        sampled = {item.slot: item for item in result.sampled}
        failed = {item.slot: item.message for item in result.failed}
        outputs: list[Output] = []
        for row, sequence, epoch in zip(step.rows, step.sequences, step.epochs, strict=True):
            if sequence.epoch != epoch:
                continue  # ended or preempted since: its blocks are gone, and what it drew it will draw again
            if failed and row.slot in failed:
                outputs.append(self._finish(sequence, "error", error=failed[row.slot]))
                continue
            start = row.start
            sequence.num_computed = end = start + row.num_tokens
            if start < sequence.num_prompt:
                self._prompt_tokens += min(end, sequence.num_prompt) - start
            if row.sample:
                outputs.append(self._take_token(sequence, sampled[row.slot]))
        return outputs

    def fail(self, message: str, now: float) -> list[Output]:
        """As a commit of a `WorkerFailure`, for workers that were lost while no plan was in flight: their KV is gone.

        `now` is unused by the core but is recorded with the call.
        """
        return self._fail_all(message)

    def take_outputs(self) -> list[Output]:
        """Final outputs of sequences that ended outside of a commit, since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def _take_token(self, sequence: Sequence, item: Sampled) -> Output:
        request, tokens, token_id = sequence.request, sequence.tokens, item.token_id
        sequence.num_awaited -= 1
        tokens.append(token_id)
        self._generated_tokens += 1
        logprobs = [] if item.logprobs is None else [item.logprobs]
        if token_id in request.stop_token_ids and sequence.num_generated > request.min_tokens:
            return self._finish(sequence, "stop", [token_id], logprobs, stop_token=token_id)
        if len(tokens) >= sequence.token_limit:
            return self._finish(sequence, "length", [token_id], logprobs)
        if sequence.num_scheduled >= (sequence.num_registered + 1) * self.config.block_size:
            self.scheduler.register_full_blocks(sequence)
        if self.config.stages > 1 and sequence.slot is not None:
            self._drawn.append(Drawn(sequence.slot, len(tokens) - 1, token_id))
        return Output(request.id, sequence.index, [token_id], logprobs, None, None, None, sequence.num_cached or 0)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token_ids: list[int] | None = None,
        logprobs: list[TokenLogprobs] | None = None,
        stop_token: int | None = None,
        error: str | None = None,
    ) -> Output:
        """Free what the sequence holds and make its last output."""
        if not sequence.finished:
            self.scheduler.remove(sequence)
        siblings = self._sequences[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.request.id]
        return Output(
            sequence.request.id,
            sequence.index,
            token_ids or [],
            logprobs or [],
            reason,
            stop_token,
            error,
            sequence.num_cached or 0,
        )

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        self._outputs.append(self._finish(sequence, reason))

    def _end_overdue(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heappop(self._deadlines)
            for sequence in list(self._sequences.get(request_id, ())):
                if sequence.request.deadline == deadline:
                    self._end(sequence, "deadline")

    def _fail_all(self, message: str) -> list[Output]:
        self._in_flight.clear()
        self._drawn.clear()
        self._failures += 1
        return [self._finish(sequence, "lost", error=message) for sequence in self.scheduler.reset()]

    # --- what others see --------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Plans without a result."""
        return len(self._in_flight)

    def has_work(self) -> bool:
        """Whether a request has not ended or a result is due."""
        return bool(self._sequences or self._in_flight or self._outputs)

    def load(self) -> EngineLoad:
        scheduler, pool = self.scheduler, self.scheduler.pool
        return EngineLoad(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            # Only the last block of a sequence is partly filled, and it is never shared: all others are full.
            num_live_tokens=pool.num_held * self.config.block_size - scheduler.num_unfilled,
            num_waiting_tokens=scheduler.num_waiting_tokens,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=scheduler.num_preemptions,
            in_flight=len(self._in_flight),
            failures=self._failures,
        )

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds: for tests, and after each step if so configured."""
        self.scheduler.check()
        known = [s for sequences in self._sequences.values() for s in sequences]
        queued = self.scheduler.waiting + self.scheduler.running
        if sorted(s.key for s in known) != sorted(s.key for s in queued):
            raise AssertionError("engine core: the requests differ from what is queued")
        if len(self._in_flight) > self.config.depth:
            raise AssertionError("engine core: more plans in flight than depth allows")


def sequences_of(request: Request) -> dict[int, list[int]]:
    """Sequences that a request asks for, by index, with the tokens that each has already."""
    return {index: [] for index in range(request.n)} if request.resume is None else request.resume


def resume_error(request: Request, max_len: int, vocab_size: int) -> str | None:
    """What is wrong with `request.resume`; None if nothing is."""
    if request.resume is None:
        return None
    if not request.resume:
        return "resume names no sequence"
    most = min(request.max_tokens, max_len - len(request.prompt))
    for index, generated in request.resume.items():
        if not 0 <= index < request.n:
            return f"resume names sequence {index}; with n = {request.n} they lie in [0, {request.n})"
        if len(generated) >= most:
            return f"sequence {index} has {len(generated)} tokens already, and {most} are the most it may have"
        if generated and not 0 <= min(generated) <= max(generated) < vocab_size:
            return f"resume: token ids must lie in [0, {vocab_size})"
    return None


def _validate(config: SchedulerConfig) -> None:
    """Raise ValueError for a configuration that could not serve any request."""
    positive = ("num_blocks", "max_len", "vocab_size", "block_size", "max_sequences", "depth", "stages", "max_waiting")
    for name in positive:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.max_batch_tokens < config.max_sequences:
        raise ValueError(
            f"max_batch_tokens ({config.max_batch_tokens}) must be at least max_sequences ({config.max_sequences}), "
            "or not every running sequence could decode in a step"
        )
    if config.max_len > config.num_blocks * config.block_size:
        raise ValueError(
            f"max_len ({config.max_len}) does not fit the KV cache of {config.num_blocks} blocks of "
            f"{config.block_size} tokens: lower max_len or give the cache more memory"
        )
