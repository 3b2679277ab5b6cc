"""Request traces: each public format, and every mistake named with its line."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.request_trace import TraceError, TraceRow, read_rows

DATA = Path(os.environ.get("SHOAL_DATA", Path(__file__).parents[3] / "shared")) / "traces"
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
MOONCAKE = """{"timestamp": 500, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 3500, "input_length": 600, "output_length": 7, "hash_ids": [0, 3]}
"""
LENGTHS = "arrival,input,output\n"
LOG = '{"arrival_time": 1, "input_toks": 5, "output_toks": 2}\n'


def test_azure() -> None:
    rows = read_rows(AZURE, "trace")
    assert [(row.line, row.num_prompt, row.num_output) for row in rows] == [(2, 374, 44), (3, 396, 109)]
    assert [row.at for row in rows] == [0.0, pytest.approx(4.314579, abs=1e-5)]


def test_mooncake_counts_milliseconds_and_names_blocks() -> None:
    assert read_rows(MOONCAKE, "trace") == [TraceRow(1, 0.0, 1100, 5, (0, 1, 2)), TraceRow(2, 3.0, 600, 7, (0, 3))]


def test_a_request_log_counts_seconds() -> None:
    text = LOG + LOG.replace(": 1,", ": 3.5,")
    assert [row.at for row in read_rows(text, "trace")] == [0.0, 2.5]


def test_lengths_alone_have_no_times() -> None:
    rows = read_rows("num_prefill_tokens,num_decode_tokens,pd_ratio\n100,10,10.0\n300,30,10.0\n", "trace")
    assert rows == [TraceRow(2, None, 100, 10), TraceRow(3, None, 300, 30)]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\n" + text.replace("\n", "\n\n"),
        lambda text: text.upper(),
        lambda text: text.replace(",", " , "),
        lambda text: text.rstrip("\n"),
    ],
    ids=["mark", "windows", "empty lines", "capitals", "spaces", "no last newline"],
)
def test_how_it_is_written_does_not_matter(change: object) -> None:
    assert callable(change)
    text = "arrival,input,output\n5,2,3\n6,4,5\n"
    plain = [(row.at, row.num_prompt, row.num_output) for row in read_rows(text, "trace")]
    assert [(row.at, row.num_prompt, row.num_output) for row in read_rows(change(text), "trace")] == plain


@given(st.datetimes(datetime(1971, 1, 1), datetime(2100, 1, 1)), st.sampled_from([None, 0, 330, -480]))
def test_dates_are_those_of_the_standard_library(moment: datetime, minutes_east: int | None) -> None:
    zone = UTC if minutes_east is None else timezone(timedelta(minutes=minutes_east))
    written = moment.isoformat(sep=" ") if minutes_east is None else moment.replace(tzinfo=zone).isoformat()
    rows = read_rows(LENGTHS + f"0,1,1\n{written},1,1\n", "trace", longest_pause=1e12)
    assert rows[1].at == pytest.approx(moment.replace(tzinfo=zone).timestamp(), abs=1e-5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "trace: is empty"),
        (" \n\n", "trace: is empty"),
        (LENGTHS, "has no requests"),
        ("a,b\n1,2\n", ":1: needs a column for prompt tokens"),
        ("input,b\n1,2\n", "there are input, b"),
        ("input,input_tokens,output\n1,2,3\n", "input_tokens and input may both be meant"),
        (AZURE + "2023-11-16 18:15:50.1,5,5\n", ":4: time goes back by"),
        (AZURE + "2023-11-16 18:55:50.1,5,5\n", ":4: no request for 2,399 of 2,403 s before this line: a gap"),
        (AZURE + "2023-11-16 18:15:51.1,,5\n", ":4: ContextTokens is empty"),
        (AZURE + "2023-11-16 18:15:51.1,5\n", ":4: has 2 cells, the header 3"),
        (AZURE + ",5,5\n", ":4: TIMESTAMP is empty"),
        (AZURE + "soon,5,5\n", ":4: TIMESTAMP is 'soon', neither seconds nor a date"),
        (AZURE + "2023-02-29 18:15:51.1,5,5\n", ":4: TIMESTAMP is '2023-02-29 18:15:51.1'"),
        (AZURE + "2023-11-16 24:15:51.1,5,5\n", ":4: TIMESTAMP is"),
        (AZURE + "2023-11-16 18:15:51.1,0,5\n", ":4: ContextTokens is 0"),
        (AZURE + "2023-11-16 18:15:51.1,5,many\n", ":4: GeneratedTokens is 'many', not a number of tokens"),
        (LENGTHS + "-1,5,5\n", ":2: arrival is -1: a time cannot be negative"),
        (LENGTHS + "nan,5,5\n", ":2: arrival is 'nan'"),
        (LENGTHS + "0,nan,5\n", ":2: input is 'nan', not a number"),
        (LENGTHS + "0,inf,5\n", ":2: input is 'inf', not a number"),
        (LENGTHS + "0,1e999,5\n", ":2: input is '1e999', not a number"),
        (LENGTHS + "0,-2,5\n", ":2: input is -2"),
        (LENGTHS + "0,2.5,5\n", ":2: input is '2.5'"),
        (LENGTHS + f"0,{'1' * 140_000},5\n", ":2: is not CSV"),
        ('{"input_length": 5}\n', ":1: needs a column"),
        (LOG + "nonsense\n", ":2: is not a JSON object"),
        (LOG + "[1]\n", ":2: is not a JSON object"),
        (LOG.replace(": 1,", ": -1,"), ":1: arrival_time is -1"),
        (LOG.replace(": 1,", ": true,"), ":1: arrival_time is True"),
        (LOG.replace(": 1,", ": null,"), ":1: arrival_time is empty"),
        (LOG.replace(": 2}", ": 2.5}"), ":1: output_toks is 2.5"),
        (LOG.replace(": 2}", f": 1{'0' * 400}}}"), ":1: "),
        (LOG + '{"input_toks": 5, "output_toks": 2}\n', ":2: has no time, and other lines have one"),
        (MOONCAKE.replace("[0, 3]", "[1]"), ":2: 600 tokens are 2 blocks of 512; hash_ids has 1"),
        (MOONCAKE.replace("[0, 3]", "[1, true]"), ":2: hash_ids must be a list of whole numbers"),
        (MOONCAKE.replace("[0, 3]", "7"), ":2: hash_ids"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, says: str) -> None:
    with pytest.raises(TraceError) as error:
        read_rows(text, "trace")
    assert says in str(error.value)
    assert str(error.value).startswith("trace:")


def test_a_pause_is_a_gap_by_its_share_or_as_one_says() -> None:
    def paused(*times: float) -> str:
        return LENGTHS + "".join(f"{time},1,1\n" for time in times)

    assert len(read_rows(paused(0, 59, 61), "trace")) == 3  # less than a minute is none
    regular = [10.0 * number for number in range(31)]
    assert len(read_rows(paused(*regular, 390), "trace")) == 32  # 90 of 390 s
    with pytest.raises(TraceError, match="allow it with --longest-pause 150s"):
        read_rows(paused(*regular, 450), "trace")
    assert len(read_rows(paused(*regular, 450), "trace", longest_pause=150)) == 32
    with pytest.raises(TraceError, match=":3:"):
        read_rows(paused(0, 59, 61), "trace", longest_pause=30)


@pytest.mark.skipif(not DATA.exists(), reason="the public traces are not here")
@pytest.mark.parametrize(
    ("file", "requests", "prompt", "output", "seconds"),
    [
        ("AzureLLMInferenceTrace_conv.csv", 19_366, 1155, 211, 3502),
        ("AzureLLMInferenceTrace_code.csv", 8_819, 2048, 28, 3436),
        ("mooncake_conversation_trace.jsonl", 12_031, 12_035, 343, 3537),
        ("sharegpt_300_poisson10_lengths.csv", 300, 862, 665, 29),
        ("vidur_arxiv_summarization_lengths.csv", 28_257, 2588, 291, None),
    ],
)
def test_public_traces_are_what_they_are_said_to_be(
    file: str, requests: int, prompt: int, output: int, seconds: int | None
) -> None:
    rows = read_rows((DATA / file).read_text(encoding="utf-8"), file)
    assert len(rows) == requests
    assert sum(row.num_prompt for row in rows) / requests == pytest.approx(prompt, abs=1)
    assert sum(row.num_output for row in rows) / requests == pytest.approx(output, abs=1)
    assert rows[-1].at == (None if seconds is None else pytest.approx(seconds, abs=1))
