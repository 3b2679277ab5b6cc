from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from shoal.plan.diagnose.fleet import imbalance, part_of
from shoal.plan.diagnose.reading import Part, read
from tests.plan.diagnose.expositions import recorded, snapshot


def part(name: str, running: float = 8, waiting: float = 0, itl: float | None = None) -> Part:
    return Part(name, running, waiting, 0.3, itl)


def test_even_replicas_are_even() -> None:
    assert imbalance([part("a"), part("b", running=9)]).state == "absent"


def test_load_that_differs_without_a_queue_harms_nobody() -> None:
    found = imbalance([part("a"), part("b", running=1)])
    assert found.state == "absent"
    assert "none has a queue" in found.summary


def test_a_queue_beside_an_idle_replica_is_found() -> None:
    found = imbalance([part("a", waiting=20), part("b", running=1), part("c")])
    assert (found.state, found.certainty) == ("present", "shown")
    assert found.summary == "a has a queue while b has room"
    assert "predicted_completion" in found.try_first[0].why


def test_a_slow_replica_is_found_only_at_no_larger_a_batch() -> None:
    found = imbalance([part("a", itl=0.02), part("b", itl=0.05), part("c", itl=0.02)])
    assert found.state == "present"
    assert found.summary == "b is slower than the others"
    assert imbalance([part("a", itl=0.02), part("b", running=16, itl=0.05)]).state == "absent"


@given(st.lists(st.tuples(st.floats(0, 64), st.floats(0, 64)), min_size=2, max_size=5), st.floats(0, 100))
def test_a_longer_queue_at_the_busiest_never_makes_them_even(loads: list[tuple[float, float]], more: float) -> None:
    parts = [part(str(number), *load) for number, load in enumerate(loads)]
    busiest = max(range(len(parts)), key=lambda at: parts[at].running + parts[at].waiting)
    longer = list(parts)
    longer[busiest] = msgspec.structs.replace(parts[busiest], waiting=parts[busiest].waiting + more)
    assert imbalance(parts).state == "absent" or imbalance(longer).state == "present"


def test_a_target_is_a_replica_if_it_says_what_it_has_to_do() -> None:
    found = part_of("a", read([recorded("memory-after")]))
    assert found is not None
    assert found.waiting > found.running > 0
    assert part_of("a", read([snapshot("vllm:kv_cache_usage_perc 0.3\n")])) is None
