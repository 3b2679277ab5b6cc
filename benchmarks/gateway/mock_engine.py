"""Mock shoal engines: the real engine process with its scheduler and its wire, and an executor that only takes time.

    python benchmarks/gateway.py serve-mocks --itl-ms 20 -- serve --deployment fleet.yaml

is `shoal serve` whose engines are mocks; nothing of the gateway knows. Tokens are those of the other mocks
(gateway/tokens.py), so that a sequence goes on at either kind as it began. A step takes `--itl-ms`, and beside that its
prompt tokens at `--prefill-rate`. Sampling parameters, grammars and logprobs have no effect.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gateway.timing import Law
from gateway.tokens import state_after, state_of, vocabulary
from shoal.checkpoint.resolve import load_spec
from shoal.core.config import EngineConfig
from shoal.core.expert_load import HeldRows
from shoal.core.start_report import StartReport
from shoal.core.types import Sampled, StepPlan, StepResult, WorkerFailure
from shoal.engine.executor import Progress, WorkerInfo
from shoal.serve import engine_process

PROGRAM = Path(__file__).parents[1] / "gateway.py"
ENGINE_MODULE = engine_process.__name__
NUM_BLOCKS = 1 << 16
"""KV blocks, unless the configuration names `kv_cache_bytes`: a mock keeps none of them."""


@dataclass
class Slot:
    """The sequence in one of the engine's slots."""

    tokens: list[int]
    state: int

    def draw(self, token: int) -> None:
        self.tokens.append(token)
        self.state = state_after(self.state, token)


class MockExecutor:
    """An executor (engine/executor.py) whose steps follow one another, each as long as the law says."""

    def __init__(self, config: EngineConfig, law: Law) -> None:
        self._config, self._law = config, law
        self._words = vocabulary(config.model)
        self._slots: dict[int, Slot] = {}
        self._results: deque[tuple[float, StepResult]] = deque()
        """Of plans without a result, with the moment at which each is due."""
        self._busy_until = 0.0

    def start(self, progress: Progress | None = None) -> WorkerInfo:
        config, spec = self._config, load_spec(Path(self._config.model))
        block_bytes = spec.kv_bytes_per_token(4) * config.block_tokens
        num_blocks = NUM_BLOCKS if config.kv_cache_bytes is None else config.kv_cache_bytes // block_bytes
        kv_bytes = num_blocks * block_bytes
        return WorkerInfo(
            spec=spec,
            num_blocks=num_blocks,
            max_len=config.max_len or min(spec.max_len, num_blocks * config.block_tokens),
            weight_bytes=0,
            rank_weight_bytes=0,
            kv_bytes=kv_bytes,
            rank_kv_bytes=kv_bytes,
            device="mock",
            ops="mock",
            attention="mock",
            dtype=config.dtype,
            start=StartReport(phases=[], ranks=[], total_seconds=0.0),
        )

    def submit(self, plan: StepPlan) -> None:
        prompt_tokens = sum(row.num_tokens for row in plan.rows if row.num_tokens > 1)
        prefill = prompt_tokens / self._law.prefill_rate if self._law.prefill_rate else 0.0
        self._busy_until = max(time.monotonic(), self._busy_until) + self._law.itl + prefill
        self._results.append((self._busy_until, self._run(plan)))

    def _run(self, plan: StepPlan) -> StepResult:
        for slot in plan.released:
            self._slots.pop(slot, None)
        for assigned in plan.assigned:
            self._slots[assigned.slot] = Slot(list(assigned.tokens), state_of(assigned.tokens))
        sampled = []
        for row in plan.rows:
            slot = self._slots[row.slot]
            if row.sample:
                slot.draw(self._words.next(slot.state))
                sampled.append(Sampled(row.slot, slot.tokens[-1]))
        return StepResult(plan.plan_id, sampled)

    def poll(self, timeout: float | None = None) -> StepResult | WorkerFailure | None:
        if not self._results:
            return None
        due, result = self._results[0]
        left = due - time.monotonic()
        if timeout is not None and left > timeout:
            time.sleep(timeout)
            return None
        time.sleep(max(0.0, left))
        self._results.popleft()
        return result

    def expert_rows(self) -> list[HeldRows]:
        return []

    def failure(self) -> str | None:
        return None

    def stop(self) -> None:
        self._results.clear()
        self._slots.clear()


def engine_main(argv: list[str]) -> int:
    """LAW-AS-JSON ADDRESS [RECORDING]: the engine process, as `python -m shoal.serve.engine_process` is."""
    law = Law(**json.loads(argv[0]))
    engine_process.open_executor = lambda config: MockExecutor(config, law)  # type: ignore[assignment]
    return engine_process.main(argv[1:])


def use_mock_engines(law: Law) -> None:
    """From here on the engine processes that this process starts are mocks."""
    spawn = asyncio.create_subprocess_exec

    async def spawn_mock(*command: str, **options: Any) -> asyncio.subprocess.Process:
        if ENGINE_MODULE in command:
            rest = command[command.index(ENGINE_MODULE) + 1 :]
            command = (sys.executable, str(PROGRAM), "mock-engine", json.dumps(asdict(law)), *rest)
        return await spawn(*command, **options)

    asyncio.create_subprocess_exec = spawn_mock  # type: ignore[assignment]


def main(argv: list[str]) -> None:
    """`serve-mocks [law] -- arguments of shoal`."""
    parser = argparse.ArgumentParser(prog="gateway.py serve-mocks", description="shoal, whose engines are mocks.")
    parser.add_argument("--itl-ms", type=float, default=20.0, help="what a step takes")
    parser.add_argument("--prefill-rate", type=float, default=0.0, help="prompt tokens a second; 0: no time")
    parser.add_argument("shoal", nargs="+", metavar="-- ARGUMENTS", help="of the command shoal")
    arguments = parser.parse_args(argv)
    use_mock_engines(Law(itl=arguments.itl_ms / 1e3, prefill_rate=arguments.prefill_rate))
    from shoal import cli

    sys.argv = ["shoal", *arguments.shoal]
    sys.exit(cli.main())
