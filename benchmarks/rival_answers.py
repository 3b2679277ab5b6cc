"""What the two planners say, read from what they write: rows of a CSV and log lines of aiconfigurator, JSON of shoal.

And the same layouts put to shoal's cost model, which needs neither.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.core.cost.model import CostModel
from shoal.core.cost.types import CachePrecision, EngineShape, WeightPrecision
from shoal.core.layout import Layout
from shoal.plan import catalogue, models
from shoal.plan.steady_state import Lengths, ServingEstimate, Workload, closed_loop, steady

Row = dict[str, str]
AXES = re.compile(r"(etp|tp|pp|dp|ep)(\d+)")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Answer:
    """Of one mode (agg: prefill and decode on the same engines; disagg: apart)."""

    mode: str
    layout: str
    engine_gpus: int
    """Of one engine, or of one unit of prefill and decode engines."""
    engines: int
    rate: float
    """Requests a second of all engines."""
    ttft_ms: float
    tpot_ms: float
    concurrency: int
    """Of one engine."""
    row: Row

    @property
    def gpus(self) -> int:
        return self.engine_gpus * self.engines

    def __str__(self) -> str:
        return f"{self.engines} x ({self.layout})" if self.engines > 1 else self.layout


# --- aiconfigurator ---------------------------------------------------------------------------------------------------


def axes(text: str) -> dict[str, int]:
    """`tp4pp1dp2etp8ep1` by axis; etp and ep split experts."""
    return {name: int(size) for name, size in AXES.findall(text)}


def layout_name(text: str) -> str:
    """Without axes of size 1."""
    return " x ".join(f"{name}{size}" for name, size in axes(text).items() if size > 1) or "tp1"


def answers(rows: Iterable[Row], mode: str, gpus: int | None) -> list[Answer]:
    """In the order of the file, the best first; `gpus`: of the cluster, None where the fewest are looked for."""
    return [_answer(row, mode, gpus) for row in rows]


def _answer(row: Row, mode: str, gpus: int | None) -> Answer:
    own = int(float(row["num_total_gpus"]))
    engines = int(float(row["replicas_needed"])) if gpus is None else gpus // own
    if mode == "agg":
        layout = layout_name(row["parallel"])
    else:
        layout = " + ".join(
            f"{row[f'({pool})workers']} x ({layout_name(row[f'({pool})parallel'])}) for {name}"
            for pool, name in (("p", "prefill"), ("d", "decode"))
        )
    return Answer(
        mode=mode,
        layout=layout,
        engine_gpus=own,
        engines=engines,
        rate=float(row["seq/s"]) * engines,
        ttft_ms=float(row["ttft"]),
        tpot_ms=float(row["tpot"]),
        concurrency=int(float(row["concurrency"])),
        row=row,
    )


def read_answers(folder: Path, gpus: int | None) -> dict[str, list[Answer]]:
    """By mode, from what `--save-dir` holds."""
    found: dict[str, list[Answer]] = {}
    for file in sorted(folder.rglob("best_config_topn.csv")):
        with file.open(encoding="utf-8", newline="") as opened:
            found[file.parent.name] = answers(csv.DictReader(opened), file.parent.name, gpus)
    return found


def best(found: list[Answer], ttft_ms: float, tpot_ms: float) -> Answer | None:
    """The first that meets the targets: its files hold, last, the nearest to a target that nothing meets."""
    return next((one for one in found if one.ttft_ms <= ttft_ms and one.tpot_ms <= tpot_ms), None)


def failure(output: str) -> str:
    """Its reason in short: the last error it printed, without what it is wrapped in."""
    told = [
        line
        for line in COLOURS.sub("", output).splitlines()
        if "[E]" in line
        or "returned no results" in line
        or "error: " in line
        or re.match(r"\w*(Error|Exception): ", line)
    ]
    if not told:
        return ""
    line = next((one for one in reversed(told) if "failed: " in one or "returned no results" in one), told[-1])
    for wrapping in (r"^.*?\[[EW]\] \[[^]]*\] ", r"^.*?failed: ", r"^.*?[Ee]rror: "):
        line = re.sub(wrapping, "", line)
    return line.split(". ")[0].strip(" .")


def estimate(output: str) -> dict[str, float]:
    """TTFT and TPOT (ms) and output tokens/s of `estimate`; empty where it printed none."""
    names = {"TTFT": "ttft_ms", "TPOT": "tpot_ms", "tokens/s": "tokens_per_second"}
    found = {}
    for line in COLOURS.sub("", output).splitlines():
        match = re.match(r"\s*(TTFT|TPOT|tokens/s):\s+([\d.,]+)", line)
        if match:
            found[names[match[1]]] = float(match[2].replace(",", ""))
    return found


# --- shoal ------------------------------------------------------------------------------------------------------------


def plan_layout(plan: dict[str, Any]) -> str:
    """As the tables of `shoal plan` write it."""
    return " + ".join(_pool(pool) for pool in plan["answer"]["setup"]["pools"])


def _pool(pool: dict[str, Any]) -> str:
    sizes = pool["engine"]["shape"]
    names = ("tp", "pp", "ep", "cp", "attention_dp")
    layout = " x ".join(f"{name.replace('_', '-')}{sizes[name]}" for name in names if sizes.get(name, 1) > 1) or "tp1"
    role = "" if pool["role"] == "both" else f" for {pool['role']}"
    return (f"{pool['replicas']} x ({layout})" if pool["replicas"] > 1 else layout) + role


def most_rate(plan: dict[str, Any]) -> tuple[float, float]:
    """Of a plan for far too high a rate: the rate said to be met, and the most that is carried; else 0."""
    told = plan.get("impossible") or {}
    nearest = re.search(r"--rate ([\d.,]+)/s", told.get("nearest", ""))
    bound = re.search(r"carry ([\d.,]+)/s at most", told.get("bound", ""))
    return tuple(float(found[1].replace(",", "")) if found else 0.0 for found in (nearest, bound))  # type: ignore[return-value]


@dataclass(frozen=True)
class Ours:
    """What shoal's cost model and event loop say of somebody's layout."""

    closed: ServingEstimate
    """Of one engine, by as many clients as its row has."""
    opened: ServingEstimate
    """Of one engine, requests at random at its row's rate."""
    exact: bool
    """Whether our axes can say the layout; else it is the nearest one: experts by ep where it has them by tp."""


