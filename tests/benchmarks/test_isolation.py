"""The prober's figure: how well times tell hits from misses, and how sure that is."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolation import Sent, auc_of_faster

TIMES = st.lists(st.integers(0, 5).map(float), min_size=2, max_size=12)


@given(TIMES, TIMES)
def test_the_area_is_the_chance_that_a_hit_is_faster(hits, misses):
    wins = [(hit < miss) + 0.5 * (hit == miss) for hit in hits for miss in misses]
    auc, low, high = auc_of_faster(hits, misses)
    assert auc == pytest.approx(sum(wins) / len(wins))
    assert 0 <= low <= auc <= high <= 1
    assert auc_of_faster(misses, hits)[0] == pytest.approx(1 - auc)


def test_times_that_do_not_overlap_are_told_apart_for_certain():
    assert auc_of_faster([1, 2, 3], [4, 5]) == (1, 1, 1)
    assert auc_of_faster([4, 5], [1, 2, 3]) == (0, 0, 0)


def test_the_interval_holds_the_truth_19_times_in_20_and_shrinks_with_more_probes():
    """Normal times whose means differ by one standard deviation: the true area is Phi(1 / sqrt 2)."""
    rng, truth = random.Random(1), 0.5 * (1 + math.erf(0.5))
    widths, covered = {}, 0
    for count in (50, 200):
        for _ in range(200):
            hits, misses = ([rng.gauss(mean, 1) for _ in range(count)] for mean in (0, 1))
            _, low, high = auc_of_faster(hits, misses)
            covered += low <= truth <= high
            widths[count] = high - low
    assert 0.92 <= covered / 400 <= 0.98
    assert widths[200] < 0.6 * widths[50]


def test_who_is_refused_waits_for_ever():
    sent = Sent(ttfts=[0.1, 0.2, 0.3], completed=3, refused=1)
    assert sent.ttft(0.5) == 0.2 and sent.ttft(0.99) == math.inf
    assert sent.good(0.2) == 0.5
