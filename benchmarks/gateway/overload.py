"""Overload: for a minute three times what the engines carry, then normal again; what is still of use, and how soon.

    python benchmarks/gateway.py mock --ports 8101,8102 --slots 32 --prefill-rate 20000
    python benchmarks/gateway.py overload --url http://127.0.0.1:8000 --capacity 50

The capacity is that of the mocks by their law (`--slots`, `--itl-ms`, ... as given to them, and `--engines`), unless
--capacity says it. A request is of use (goodput) if it is whole and exact, its first token came within --ttft-target
and its tokens at --itl-target or faster. Prints Markdown.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import uvloop

from gateway.arrivals import Arrival, Phase, poisson
from gateway.load import add_server_options, add_shape_options, figures_of, measure, percentile, shape_of
from gateway.mock_openai import add_law_options, law_of
from gateway.streams import Stream
from gateway.tokens import vocabulary

RECOVERED = 0.95
"""Share of a second's requests that must meet their targets, in it and in every later second."""


@dataclass(frozen=True)
class Targets:
    ttft: float
    itl: float

    def met(self, stream: Stream, answer: list[int]) -> bool:
        if not stream.complete or not stream.times or (stream.ids and stream.ids != answer):
            return False
        later = sum(stream.counts[1:])
        itl = (stream.times[-1] - stream.times[0]) / later if later else 0.0
        return stream.times[0] - stream.intended <= self.ttft and itl <= self.itl


@dataclass(frozen=True)
class Outcome:
    """Of one phase."""

    name: str
    offered: int
    useful: int
    refused: int
    failed: int
    late: int
    """Whole, but after their targets."""
    goodput: float
    """Useful requests that ended in the phase, a second."""
    ttft_p50: float
    """Of those that were not refused, seconds."""
    ttft_p99: float
    refusal_p99: float
    """From the intended send to the refusal, seconds."""


def outcomes(
    streams: Sequence[Stream], useful: Sequence[bool], began: float, phases: Sequence[tuple[str, Phase]]
) -> list[Outcome]:
    """Requests belong to the phase of their intended send, goodput to that in which they ended."""
    made, start = [], began
    for name, phase in phases:
        end = start + phase.seconds
        numbers = [i for i, stream in enumerate(streams) if start <= stream.intended < end]
        chosen = [streams[i] for i in numbers]
        refused = [stream for stream in chosen if stream.status in (429, 503)]
        taken = [stream for stream in chosen if stream.status not in (429, 503)]
        ttft = sorted(s.times[0] - s.intended if s.complete and s.times else math.inf for s in taken)
        good = sum(useful[i] for i in numbers)
        whole = sum(stream.complete for stream in taken)
        ended = sum(useful[i] and start <= stream.ended < end for i, stream in enumerate(streams))
        refusals = sorted(stream.ended - stream.intended for stream in refused)
        made.append(
            Outcome(
                name,
                len(chosen),
                good,
                len(refused),
                len(taken) - whole,
                whole - good,
                ended / phase.seconds,
                percentile(ttft, 0.5),
                percentile(ttft, 0.99),
                percentile(refusals, 0.99),
            )
        )
        start = end
    return made


def recovery_seconds(streams: Sequence[Stream], useful: Sequence[bool], end_of_overload: float) -> float:
    """From there to the first second from which on all is well; infinite if it never is."""
    met: dict[int, list[bool]] = {}
    for stream, good in zip(streams, useful, strict=True):
        if stream.intended >= end_of_overload:
            met.setdefault(int(stream.intended - end_of_overload), []).append(good)
    if not met:
        return math.nan
    bad = [second for second, goods in met.items() if sum(goods) < RECOVERED * len(goods)]
    if not bad:
        return 0.0
    return math.inf if max(bad) == max(met) else float(max(bad) + 1)


def render(outcomes: Sequence[Outcome], capacity: float, recovery: float, valid: str) -> str:
    titles = ["phase", "offered", "useful", "late", "refused", "failed", "goodput, requests/s", "of capacity"]
    titles += ["TTFT p50 / p99 s", "refused after p99 ms"]
    rows = [titles, ["---"] * len(titles)]
    for o in outcomes:
        counts = [str(value) for value in (o.offered, o.useful, o.late, o.refused, o.failed)]
        share = f"{o.goodput / capacity:.0%}"
        refusal = f"{o.refusal_p99 * 1e3:.0f}" if o.refused else "–"
        rows.append([o.name, *counts, f"{o.goodput:.1f}", share, f"{o.ttft_p50:.2f} / {o.ttft_p99:.2f}", refusal])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    says = f"Capacity {capacity:.1f} requests/s; recovered {recovery:g} s after the overload. {valid}"
    return f"{table}\n\n{says.strip()}\n"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="gateway.py overload", description="Three times the capacity, then normal.")
    add_server_options(parser)
    parser.add_argument("--capacity", type=float, help="requests a second; default: of the mocks by their law")
    parser.add_argument("--engines", type=int, default=2)
    add_law_options(parser)
    parser.add_argument("--factor", type=float, default=3.0)
    parser.add_argument("--normal", type=float, default=0.7, help="of the capacity, before and after")
    parser.add_argument("--before", type=float, default=10.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--after", type=float, default=30.0, help="seconds")
    parser.add_argument("--ttft-target", type=float, default=2.0, help="seconds")
    parser.add_argument("--itl-target", type=float, default=0.1, help="seconds")
    add_shape_options(parser)
    arguments = parser.parse_args(argv)
    law = law_of(arguments)
    capacity = arguments.capacity or arguments.engines * law.capacity(arguments.prompt_tokens, arguments.output_tokens)
    normal = arguments.normal * capacity
    phases = [
        ("normal", Phase(arguments.before, normal)),
        (f"{arguments.factor:g} × capacity", Phase(arguments.seconds, arguments.factor * capacity)),
        ("normal again", Phase(arguments.after, normal)),
    ]
    arrivals: list[Arrival] = poisson(
        [phase for _, phase in phases], arguments.prompt_tokens, arguments.output_tokens, arguments.seed
    )
    words = vocabulary(arguments.tokenizer)
    run = measure(arguments.url, arrivals, shape_of(arguments), words, warm=arguments.warm, patience=arguments.patience)
    streams, expected, began, cpu = uvloop.run(run)
    targets = Targets(arguments.ttft_target, arguments.itl_target)
    useful = [targets.met(stream, answer) for stream, answer in zip(streams, expected, strict=True)]
    recovery = recovery_seconds(streams, useful, began + arguments.before + arguments.seconds)
    figures = figures_of(streams, expected, words, cpu)
    valid = "" if figures.valid else f"INVALID: the generator was {figures.why_invalid}."
    print(render(outcomes(streams, useful, began, phases), capacity, recovery, valid))


if __name__ == "__main__":
    main(sys.argv[1:])
