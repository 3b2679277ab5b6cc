"""From traces to arrivals: what prompts share, whose clock counts, and made-up lengths."""

from __future__ import annotations

import random

import pytest

from shoal.core.request_trace import TraceError, TraceRow, read_rows
from shoal.sim.traces import arrivals, synthetic

MOONCAKE = """{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [7, 1099511627776, -3]}
{"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [7, 9]}
"""


def test_mooncake_prompts_begin_alike_where_their_hashes_do() -> None:
    first, second = arrivals(read_rows(MOONCAKE, "trace"), random.Random(0))
    assert (first.at, second.at) == (0.0, 3.0)
    one, other = first.prompt(), second.prompt()
    assert (len(one), len(other)) == (1100, 600)
    assert one[:512] == other[:512]
    assert one[512] != other[512]
    assert 0 < min(one) <= max(one) < 100  # names of blocks may be any numbers; tokens are not


def test_lengths_alone_need_a_rate_and_get_poisson_arrivals() -> None:
    rows = read_rows("num_prefill_tokens,num_decode_tokens\n" + "100,10\n" * 4000, "trace")
    with pytest.raises(TraceError, match="--rate"):
        arrivals(rows, random.Random(0))
    made = arrivals(rows, random.Random(0), rate=20.0)
    assert made[-1].at == pytest.approx(200.0, rel=0.1)
    gaps = [b.at - a.at for a, b in zip(made, made[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.15)
    assert made == arrivals(rows, random.Random(0), rate=20.0)


def test_a_clock_is_scaled_and_copies_lie_over_one_another() -> None:
    rows = [TraceRow(n, 2.0 * n, 100, 10, (n % 3,)) for n in range(50)]
    scaled = arrivals(rows, random.Random(0), rate=5.0)
    assert scaled[-1].at == pytest.approx(49 / 5.0)
    copies = arrivals(rows, random.Random(0), repeat=3)
    assert len(copies) == 150 and len({one.id for one in copies}) == 150
    assert copies == sorted(copies, key=lambda one: one.at)
    assert max(one.at for one in copies) <= 100.0
    assert len({one.runs for one in copies}) == 9  # copies share nothing
    together = arrivals(rows, random.Random(0), repeat=4, rate=5.0)
    assert len(together) == 200 and max(one.at for one in together) == pytest.approx(40.0, rel=0.05)


def test_a_common_beginning() -> None:
    first, second = arrivals([TraceRow(1, 0.0, 100, 5), TraceRow(2, 1.0, 90, 5)], random.Random(0), prefix=64)
    assert first.prompt()[:64] == second.prompt()[:64]
    assert first.prompt()[64] != second.prompt()[64]
    (short,) = arrivals([TraceRow(3, 0.0, 50, 5)], random.Random(0), prefix=64)
    assert short.prompt() == first.prompt()[:50]
    with pytest.raises(TraceError, match="leave --prefix"):
        arrivals([TraceRow(1, 0.0, 100, 5, (3,))], random.Random(0), prefix=64)


def test_prompts_that_name_no_blocks_share_none() -> None:
    rows = [TraceRow(n, float(n), 100, 5, (n,) if n % 2 else ()) for n in range(8)]
    prompts = [tuple(one.prompt()) for one in arrivals(rows, random.Random(0), repeat=2)]
    assert len(set(prompts)) == 16


def test_made_up_lengths_have_the_asked_means() -> None:
    rows = synthetic(4000, 1000, 200, 0.5, random.Random(1))
    assert sum(row.num_prompt for row in rows) / 4000 == pytest.approx(1000, rel=0.05)
    assert sum(row.num_output for row in rows) / 4000 == pytest.approx(200, rel=0.05)
    assert {row.num_prompt for row in synthetic(5, 7, 3, 0.0, random.Random(1))} == {7}
