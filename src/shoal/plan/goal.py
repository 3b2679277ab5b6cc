"""What is asked of a plan: a workload, latencies that must hold, what it may cost, and what it must survive."""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.core.hardware import Cluster
from shoal.plan.trace import Trace
from shoal.plan.units import show_duration, show_money, show_rate
from shoal.plan.workload import Lengths, Workload

Metric = Literal["ttft", "itl", "tpot"]
Percentile = Literal["p50", "p90", "p99"]
Survive = Literal["", "gpu", "node"]


class GoalError(ValueError):
    """The goal makes no sense. The message names the value and says what would do."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """TPOT is a mean, whatever the percentile says."""

    metric: Metric
    percentile: Percentile
    seconds: float

    @property
    def flag(self) -> str:
        """As the command line has it."""
        return "--tpot" if self.metric == "tpot" else f"--{self.metric}-{self.percentile}"

    def __str__(self) -> str:
        name = self.flag.removeprefix("--").replace("-", " ")
        return f"{name.replace(self.metric, self.metric.upper())} {show_duration(self.seconds)}"


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that arrive at random (Poisson), `rate` a second."""

    rate: float
    input: float
    """Mean tokens of a prompt."""
    output: float
    lengths: tuple[tuple[int, int], ...] = ()
    """Of a trace's requests; empty: all alike."""
    longest: int
    """Tokens of the longest sequence, prompt and output."""
    source: str = ""
    """In words, where it is from a trace."""

    @property
    def output_tokens_per_second(self) -> float:
        return self.rate * self.output

    def workload(self) -> Workload:
        """As the event loop takes it."""
        if not self.lengths:
            return Workload(inputs=Lengths.fixed(round(self.input)), outputs=Lengths.fixed(round(self.output)))
        return Workload(
            inputs=Lengths.of([tokens for tokens, _ in self.lengths]),
            outputs=Lengths.of([tokens for _, tokens in self.lengths]),
        )


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    cluster: Cluster
    """What there is."""
    demand: Demand
    targets: tuple[Target, ...] = ()
    budget: float | None = None
    """Dollars an hour."""
    survive: Survive = ""
    """The loss of a device or a node, with the targets still met by what is left."""

    def describe(self) -> str:
        demand = self.demand
        parts = [f"{show_rate(demand.rate)} of {demand.input:,.0f} tokens in, {demand.output:,.0f} out"]
        parts += [str(target) for target in self.targets]
        if self.budget is not None:
            parts.append(f"at most {show_money(self.budget)}/h")
        if self.survive:
            parts.append(f"survives the loss of a {self.survive}")
        return ", ".join(parts)


def demand_of(rate: float, input: int, output: int, longest: int | None = None) -> Demand:
    """All requests alike. Raises GoalError."""
    for name, value in (("--rate", rate), ("--input", input), ("--output", output)):
        if value <= 0:
            raise GoalError(f"{name} is {value:g}: it must be more than 0")
    if longest is not None and longest < input + output:
        raise GoalError(f"--max-len is {longest}, and a request has {input} + {output} tokens; give at least their sum")
    return Demand(rate=rate, input=input, output=output, longest=longest or input + output)


def demand_of_trace(trace: Trace, rate: float | None, longest: int | None = None) -> Demand:
    """Of its lengths, at its busiest minute's rate where no other is given. Raises GoalError."""
    busiest = trace.busiest_rate
    chosen = busiest if rate is None else rate
    if chosen is None:
        raise GoalError(f"{trace.name} has no arrival times: say with --rate how many requests come, as 20/s")
    if chosen <= 0:
        raise GoalError(f"--rate is {chosen:g}: it must be more than 0")
    number = len(trace.lengths)
    source = f"{number:,} requests of {trace.name}"
    if rate is None and trace.mean_rate is not None:
        source += f" at its busiest minute's rate (on average {show_rate(trace.mean_rate)})"
    return Demand(
        rate=chosen,
        input=max(1.0, sum(tokens for tokens, _ in trace.lengths) / number),
        output=max(1.0, sum(tokens for _, tokens in trace.lengths) / number),
        lengths=trace.lengths,
        longest=longest or max(sum(pair) for pair in trace.lengths),
        source=source,
    )


def check(goal: Goal, max_len: int, model: str) -> None:
    """Raise GoalError for what no setup could do."""
    for target in goal.targets:
        if target.seconds <= 0:
            raise GoalError(f"{target.flag} is {target.seconds:g} s: it must be more than 0")
    if goal.demand.longest > max_len:
        raise GoalError(
            f"a request has up to {goal.demand.longest:,} tokens, and {model} takes {max_len:,}; shorten --input"
        )
    if goal.budget is not None and goal.cluster.dollars_per_device_hour is None:
        raise GoalError(
            f"--budget needs a price, and none is known for {goal.cluster.device.name}; add --price, as $2.50/h"
        )
    if goal.survive == "node" and goal.cluster.num_nodes < 2:
        raise GoalError(f"--survive 1node needs two nodes, and {goal.cluster.name or 'the cluster'} is one")
    if goal.survive == "gpu" and goal.cluster.num_devices <= goal.cluster.slices:
        raise GoalError(f"--survive 1gpu needs two GPUs, and {goal.cluster.name or 'the cluster'} is one")
