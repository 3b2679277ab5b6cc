"""Traces: the public forms, and every way in which one cannot be planned for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.plan.goal import GoalError, demand_of, demand_of_trace
from shoal.plan.trace import TraceError, read_trace

DATA = Path(os.environ.get("SHOAL_DATA", Path(__file__).parents[2].parent / "shared"))


def written(tmp_path: Path, text: str, name: str = "trace.csv") -> Path:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return file


def test_azure(tmp_path: Path) -> None:
    trace = read_trace(
        written(
            tmp_path,
            "TIMESTAMP,ContextTokens,GeneratedTokens\n"
            "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:05.9799600,3180,8\n",
        )
    )
    assert trace.lengths == ((4808, 10), (3180, 8))
    assert trace.arrivals == pytest.approx((0.0, 2.0))
    assert trace.mean_rate == pytest.approx(0.5)


def test_mooncake(tmp_path: Path) -> None:
    text = '{"timestamp": 500, "input_length": 7, "output_length": 5, "hash_ids": [0]}\n'
    text += '{"timestamp": 3500, "input_length": 9, "output_length": 4, "hash_ids": [0, 1]}\n'
    trace = read_trace(written(tmp_path, text, "trace.jsonl"))
    assert trace.lengths == ((7, 5), (9, 4))
    assert trace.arrivals == pytest.approx((0.0, 3.0))


def test_lengths_alone_need_a_rate(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, "num_prefill_tokens,num_decode_tokens\n100,10\n300,30\n"))
    assert trace.arrivals == ()
    with pytest.raises(GoalError, match="--rate"):
        demand_of_trace(trace, None)
    demand = demand_of_trace(trace, 3.0)
    assert (demand.rate, demand.input, demand.output, demand.longest) == (3.0, 200, 20, 330)


def test_the_busiest_minute_counts(tmp_path: Path) -> None:
    times = [*range(0, 600, 6), *(300 + 0.5 * number for number in range(100))]
    rows = "".join(f"{time},10,5\n" for time in sorted(times))
    trace = read_trace(written(tmp_path, "arrival_time_s,input_toks,output_toks\n" + rows))
    assert trace.mean_rate is not None and trace.mean_rate < 0.4
    assert trace.busiest_rate == pytest.approx(110 / 60, rel=0.02)
    assert demand_of_trace(trace, None).rate == trace.busiest_rate


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("arrival,input\n1,2\n", "line 1: no column of output tokens among arrival, input"),
        ("arrival,input,output\n", "no requests"),
        ("arrival,input,output\n1,2,3\n-1,2,3\n", "line 3: arrival is -1: a time cannot be negative"),
        ("arrival,input,output\n5,2,3\n1,2,3\n", "line 3: it arrives 4 s before line 2; sort"),
        ("arrival,input,output\n1,2,3\n2,,3\n", "line 3: input is missing"),
        ("arrival,input,output\n1,2,3\n,4,3\n", "line 3: arrival is missing"),
        ("arrival,input,output\n1,two,3\n", "line 2: input is 'two'"),
        ("arrival,input,output\n1,-2,3\n", "line 2: input is -2"),
        ("arrival,input,output\nsoon,2,3\n", "line 2: arrival is 'soon'"),
        ("arrival,input,output\n0,1,1\n1,1,1\n2,1,1\n900,1,1\n", "line 5: a gap: nothing arrives for 898 of 900 s"),
    ],
)
def test_what_cannot_be_planned_for_is_said_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TraceError) as refusal:
        read_trace(written(tmp_path, text))
    assert message in str(refusal.value)


@pytest.mark.parametrize("text", ["not json\n", "[1]\n", '{"timestamp": -1, "input_length": 1, "output_length": 1}\n'])
def test_bad_json_lines_are_said_with_their_line(tmp_path: Path, text: str) -> None:
    good = '{"timestamp": 0, "input_length": 1, "output_length": 1}\n'
    with pytest.raises(TraceError, match="line 2"):
        read_trace(written(tmp_path, good + text, "trace.jsonl"))


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
    trace = read_trace(DATA / "traces" / name)
    assert len(trace.lengths) == requests
    assert trace.busiest_rate == (None if busiest is None else pytest.approx(busiest, rel=0.01))
