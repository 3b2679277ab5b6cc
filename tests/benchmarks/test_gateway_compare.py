"""What is made of the comparison's samples, against values worked out by hand."""

from gateway.compare import Results, Sample


def sample(p99, *, valid=True, completed=10):
    figures = {"gap_p99": p99, "valid": valid, "offered": 10, "completed": completed}
    return Sample(figures, 0.5, 0.0)


def results(direct, router):
    """Of one round: a sample for each rate."""
    rates = [100.0, 200.0, 400.0]
    made = Results([], {}, rates)
    for name, samples in (("direct", direct), ("router", router)):
        made.samples |= {(name, rate): {0: one} for rate, one in zip(rates, samples, strict=False)}
    return made


def test_what_a_router_adds_is_beside_the_direct_way_of_the_same_round():
    made = results([sample(0.02)], [sample(0.05)])
    assert {n: round(added, 6) for n, added in made.added("router", 100.0, "gap_p99").items()} == {0: 0.03}
    assert results([sample(0.02, valid=False)], [sample(0.05)]).added("router", 100.0, "gap_p99") == {}


def test_what_a_router_carries():
    direct = [sample(0.02)] * 3
    slow, failing, disturbed = sample(0.05), sample(0.02, completed=9), sample(0.02, valid=False)
    good = sample(0.025)

    def carries(router, direct=direct):
        return results(direct, router).carries("router", ["gap_p99"])

    assert carries([good, good, good]) == [400.0]
    assert carries([good, slow, good]) == [100.0]
    assert carries([good, good, failing]) == [200.0]
    assert carries([slow]) == [0.0]
    assert carries([good, disturbed]) == []
    assert carries([good, good], [*direct[:2], disturbed]) == [200.0]
    assert carries([good], [disturbed]) == []
