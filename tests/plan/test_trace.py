"""What traces say of a workload, and what cannot be planned for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.core.request_trace import read_rows
from shoal.plan.goal import GoalError, demand_of, demand_of_trace
from shoal.plan.trace import Trace, trace_of

DATA = Path(os.environ.get("SHOAL_DATA", Path(__file__).parents[2].parent / "shared"))


def trace(text: str) -> Trace:
    return trace_of(read_rows(text, "trace"), "trace")


def test_lengths_alone_need_a_rate() -> None:
    found = trace("num_prefill_tokens,num_decode_tokens\n100,10\n300,30\n")
    assert found.arrivals == ()
    with pytest.raises(GoalError, match="--rate"):
        demand_of_trace(found, None)
    demand = demand_of_trace(found, 3.0)
    assert (demand.rate, demand.input, demand.output, demand.longest) == (3.0, 200, 20, 330)


def test_the_busiest_minute_counts() -> None:
    times = [*range(0, 600, 6), *(300 + 0.5 * number for number in range(100))]
    rows = "".join(f"{time},10,5\n" for time in sorted(times))
    found = trace("arrival_time_s,input_toks,output_toks\n" + rows)
    assert found.mean_rate is not None and found.mean_rate < 0.4
    assert found.busiest_rate == pytest.approx(110 / 60, rel=0.02)
    assert demand_of_trace(found, None).rate == found.busiest_rate


@pytest.mark.parametrize(("name", "value"), [("--rate", (0, 1, 1)), ("--input", (1, 0, 1)), ("--output", (1, 1, 0))])
def test_a_workload_of_nothing_is_refused(name: str, value: tuple[int, int, int]) -> None:
    with pytest.raises(GoalError, match=name):
        demand_of(*value)


def test_a_sequence_must_fit_its_own_limit() -> None:
    with pytest.raises(GoalError, match="1000 \\+ 200"):
        demand_of(1, 1000, 200, longest=1100)


@pytest.mark.skipif(not (DATA / "traces").is_dir(), reason="the public traces are not here (SHOAL_DATA)")
@pytest.mark.parametrize(
    ("name", "requests", "busiest"),
    [
        ("AzureLLMInferenceTrace_conv.csv", 19_366, 8.7),
        ("mooncake_synthetic_trace.jsonl", 3_993, 4.67),
        ("vidur_arxiv_summarization_lengths.csv", 28_257, None),
    ],
)
def test_public_traces_read(name: str, requests: int, busiest: float | None) -> None:
    found = trace((DATA / "traces" / name).read_text(encoding="utf-8"))
    assert len(found.lengths) == requests
    assert found.busiest_rate == (None if busiest is None else pytest.approx(busiest, rel=0.01))
