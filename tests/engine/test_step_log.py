"""What a step log says about where time went."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.core.types import Row, StepPlan
from shoal.engine.step_log import (
    RankStep,
    StepLog,
    Submitted,
    broadcast_seconds,
    busy_share,
    read_ranks,
    read_submitted,
)


def plan(plan_id: int, sequences: int, tokens: int = 1) -> StepPlan:
    return StepPlan(plan_id, [], [], [Row(slot, 0, tokens, True, []) for slot in range(sequences)])


def test_what_was_written_is_read_back_rank_by_rank(tmp_path: Path) -> None:
    driver, ranks = (
        StepLog(str(tmp_path / "log"), "driver"),
        [StepLog(str(tmp_path / "log"), f"rank-{r}") for r in (0, 1)],
    )
    driver.submitted(plan(7, 2), 1.0, 1.5)
    for rank, log in enumerate(ranks):
        log.rank_step(plan(7, 2, tokens=3), 2.0 + rank, 3.0 + rank, 0.25)
        log.rank_step(StepPlan(8, [0], [], []), 5.0, 5.0, 0.0)  # computes nothing
        log.close()
    driver.close()
    assert read_submitted(tmp_path / "log") == [Submitted(7, 1.0, 1.5)]
    assert read_ranks(tmp_path / "log") == {rank: [RankStep(7, 2, 6, 2.0 + rank, 3.0 + rank, 0.25)] for rank in (0, 1)}


def test_a_line_that_is_half_written_is_left_out(tmp_path: Path) -> None:
    log = StepLog(str(tmp_path), "rank-0")
    log.rank_step(plan(1, 1), 1.0, 2.0, 0.0)
    log.close()
    file = tmp_path / "rank-0.jsonl"
    file.write_bytes(file.read_bytes() * 2 + b'{"plan_id":3,')
    assert [step.plan_id for step in read_ranks(tmp_path)[0]] == [1, 1]


def test_a_directory_without_a_log_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no rank-N.jsonl"):
        read_ranks(tmp_path)


def test_busy_is_what_was_computed_in_steady_decode() -> None:
    steps = [
        RankStep(1, 8, 100, 0.0, 1.0, 0.0),  # a prompt
        RankStep(2, 8, 8, 1.0, 2.0, 0.0),  # the first decode: behind a prompt
        RankStep(3, 8, 8, 2.5, 4.0, 0.5),  # 2 s, of which 1 computed
        RankStep(4, 8, 8, 4.0, 6.0, 0.0),  # 2 s, all computed
        RankStep(5, 3, 3, 9.0, 10.0, 0.0),  # few sequences
    ]
    assert busy_share(steps, 8) == pytest.approx(3 / 4)
    assert busy_share(steps, 1) == pytest.approx(4 / 8)
    assert busy_share(steps[:2], 1) is None


def test_a_broadcast_lasts_until_the_last_rank_has_the_plan() -> None:
    submitted = [Submitted(1, 1.0, 1.1), Submitted(2, 2.0, 2.1)]
    ranks = {
        0: [RankStep(1, 4, 4, 1.2, 1.5, 0.0), RankStep(2, 3, 3, 2.2, 2.5, 0.0)],
        1: [RankStep(1, 4, 4, 1.4, 1.5, 0.0), RankStep(2, 3, 3, 2.3, 2.5, 0.0)],
    }
    assert broadcast_seconds(submitted, ranks, 4) == [pytest.approx(0.4)]
