"""The Markdown report: machine, engines, targets. Every figure is a median over rounds, with the range beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Figures = dict[str, float]


@dataclass
class EngineResults:
    name: str
    precision: str
    version: str
    rounds: dict[str, dict[int, Figures]] = field(default_factory=dict)
    """Workload name -> round -> figures of `measures.measure` and what the runner adds."""
    starts: list[float] = field(default_factory=list)
    """Seconds from process start to first token."""
    peak_rss_bytes: int = 0
    agreement: str = ""
    problem: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def values(self, workload: str, figure: str) -> list[float]:
        return [figures[figure] for figures in self.rounds.get(workload, {}).values() if figure in figures]


@dataclass
class Report:
    machine: dict[str, Any]
    rates: dict[int, dict[str, float]]
    """Round -> `machine.measure`."""
    engines: list[EngineResults]
    missing_peers: dict[str, str]
    command: str
    date: str

    def find(self, name: str) -> EngineResults | None:
        return next((engine for engine in self.engines if engine.name == name), None)


def spread(values: Iterable[float], digits: int, scale: float = 1.0) -> str:
    """`median (min-max)`, only the value where there is one, a dash where there is none."""
    scaled = [value * scale for value in values]
    if not scaled:
        return "–"
    middle = f"{statistics.median(scaled):,.{digits}f}"
    return middle if len(scaled) == 1 else f"{middle} ({min(scaled):,.{digits}f}–{max(scaled):,.{digits}f})"


def render(report: Report) -> str:
    sections = [_machine(report), _engines(report), _targets(report)]
    problems = [f"- {name}: {reason}" for name, reason in report.missing_peers.items()]
    problems += [f"- {engine.name}: {engine.problem}" for engine in report.engines if engine.problem]
    if problems:
        sections.append("## What could not be measured\n\n" + "\n".join(problems))
    return "\n\n".join(sections) + "\n"


def _machine(report: Report) -> str:
    m, rates = report.machine, report.rates.values()
    return "\n".join(
        [
            f"`{report.command}`, {report.date}",
            "",
            f"- {m['cpu']}, {m['cores']} cores, {', '.join(m['simd'])}, {m['memory_gib']} GiB, {m['system']}",
            f"- Python {m['python']}, torch {m['torch']}; "
            + "; ".join(dict.fromkeys(engine.version for engine in report.engines if engine.version)),
            f"- float32 GEMM {spread((r['gemm_gflops'] for r in rates), 0)} GFLOP/s, "
            f"memory read {spread((r['read_gbps'] for r in rates), 1)} GB/s, all cores, measured once a round",
            f"- {_foreign(report)}",
            f"- rounds: {len(report.rates)}; medians, with the range over rounds in brackets (none where one round)",
        ]
    )


def _foreign(report: Report) -> str:
    """How quiet the machine was."""
    loads = [
        (figures["foreign_load"], engine.name, workload)
        for engine in report.engines
        for workload, rounds in engine.rounds.items()
        for figures in rounds.values()
    ]
    if not loads:
        return "nothing was run"
    worst, name, workload = max(loads)
    median = statistics.median(load for load, _, _ in loads)
    most = f"{worst:.2f} ({name}, workload {workload})"
    return f"cores busy with other processes during a run: median {median:.2f}, most {most}"


_COLUMNS: list[tuple[str, Callable[[EngineResults], str]]] = [
    ("engine", lambda e: e.name),
    ("(a) decode tok/s", lambda e: spread(e.values("a", "decode_rate"), 1)),
    ("(a) TTFT ms", lambda e: spread(e.values("a", "ttft_p50"), 0, 1e3)),
    ("(b) out tok/s", lambda e: spread(e.values("b", "output_rate"), 1)),
    ("(b) TTFT p50 / p99 s", lambda e: _two(e, "b")),
    ("(b) TPOT p50 ms", lambda e: spread(e.values("b", "tpot_p50"), 0, 1e3)),
    ("(c) out tok/s", lambda e: spread(e.values("c", "output_rate"), 1)),
    ("(c) TTFT p50 / p99 s", lambda e: _two(e, "c")),
    ("(c) TPOT p50 ms", lambda e: spread(e.values("c", "tpot_p50"), 0, 1e3)),
    ("(d) prefill tok/s", lambda e: spread(e.values("d", "prefill_rate"), 0)),
    ("start s", lambda e: spread(e.starts, 1)),
    ("peak RSS GB", lambda e: f"{e.peak_rss_bytes / 1e9:.2f}" if e.peak_rss_bytes else "–"),
    ("greedy tokens equal to transformers", lambda e: e.agreement or "–"),
]


def _two(engine: EngineResults, workload: str) -> str:
    p50, p99 = engine.values(workload, "ttft_p50"), engine.values(workload, "ttft_p99")
    return f"{statistics.median(p50):.1f} / {statistics.median(p99):.1f}" if p50 else "–"


def _engines(report: Report) -> str:
    rows = [[cell(engine) for _, cell in _COLUMNS] for engine in report.engines]
    return "## Engines\n\n" + _table([title for title, _ in _COLUMNS], rows)


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- targets --------------------------------------------------------------------------------------------------------

_BEST_TRANSFORMERS = ("transformers batching", "transformers generate")


def _ratios(report: Report, name: str, others: tuple[str, ...], workload: str, figure: str) -> list[float]:
    """Of each round that has both; where there are several others, over the fastest of that round."""
    engine = report.find(name)
    rivals = [rival for rival in map(report.find, others) if rival is not None]
    ratios = []
    for number, figures in (engine.rounds.get(workload, {}) if engine else {}).items():
        rates = [rival.rounds[workload][number][figure] for rival in rivals if number in rival.rounds.get(workload, {})]
        if rates:
            ratios.append(figures[figure] / max(rates))
    return ratios


def _targets(report: Report) -> str:
    rows = []
    comparisons = [
        ("shoal float32", ("vLLM float32",), "a", "output_rate", 1.6),
        ("shoal float32", ("vLLM float32",), "b", "output_rate", 1.35),
        ("shoal float32", ("vLLM float32",), "c", "output_rate", 1.2),
        ("shoal float32", ("vLLM float32",), "d", "prefill_rate", 1.05),
        ("shoal float32", _BEST_TRANSFORMERS, "b", "output_rate", 4.0),
        ("shoal float32", _BEST_TRANSFORMERS, "c", "output_rate", 4.0),
        ("shoal int8", ("shoal float32",), "b", "output_rate", 1.8),
        ("shoal int8", ("shoal float32",), "c", "output_rate", 1.8),
        ("shoal int8", ("llama.cpp Q8_0",), "c", "output_rate", 2.0),
        ("shoal int8", ("llama.cpp Q8_0",), "a", "output_rate", 1.0),
    ]
    for name, others, workload, figure, target in comparisons:
        rival = "transformers, its faster form" if others is _BEST_TRANSFORMERS else others[0]
        what = {"output_rate": "output tok/s", "prefill_rate": "prefill tok/s"}[figure]
        ratios = _ratios(report, name, others, workload, figure)
        rows.append(_target_row(f"{name} / {rival}, ({workload}) {what}", ratios, target, "×"))
    rows += _machine_targets(report)
    return "## Targets\n\nRatios are taken round by round.\n\n" + _table(
        ["what", "target", "measured", "reached"], rows
    )


def _machine_targets(report: Report) -> list[list[str]]:
    rows = []
    shoal = report.find("shoal float32")
    for what, workload, figure, target in (
        ("float32 GEMM rate that shoal float32 turns over at (c)", "c", "gemm_fraction", 78.0),
        ("memory bandwidth that shoal float32 decode uses at (a)", "a", "bandwidth_fraction", 65.0),
        ("allocated KV that holds live tokens at (c)", "c", "kv_fill", 95.0),
    ):
        percents = [100 * value for value in shoal.values(workload, figure)] if shoal else []
        rows.append(_target_row(what, percents, target, "%"))
    rows.append(_target_row("shoal float32, start to first token", shoal.starts if shoal else [], 6.0, " s", most=True))
    needed = shoal.facts.get("needed_bytes", 0) if shoal else 0
    rss = [shoal.peak_rss_bytes / needed] if shoal and needed else []
    rows.append(_target_row("shoal float32, peak RSS / (weights + KV in use)", rss, 1.6, "×", most=True))
    return rows


def _target_row(what: str, values: list[float], target: float, unit: str, *, most: bool = False) -> list[str]:
    digits = 1 if unit == "%" else 2
    if not values:
        return [what, f"{'≤' if most else '≥'} {target:g}{unit}", "not measured", "–"]
    median = statistics.median(values)
    reached = median <= target if most else median >= target
    measured = spread(values, digits) + unit
    return [what, f"{'≤' if most else '≥'} {target:g}{unit}", measured, "yes" if reached else "**no**"]
