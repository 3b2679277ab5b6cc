"""Traces: each public format, and every mistake named with its line."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from shoal.sim.traces import Row, TraceError, arrivals, read, synthetic

DATA = Path(os.environ.get("SHOAL_DATA", Path(__file__).parents[3] / "shared")) / "traces"
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [0, 3]}
"""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "trace"
    file.write_text(text, encoding="utf-8")
    return file


def test_azure(tmp_path: Path) -> None:
    rows = read(written(tmp_path, AZURE))
    assert [(row.num_prompt, row.num_output) for row in rows] == [(374, 44), (396, 109)]
    assert [row.at for row in rows] == [0.0, pytest.approx(4.314579, abs=1e-5)]


def test_mooncake_prompts_begin_alike_where_their_hashes_do(tmp_path: Path) -> None:
    first, second = arrivals(read(written(tmp_path, MOONCAKE)), random.Random(0))
    assert (first.at, second.at) == (0.0, 3.0)
    one, other = first.prompt(), second.prompt()
    assert (len(one), len(other)) == (1100, 600)
    assert one[:512] == other[:512]
    assert one[512] != other[512]


def test_lengths_alone_need_a_rate_and_get_poisson_arrivals(tmp_path: Path) -> None:
    rows = read(written(tmp_path, "num_prefill_tokens,num_decode_tokens\n" + "100,10\n" * 4000))
    with pytest.raises(TraceError, match="--rate"):
        arrivals(rows, random.Random(0))
    made = arrivals(rows, random.Random(0), rate=20.0)
    assert made[-1].at == pytest.approx(200.0, rel=0.1)
    gaps = [b.at - a.at for a, b in zip(made, made[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.15)
    assert made == arrivals(rows, random.Random(0), rate=20.0)


def test_a_clock_is_scaled_and_copies_lie_over_one_another(tmp_path: Path) -> None:
    rows = [Row(n, 2.0 * n, 100, 10, (n % 3,)) for n in range(50)]
    scaled = arrivals(rows, random.Random(0), rate=5.0)
    assert scaled[-1].at == pytest.approx(49 / 5.0)
    copies = arrivals(rows, random.Random(0), repeat=3)
    assert len(copies) == 150 and len({one.id for one in copies}) == 150
    assert copies == sorted(copies, key=lambda one: one.at)
    assert max(one.at for one in copies) <= 100.0
    assert len({one.runs for one in copies}) == 9  # copies share nothing


def test_a_common_beginning() -> None:
    first, second = arrivals([Row(1, 0.0, 100, 5), Row(2, 1.0, 90, 5)], random.Random(0), prefix=64)
    assert first.prompt()[:64] == second.prompt()[:64]
    assert first.prompt()[64] != second.prompt()[64]


def test_made_up_lengths_have_the_asked_means() -> None:
    rows = synthetic(4000, 1000, 200, 0.5, random.Random(1))
    assert sum(row.num_prompt for row in rows) / 4000 == pytest.approx(1000, rel=0.05)
    assert sum(row.num_output for row in rows) / 4000 == pytest.approx(200, rel=0.05)
    assert {row.num_prompt for row in synthetic(5, 7, 3, 0.0, random.Random(1))} == {7}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        ("a,b\n1,2\n", ":1: needs a column for prompt tokens"),
        (AZURE + "2023-11-16 18:15:50.1,5,5\n", ":4: time goes back by"),
        (AZURE + "2023-11-16 18:55:50.1,5,5\n", ":4: no request for 2,399 s before this line: the trace has a gap"),
        (AZURE + "2023-11-16 18:15:51.1,,5\n", ":4: ContextTokens is empty"),
        (AZURE + "2023-11-16 18:15:51.1,5\n", ":4: has 2 cells, the header 3"),
        (AZURE + ",5,5\n", ":4: TIMESTAMP is empty"),
        (AZURE + "soon,5,5\n", ":4: TIMESTAMP is 'soon'"),
        (AZURE + "2023-11-16 18:15:51.1,0,5\n", ":4: ContextTokens is 0"),
        (AZURE + "2023-11-16 18:15:51.1,5,many\n", ":4: GeneratedTokens is 'many', not a number of tokens"),
        ("time,input,output\n-1,5,5\n", ":2: time is -1: a time cannot be negative"),
        ("time,input,output\nnan,5,5\n", ":2: time is"),
        ('{"input_length": 5}\n', ":1: needs a column"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 2}\nnonsense\n', ":2: is not a JSON object"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 2}\n', ":1: timestamp is -1"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 2.5}\n', ":1: output_length is 2.5"),
        (
            '{"timestamp": 1, "input_length": 5, "output_length": 2}\n{"input_length": 5, "output_length": 2}\n',
            ":2: has no",
        ),
        (
            MOONCAKE + '{"timestamp": 9000, "input_length": 600, "output_length": 7, "hash_ids": [1]}\n',
            ":3: 600 tokens",
        ),
        (MOONCAKE + '{"timestamp": 9000, "input_length": 5, "output_length": 7, "hash_ids": [-1]}\n', ":3: hash_ids"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(TraceError) as error:
        read(written(tmp_path, text))
    assert says in str(error.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(TraceError, match="nowhere"):
        read(Path("nowhere.csv"))


@pytest.mark.skipif(not DATA.exists(), reason="the public traces are not here")
@pytest.mark.parametrize(
    ("file", "requests", "prompt", "output", "seconds"),
    [
        ("AzureLLMInferenceTrace_conv.csv", 19_366, 1155, 211, 3502),
        ("AzureLLMInferenceTrace_code.csv", 8_819, 2048, 28, 3436),
        ("mooncake_conversation_trace.jsonl", 12_031, 12_035, 343, 3537),
        ("sharegpt_300_poisson10_lengths.csv", 300, 862, 665, 29),
    ],
)
def test_public_traces_are_what_they_are_said_to_be(
    file: str, requests: int, prompt: int, output: int, seconds: int
) -> None:
    rows = read(DATA / file)
    assert len(rows) == requests
    assert sum(row.num_prompt for row in rows) / requests == pytest.approx(prompt, abs=1)
    assert sum(row.num_output for row in rows) / requests == pytest.approx(output, abs=1)
    assert rows[-1].at == pytest.approx(seconds, abs=1)
