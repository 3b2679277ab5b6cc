"""Executors: how step plans reach the workers and their results come back, in order.

The driver of the engine (a process, a benchmark, a test) keeps up to `depth` plans submitted:

    executor = open_executor(config)
    info = executor.start(progress)
    executor.submit(plan)                    returns at once
    result = executor.poll(timeout)          StepResult, WorkerFailure, or None if there is none yet
    executor.stop()

Failures are values: a step that cannot be run gives a `WorkerFailure` where its result would have come, and so does
every later one. The driver then stops this executor and starts another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from shoal.core.config import EngineConfig
from shoal.core.expert_load import HeldRows
from shoal.core.expert_placement import require_dispatch
from shoal.core.model_spec import ModelSpec
from shoal.core.start_report import StartProgress, StartReport
from shoal.core.types import StepPlan, StepResult, WorkerFailure

Progress = Callable[[StartProgress], None]
"""Called when there is something new, and by an executor that waits for others every now and then. What it raises ends
the start."""


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the workers came up with: the scheduler's limits, and figures for people. Bytes are of all ranks."""

    spec: ModelSpec
    num_blocks: int
    max_len: int
    """Longest sequence in tokens: what was asked for, or what the model and the KV cache allow."""
    weight_bytes: int
    """As stored in memory, packed."""
    rank_weight_bytes: int
    """Of the rank that holds the most."""
    kv_bytes: int
    rank_kv_bytes: int
    """Of the rank that keeps the most: `kv_cache_bytes` of an engine that is to be just as large."""
    device: str
    ops: str
    attention: str
    dtype: str
    """Of the stored weights."""
    start: StartReport
    """Where the time of `start` went."""


class Executor(Protocol):
    def start(self, progress: Progress | None = None) -> WorkerInfo:
        """Load the model. Raises an error for people to read: what does not fit, which file is at fault, and so on."""

    def submit(self, plan: StepPlan) -> None:
        """Queue a step behind those submitted before. Does not block."""

    def poll(self, timeout: float | None = None) -> StepResult | WorkerFailure | None:
        """The result of the oldest plan without one; None after `timeout` seconds, or at once if nothing is queued.

        `timeout` None waits as long as it takes.
        """

    def expert_rows(self) -> list[HeldRows]:
        """What each rank's experts had computed when it was last heard of; ranks elsewhere are asked anew, so the next
        call knows more. Empty for a model without experts, and before any rank has answered.
        """

    def failure(self) -> str | None:
        """Why no step can be run any more; None while all is well. For a driver with nothing queued, now and then."""

    def stop(self) -> None:
        """Free everything. May be called at any time, and more than once."""


def open_executor(config: EngineConfig) -> Executor:
    """The one for this layout. Raises LayoutError for what cannot work, BadExpertLoad for a wrong `expert_load`."""
    require_dispatch(config)
    if config.layout.ranks == 1:
        from shoal.engine.in_process import InProcExecutor  # brings torch

        return InProcExecutor(config)
    from shoal.engine.parallel_executor import ParallelExecutor

    return ParallelExecutor(config)
