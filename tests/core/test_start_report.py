"""Where the time of a start went: phases that follow each other, and the slowest of several."""

from __future__ import annotations

import pytest

from shoal.core.start_report import Laps, Phase, RankLoad, slowest


def load(rank: int, num_bytes: int = 3 * 10**9, reading: float = 2.0) -> RankLoad:
    return RankLoad(rank=rank, bytes_read=num_bytes, read_seconds=1.0, convert_seconds=0.5, reading_seconds=reading)


def test_phases_end_where_the_next_begins() -> None:
    laps = Laps("rank 0", 10.0)
    laps.end("open", 11.0)
    laps.end_two("read", 1.5, "convert", 15.0)
    laps.resume(20.0)
    laps.end("warm-up", 22.0)
    report = laps.report([load(0)])
    seconds = [(phase.name, phase.seconds) for phase in report.phases]
    assert seconds == [("open", 1.0), ("read", 1.5), ("convert", 2.5), ("warm-up", 2.0)]
    assert report.total_seconds == 7.0 and report.other_seconds == 0.0


def test_who_waits_for_a_start_sees_it_inside_of_their_own() -> None:
    laps = Laps("rank 0", 0.0)
    laps.end("read", 3.0)
    report = laps.report([]).inside([Phase("engine", "import", 1.0)], [Phase("engine", "listen", 2.0)], 7.5)
    assert [phase.name for phase in report.phases] == ["import", "read", "listen"]
    assert report.total_seconds == 7.5 and report.other_seconds == pytest.approx(1.5)


def test_the_slowest_rank_has_the_phases_and_all_are_read() -> None:
    reports = []
    for rank, seconds in enumerate((1.0, 3.0, 2.0)):
        laps = Laps(f"rank {rank}", 0.0)
        laps.end("read", seconds)
        reports.append(laps.report([load(rank)]))
    together = slowest(reports)
    assert [phase.where for phase in together.phases] == ["rank 1"] and together.total_seconds == 3.0
    assert [rank.rank for rank in together.ranks] == [0, 1, 2]


def test_rates_are_of_the_time_in_which_bytes_came() -> None:
    assert load(0).gigabytes_per_second == 1.5
    assert load(0, 0, 0.0).gigabytes_per_second == 0.0
