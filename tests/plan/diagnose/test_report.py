from __future__ import annotations

import msgspec

from shoal.plan.diagnose.findings import Action, Targets
from shoal.plan.diagnose.reading import read
from shoal.plan.diagnose.report import Report, flags_of, headline, lines, report, window_text
from tests.plan.diagnose.expositions import recorded, snapshot, vllm


def test_healthy_says_so_and_names_what_it_read() -> None:
    found = report({"a": read([recorded("light")])}, Targets())
    assert found.verdict == "healthy"
    assert headline(found.targets[0]).startswith("healthy")
    assert "lifetime" in window_text(found.targets[0])
    assert found.targets[0].metrics["kv_usage"] == "vllm:kv_cache_usage_perc"


def test_what_is_missing_is_named() -> None:
    found = report({"a": read([snapshot("vllm:num_requests_running 3\n")])}, Targets())
    assert found.verdict == "cannot tell"
    for word in ("KV cache", "histogram", "waiting"):
        assert word in headline(found.targets[0])
    found = report({"a": read([snapshot("node_load1 3\n")])}, Targets())
    assert (found.verdict, found.targets) == ("cannot tell", ())
    assert found.notes == ("a has metrics of no engine that is known here",)


def test_a_sign_outweighs_what_is_missing() -> None:
    text = "vllm:num_requests_running 3\nvllm:num_requests_waiting 9\nvllm:kv_cache_usage_perc 0.99\n"
    found = report({"a": read([snapshot(text)])}, Targets())
    assert found.verdict == "found"
    assert headline(found.targets[0]) == "1 does not fit"


def test_several_targets_are_a_fleet_and_an_exporter_is_none_of_it() -> None:
    readings = {
        "a": read([snapshot(vllm(running=8, waiting=30, kv=0.3))]),
        "b": read([snapshot(vllm(running=1))]),
        "gpu": read([snapshot("DCGM_FI_PROF_SM_ACTIVE 0.3\n")]),
    }
    found = report(readings, Targets())
    assert [target.source for target in found.targets] == ["a", "b"]
    assert [finding.state for finding in found.fleet] == ["present"]
    assert found.targets[0].metrics["sm_active"] == "DCGM_FI_PROF_SM_ACTIVE"
    assert any("means over all engines" in note for note in found.notes)
    alone = report({name: readings[name] for name in ("b", "gpu")}, Targets())
    assert (alone.fleet, alone.notes) == ((), ())


def test_flags_are_those_of_the_engine_and_of_shoal() -> None:
    action = Action("why", "max_sequences", "32")
    assert flags_of(action, "sglang") == ["SGLang: --max-running-requests 32", "shoal: --max-num-seqs 32"]
    assert flags_of(action, "shoal") == ["shoal: --max-num-seqs 32"]
    assert flags_of(Action("why"), "vllm") == []


def test_levers_that_an_engine_has_not_are_not_named() -> None:
    engines = {
        "sglang": "sglang:num_running_reqs {}\nsglang:num_queue_reqs 40\nsglang:token_usage 0.2\n",
        "vllm": "vllm:num_requests_running {}\nvllm:num_requests_waiting 40\nvllm:kv_cache_usage_perc 0.2\n",
    }
    for engine, text in engines.items():
        reading = read([snapshot(text.format(running)) for running in (4, 9)])
        finding = report({"a": reading}, Targets()).targets[0].findings[2]
        assert finding.state == "present"
        assert ("admission" in [action.lever for action in finding.try_first]) == (engine == "sglang")


def test_a_sign_is_printed_with_evidence_what_to_try_and_what_would_disprove_it() -> None:
    target = report({"a": read([recorded("memory-after")])}, Targets()).targets[0]
    kinds = [kind for kind, _ in lines(target.findings[0], target.engine)]
    assert kinds[0] == "title"
    assert kinds[-1] == "against"
    assert {"evidence", "try"} <= set(kinds)
    assert [kind for kind, _ in lines(target.findings[2], target.engine)].count("try") == 0


def test_it_survives_json() -> None:
    found = report({"a": read([recorded("memory-after")])}, Targets())
    assert msgspec.json.decode(msgspec.json.encode(found), type=Report) == found
