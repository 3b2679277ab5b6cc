"""Timing: every cached token was computed before it is read, plans follow each other, disturbed visits do not count."""

from __future__ import annotations

import pytest

from shoal.bench.calibration.points import StepPoint
from shoal.bench.calibration.step_timing import StepTiming, TimingError, Visit, summary, time_steps
from shoal.core.types import StepPlan, StepResult, WorkerFailure

POINTS = [
    StepPoint(decodes=2, context=30),
    StepPoint(chunk=40, behind=24),
    StepPoint(decodes=3, context=11, chunk=16, behind=0),
]


class Recorder:
    """An executor that computes nothing, but knows what a worker would know."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.plans: list[StepPlan] = []
        self.computed: dict[int, int] = {}
        """Tokens with KV, by slot."""
        self.blocks: dict[int, list[int]] = {}
        self.tokens: dict[int, int] = {}
        self._fails_at = fails_at

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)

    def poll(self, timeout: float | None = None) -> StepResult | WorkerFailure | None:
        plan = self.plans[-1]
        if self._fails_at is not None and len(self.plans) >= self._fails_at:
            return WorkerFailure(plan.plan_id, "out of luck")
        for assignment in plan.assigned:
            self.blocks[assignment.slot] = assignment.block_ids
            self.tokens[assignment.slot] = len(assignment.tokens)
            self.computed[assignment.slot] = 0
        for row in plan.rows:
            assert row.start <= self.computed[row.slot], "reads KV that was never computed"
            end = row.start + row.num_tokens
            assert end <= len(self.blocks[row.slot]) * 16, "writes beyond its blocks"
            assert end <= self.tokens[row.slot], "reads a token that nobody knows"
            self.computed[row.slot] = max(self.computed[row.slot], end)
        return StepResult(plan.plan_id, [])


def timing(executor: Recorder) -> StepTiming:
    return StepTiming(executor, POINTS, block_tokens=16, vocab_size=100, max_batch_tokens=32)


def test_slots_are_filled_before_they_are_read_and_share_no_block() -> None:
    executor = Recorder()
    heard: list[float] = []
    timing(executor).fill(heard.append)
    assert executor.computed == {0: 64, 1: 31, 2: 31, 3: 12}
    assert heard == sorted(heard) and heard[-1] == 1.0
    assert all(plan.num_tokens <= 32 for plan in executor.plans)
    blocks = [block for own in executor.blocks.values() for block in own]
    assert len(set(blocks)) == len(blocks)


def test_every_point_is_visited_in_every_round() -> None:
    executor = Recorder()
    subject = timing(executor)
    subject.fill(lambda share: None)
    heard: list[float] = []
    steps = time_steps(subject, POINTS, 2, rounds=2, seconds=60, report=heard.append)
    assert [step.point for step in steps] == POINTS
    assert all(step.tp == 2 and step.visits >= 2 and 0 < step.low <= step.seconds <= step.high for step in steps)
    assert [plan.plan_id for plan in executor.plans] == list(range(1, len(executor.plans) + 1))
    assert heard[-1] == 1.0


def test_out_of_time_every_point_still_has_one_visit() -> None:
    subject = timing(Recorder())
    subject.fill(lambda share: None)
    steps = time_steps(subject, POINTS, 1, rounds=5, seconds=0, report=lambda share: None)
    assert [step.visits for step in steps] == [1, 1, 1]


def test_a_failure_of_the_engine_is_said() -> None:
    with pytest.raises(TimingError, match="out of luck"):
        timing(Recorder(fails_at=2)).fill(lambda share: None)


def test_disturbed_visits_do_not_count_where_others_are() -> None:
    visits = [Visit(1.0, 0.0), Visit(9.0, 1.5), Visit(1.2, 0.1), Visit(8.0, 0.9), Visit(1.1, 0.02)]
    found = summary(1, POINTS[0], visits)
    assert (found.seconds, found.low, found.high, found.visits, found.disturbed) == (1.1, 1.0, 1.2, 5, 2)
    assert found.foreign_cores == 0.02


def test_where_all_were_disturbed_the_quieter_half_counts_and_says_so() -> None:
    visits = [Visit(2.0, 0.5), Visit(3.0, 1.0), Visit(4.0, 1.5)]
    found = summary(1, POINTS[0], visits)
    assert (found.seconds, found.disturbed, found.foreign_cores) == (2.5, 3, 0.75)