def our_layout(sizes: dict[str, int], mixture: bool) -> tuple[Layout, int, bool]:
    """Layout, groups with attention of their own, and whether that is just what was asked."""
    tp, pp, groups = sizes.get("tp", 1), sizes.get("pp", 1), sizes.get("dp", 1)
    if not mixture:
        return Layout(tp=tp, pp=pp), groups, True
    ep, etp = sizes.get("ep", 1), sizes.get("etp", 1)
    if groups > 1:
        # Experts are then over all groups: within one by tp or by ep, between groups always by ep.
        split = min(tp, ep // groups) if ep >= groups else 1
        return Layout(tp=tp // split, ep=split, pp=pp), groups, etp == tp // split
    return Layout(tp=max(1, tp // ep), ep=min(ep, tp), pp=pp), 1, True


def ask_ours(
    model: str,
    on: str,
    found: Answer,
    weights: WeightPrecision,
    cache: CachePrecision,
    lengths: tuple[int, int],
    profile: str = "vllm",
) -> Ours:
    """A layout of `agg`, with its concurrency and its largest step."""
    shape = models.model_shape(model)
    layout, groups, exact = our_layout(axes(found.row["parallel"]), shape.is_mixture)
    cost = CostModel(
        EngineShape(
            model=shape,
            cluster=catalogue.cluster(on),
            layout=layout,
            attention_dp=groups,
            weights=weights,
            cache=cache,
            profile=profile,
            max_batch_tokens=max(lengths[0], int(float(found.row["num_tokens"]))),
            max_sequences=-(-found.concurrency // groups),
        )
    )
    work = Workload(inputs=Lengths.fixed(lengths[0]), outputs=Lengths.fixed(lengths[1]))
    return Ours(
        closed=closed_loop(cost, work, found.concurrency, requests=max(40, 10 * found.concurrency)),
        opened=steady(cost, work, found.rate / found.engines),
        exact=exact,
    )
