"""Collectives against measured points (planner.md 4.2; collectives_measured.csv where it is)."""

import csv
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.cost import collectives
from shoal.plan import catalogue
from tests.core.cost.engines import KIB, MIB, NDR, NVLINK, TCP, cluster

UNMEASURED = msgspec.structs.replace(NVLINK, all_reduce={})


@pytest.mark.parametrize(
    ("size", "microseconds"), [(16 * KIB, 5.3), (256 * KIB, 10.8), (MIB, 15.0), (16 * MIB, 92), (128 * MIB, 577)]
)
def test_points_come_out_as_they_went_in(size, microseconds):
    assert collectives.all_reduce(NVLINK, 8, size) == pytest.approx(microseconds * 1e-6, rel=1e-9)


@pytest.mark.parametrize(("size", "microseconds"), [(16 * KIB, 4.8), (MIB, 12.8), (16 * MIB, 99), (128 * MIB, 619)])
def test_ranks_that_were_not_measured_lie_between_those_that_were(size, microseconds):
    # Four ranks from the table of two: the law's ratio carries it there, roughly.
    assert collectives.all_reduce(NVLINK, 4, size) == pytest.approx(microseconds * 1e-6, rel=0.6)


@given(st.sampled_from([2, 4, 8, 16]), st.floats(1, 1e9), st.floats(1, 1e9))
def test_more_bytes_never_take_less(ranks, one, other):
    small, large = sorted((one, other))
    for link in (NVLINK, UNMEASURED, NDR, TCP):
        assert collectives.all_reduce(link, ranks, small) <= collectives.all_reduce(link, ranks, large) * (1 + 1e-9)


@given(st.sampled_from([2, 4, 8]), st.floats(1e3, 1e9))
def test_a_law_never_beats_the_wire(ranks, size):
    for link in (UNMEASURED, NDR, TCP):
        assert collectives.all_reduce(link, ranks, size) >= (ranks - 1) / ranks * size / link.bandwidth
        assert collectives.all_gather(link, ranks, size) >= (ranks - 1) / ranks * size / link.bandwidth


def test_nothing_to_reduce_takes_no_time():
    assert collectives.all_reduce(NVLINK, 1, MIB) == 0
    assert collectives.all_reduce(NVLINK, 8, 0) == 0
    assert collectives.all_to_all(cluster(), 1, 1, MIB) == 0


def test_an_all_reduce_over_two_nodes_is_hierarchical():
    two = cluster(2)
    size = 64 * MIB
    flat = collectives.all_reduce(NDR, 16, size)
    found = collectives.cluster_all_reduce(two, 16, 1, size)
    assert collectives.cluster_all_reduce(two, 8, 1, size) < found < flat
    assert collectives.cluster_all_reduce(cluster(2, TCP), 16, 1, size) > 5 * found


def test_an_all_to_all_sends_each_part_over_the_link_it_needs():
    inside = collectives.all_to_all(cluster(), 8, 1, 8 * MIB)
    across = collectives.all_to_all(cluster(2), 16, 1, 8 * MIB)
    assert inside == pytest.approx(NVLINK.latency + 7 * MIB / (NVLINK.bandwidth * NVLINK.reached))
    assert across == pytest.approx(NDR.latency + 4 * MIB / (NDR.bandwidth * NDR.reached))


def measured() -> Path:
    shared = Path(os.environ.get("SHOAL_DATA", str(Path(__file__).parents[4] / "shared")))
    found = [path for path in (shared / "collectives_measured.csv", shared / "data" / "collectives_measured.csv")]
    return next((path for path in found if path.exists()), found[0])


@pytest.mark.skipif(not measured().exists(), reason="the measured collectives are not on this machine")
@pytest.mark.parametrize(
    ("link", "system"),
    [("nvlink3", "a100_sxm"), ("nvlink4", "h100_sxm"), ("nvlink4", "h200_sxm"), ("nvlink5", "b200_sxm")],
)
def test_the_catalogue_against_measured_all_reduces(link, system):
    best: dict[tuple[int, int], float] = {}
    with measured().open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            own = row["source"] in ("vllm_graph", "nccl")  # What the catalogue's points are made of.
            if row["system"] == system and row["op"] == "all_reduce" and own:
                key = int(row["num_gpus"]), int(row["bytes"])
                best[key] = min(best.get(key, 1.0), float(row["us"]) * 1e-6)
    assert len(best) > 20
    spec = catalogue.link(link)
    errors = sorted(
        abs(collectives.all_reduce(spec, ranks, size) / seconds - 1)
        for (ranks, size), seconds in best.items()
        if 16 * KIB <= size <= 256 * MIB
    )
    assert errors[len(errors) // 2] < 0.15
