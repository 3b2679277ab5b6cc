"""What is said of an overload, from streams made up by hand."""

import math

from gateway.arrivals import Phase
from gateway.overload import Targets, outcomes, recovery_seconds
from gateway.streams import Stream

TARGETS = Targets(ttft=1.0, itl=0.1)


def stream(intended, *, ttft=0.5, ids=(1, 2, 3), status=200):
    made = Stream(0, b"", intended=intended, status=status)
    if status == 200:
        made.times = [intended + ttft + 0.05 * i for i in range(len(ids))]
        made.counts, made.ids, made.finished = [1] * len(ids), list(ids), True
    made.ended = made.times[-1] if made.times else intended + 0.01
    return made


def test_of_use_is_what_is_exact_and_in_time():
    assert TARGETS.met(stream(0.0), [1, 2, 3])
    assert not TARGETS.met(stream(0.0, ttft=1.5), [1, 2, 3])
    assert not TARGETS.met(stream(0.0, ids=(1, 3)), [1, 2, 3])
    assert not TARGETS.met(stream(0.0, status=429), [1, 2, 3])


def test_phases_and_recovery():
    streams = [stream(0.5), stream(1.5, status=429), stream(2.5, ttft=1.5), stream(3.5), stream(4.5)]
    useful = [TARGETS.met(s, [1, 2, 3]) for s in streams]
    phases = [("normal", Phase(1.0, 1)), ("over", Phase(1.0, 1)), ("after", Phase(3.0, 1))]
    normal, over, after = outcomes(streams, useful, 0.0, phases)
    assert (normal.useful, over.refused, after.late, after.useful) == (1, 1, 1, 2)
    assert normal.goodput == 0.0 and over.goodput == 1.0  # the first ended in the second phase
    assert recovery_seconds(streams, useful, 2.0) == 1.0
    assert recovery_seconds(streams, [True] * 5, 2.0) == 0.0
    assert recovery_seconds(streams, [False] * 5, 2.0) == math.inf
