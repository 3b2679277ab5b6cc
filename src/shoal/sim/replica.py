"""One engine in virtual time: the EngineCore that serves live, and the clockwork in the place of its device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from shoal.core.config import SchedulerConfig
from shoal.core.cost.types import shape_of_plan
from shoal.core.engine_core import EngineCore
from shoal.core.types import Output, Rejected, Request, Sampled, StepPlan, StepResult, WorkerFailure
from shoal.sim.clock import Clock
from shoal.sim.law import Laws

TOKEN = 1
"""What is drawn, always: a simulation knows how many tokens, not which."""
_SAMPLED = [Sampled(slot, TOKEN) for slot in range(4096)]


class Replica:
    """`on_step` hears of each step, with its outputs; after it the next one is planned."""

    def __init__(
        self,
        name: str,
        config: SchedulerConfig,
        laws: Laws,
        clock: Clock,
        on_step: Callable[[Replica, list[Output]], None],
    ) -> None:
        while len(_SAMPLED) < config.max_sequences:
            _SAMPLED.append(Sampled(len(_SAMPLED), TOKEN))
        self.name = name
        self.config = config
        self.core = EngineCore(config)
        self.laws = laws
        self.slowness = 1.0
        """Factor on the time of every step planned from now on."""
        self.plans: deque[tuple[StepPlan, float]] = deque()
        """Computed one after another, with when each ends; the first of them now."""
        self.busy_seconds = 0.0
        self.steps = self.preemptions = self.prompt_tokens = self.cached_tokens = 0
        """Of cores that were lost; see `totals`."""
        self.block_seconds = 0.0
        """Blocks held, integrated over the time of steps."""
        self.most_blocks = 0
        self.epoch = 0
        """Times that its process died."""
        self._clock = clock
        self._on_step = on_step
        self._ends = 0.0
        """When the last step that was planned ends."""
        self._generation = 0
        """Events of earlier ones are of no interest any more."""
        self._frozen_until = 0.0

    # --- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> Rejected | None:
        rejected = self.core.add(request, self._clock.now)
        if rejected is None and not self.plans:
            self.plan()
        return rejected

    def abort(self, request_id: str) -> None:
        self.core.abort(request_id, self._clock.now)
        self.core.take_outputs()

    @property
    def is_frozen(self) -> bool:
        return self._clock.now < self._frozen_until

    # --- steps ------------------------------------------------------------------------------------------------------

    def plan(self) -> None:
        """As many plans as the core will have out; the first of them is computed at once."""
        now, plans, core = self._clock.now, self.plans, self.core
        if now < self._frozen_until:
            return
        while len(plans) < self.config.depth and (plan := core.plan(now)) is not None:
            shape = shape_of_plan(plan)
            seconds = self.laws.step(shape) * self.slowness
            before = self._ends if self._ends > now else now
            if (stage := self.laws.stage) is None:
                self._ends = before + seconds
            else:
                kept = stage(shape) * self.slowness
                self._ends = max(now + seconds, before + kept) if plans else now + seconds
                seconds = kept
            self.busy_seconds += seconds
            held = core.scheduler.pool.num_held
            self.block_seconds += held * seconds
            if held > self.most_blocks:
                self.most_blocks = held
            plans.append((plan, self._ends))
            if len(plans) == 1:
                self._clock.call(self._ends, self._commit, self._generation)

    def _commit(self, generation: int) -> None:
        if generation != self._generation:
            return
        plans = self.plans
        plan, _ = plans.popleft()
        result = StepResult(plan.plan_id, [_SAMPLED[row.slot] for row in plan.rows if row.sample])
        outputs = self.core.commit(plan.plan_id, result, self._clock.now)
        if plans:
            self._clock.call(plans[0][1], self._commit, generation)
        self._on_step(self, outputs)
        self.plan()

    # --- what befalls it --------------------------------------------------------------------------------------------

    def lose_workers(self, message: str, seconds: float) -> list[Output]:
        """The step under way fails, and others start in the place of its workers, which takes so long. What waits
        goes on with them. Returns the ends of what ran, `lost`."""
        now = self._clock.now
        if self.plans:
            plan_id = self.plans[0][0].plan_id
            outputs = self.core.commit(plan_id, WorkerFailure(plan_id, message), now)
        else:
            outputs = self.core.fail(message, now)
        self._stop_computing()
        self._resume_at(now + seconds)
        return outputs

    def freeze(self, seconds: float) -> None:
        """Nothing moves for so long; then it goes on where it was."""
        now = self._clock.now
        longer = now + seconds - max(self._frozen_until, now)
        if longer <= 0:
            return
        self._resume_at(now + seconds)
        if self.plans:
            self._generation += 1
            self._ends += longer
            self.plans = deque((plan, end + longer) for plan, end in self.plans)
            self._clock.call(self.plans[0][1], self._commit, self._generation)

    def die(self) -> None:
        """The process is gone, and all that it held."""
        self._stop_computing()
        self.epoch += 1
        self._frozen_until = 0.0
        load = self.core.load()
        self.steps += load.steps
        self.preemptions += load.preemptions
        self.prompt_tokens += load.prompt_tokens
        self.cached_tokens += load.cached_tokens
        self.core = EngineCore(self.config)

    def _resume_at(self, time: float) -> None:
        self._frozen_until = max(self._frozen_until, time)
        self._clock.at(self._frozen_until, self._thaw)

    def _thaw(self) -> None:
        if not self.plans and self._clock.now >= self._frozen_until:
            self._on_step(self, [])  # a sign of life
            self.plan()

    def _stop_computing(self) -> None:
        self.busy_seconds = self.busy_until(self._clock.now)
        self.plans.clear()
        self._ends = self._clock.now
        self._generation += 1

    # --- what it did ------------------------------------------------------------------------------------------------

    def busy_until(self, now: float) -> float:
        """Seconds in which a step was computed, so far."""
        left = self._ends - max(now, self._frozen_until)
        return self.busy_seconds - (max(left, 0.0) if self.plans else 0.0)

    def totals(self) -> tuple[int, int, int, int]:
        """Steps, preemptions, prompt tokens computed, prompt tokens found in the cache; since the beginning."""
        load = self.core.load()
        return (
            self.steps + load.steps,
            self.preemptions + load.preemptions,
            self.prompt_tokens + load.prompt_tokens,
            self.cached_tokens + load.cached_tokens,
        )
