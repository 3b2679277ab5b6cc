"""An engine of any layout run to its end by a driver of its own, for tests that compare layouts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shoal.core.config import EngineConfig, LaunchConfig, SchedulerConfig
from shoal.core.engine_core import EngineCore
from shoal.core.expert_load import ExpertLoad, merged
from shoal.core.layout import Layout
from shoal.core.types import Request, Row, Sampling, SlotAssignment, StepPlan, StepResult
from shoal.engine.executor import Executor, open_executor
from tests.serve.running import wait_until

Tokens = dict[str, list[int]]
LAUNCH = LaunchConfig(silence_seconds=30.0, collective_seconds=30.0)
"""Nothing fails here: ranks that a busy machine keeps waiting are not lost."""


def requests(vocab_size: int, count: int, max_tokens: int) -> list[Request]:
    """Prompts of growing length; every other one is sampled with a seed, the rest are greedy."""
    generator = torch.Generator().manual_seed(3)
    return [
        Request(
            id=f"{i:02}",
            prompt=torch.randint(5, vocab_size, (3 + 11 * i,), generator=generator).tolist(),
            max_tokens=max_tokens,
            sampling=Sampling(temperature=0.0 if i % 2 == 0 else 0.9, seed=i),
        )
        for i in range(count)
    ]


def first_plan(plan_id: int) -> StepPlan:
    """Three tokens of one sequence, for whoever drives an executor by hand."""
    sampling = Sampling(temperature=0.0)
    assignment = SlotAssignment(0, "by hand", 0, [7, 8, 9], 3, [0], sampling, 0, [])
    return StepPlan(plan_id, [], [assignment], [Row(0, 0, 3, True, [])])


def run_layout(
    path: Path,
    layout: Layout,
    work: list[Request],
    at_end: Callable[[Executor], object] = lambda executor: None,
    **options: Any,
) -> Tokens:
    """Output tokens by request. `options` are EngineConfig's; `at_end` is called when all is done."""
    options = {"kv_cache_bytes": 64 << 20, "max_len": 512, "launch": LAUNCH} | options
    config = EngineConfig(model=str(path), layout=layout, **options)
    executor = open_executor(config)
    info = executor.start()
    try:
        depth = max(config.depth, layout.pp)
        core = EngineCore(
            SchedulerConfig(
                num_blocks=info.num_blocks,
                max_len=info.max_len,
                vocab_size=info.spec.vocab_size,
                block_size=config.block_tokens,
                max_batch_tokens=config.max_batch_tokens,
                depth=depth,
                stages=layout.pp,
            )
        )
        for request in work:
            assert core.add(request, 0.0) is None
        tokens: Tokens = {request.id: [] for request in work}
        plans: deque[StepPlan] = deque()
        while core.has_work():
            while (plan := core.plan(0.0)) is not None:
                executor.submit(plan)
                plans.append(plan)
            result = executor.poll(60)
            assert isinstance(result, StepResult), result
            for output in core.commit(plans.popleft().plan_id, result, 0.0):
                assert output.error is None
                tokens[output.request_id] += output.token_ids
            core.check()
        at_end(executor)
        return tokens
    finally:
        executor.stop()


class Counts:
    """For `at_end`: waits until every rank has said what its experts computed, which must be each row of `work` once.

    `num_visits` is how many experts a token visits, `num_layers` counts those that have experts.
    """

    def __init__(
        self, work: list[Request], places: int, *, num_visits: int, num_layers: int, num_experts: int = 8
    ) -> None:
        # The last token of a sequence is never computed.
        self._expected = [num_visits * sum(len(r.prompt) + r.max_tokens - 1 for r in work)] * num_layers
        self._num_experts = num_experts
        self._places = places
        self.load: ExpertLoad

    def __call__(self, executor: Executor) -> None:
        def are_counted() -> bool:
            assert executor.failure() is None
            self.load = merged(executor.expert_rows(), self._num_experts, self._places)
            return [sum(layer.experts) for layer in self.load.layers] == self._expected

        wait_until(are_counted, f"{self._expected} rows to be counted")
