"""Goals as tests write them, and the plans of those that several tests look at."""

from __future__ import annotations

import functools
from typing import Any

from shoal.plan.catalogue import cluster
from shoal.plan.engines import Options
from shoal.plan.goal import Goal, Target, demand_of
from shoal.plan.models import model_shape
from shoal.plan.planner import Plan, make_plan

CHAT = (("ttft", "p99", 2.0), ("itl", "p99", 0.06))
LOOSE = (("ttft", "p99", 5.0), ("itl", "p99", 0.15))


def goal(on: str, rate: float, input: int, output: int, targets: tuple[Any, ...] = (), **more: Any) -> Goal:
    return Goal(
        cluster=cluster(on),
        demand=demand_of(rate, input, output),
        targets=tuple(Target(metric=metric, percentile=at, seconds=value) for metric, at, value in targets),
        **more,
    )


@functools.cache
def plan(
    model: str,
    on: str,
    rate: float,
    input: int = 1000,
    output: int = 300,
    targets: tuple[Any, ...] = CHAT,
    *,
    weights: tuple[Any, ...] = ("bfloat16",),
    survive: Any = "",
    budget: float | None = None,
    **options: Any,
) -> Plan:
    asked = goal(on, rate, input, output, targets, survive=survive, budget=budget)
    return make_plan(model_shape(model), asked, Options(weights=weights, **options))
