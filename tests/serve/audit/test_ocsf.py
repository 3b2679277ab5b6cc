"""Exported events have what OCSF requires of their class, and nothing of a record is lost on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from shoal.serve.audit import events as catalogue
from shoal.serve.audit.chain import Head, chains
from shoal.serve.audit.events import Event
from shoal.serve.audit.export import export_lines
from shoal.serve.audit.merkle import leaf_hash
from shoal.serve.audit.note import AuditError
from shoal.serve.audit.ocsf import to_ocsf
from shoal.serve.audit.verify import verify_directory
from tests.serve.audit.logs import completed, lines_of, open_log

BASE = {"activity_id", "category_uid", "class_uid", "metadata", "severity_id", "time", "type_uid"}
REQUIRED = {
    6003: BASE | {"actor", "api", "src_endpoint"},
    3002: BASE | {"user", "service"},
    6002: BASE | {"app"},
}
EXAMPLES: list[Event] = [
    catalogue.RequestAccepted(model="m", request_id="r", tenant="t", key_id="k", address="10.0.0.7"),
    completed(1, route="/v1/chat/completions", endpoints=["a"], weights_digest="ab", duration_ms=7, key_id="k"),
    catalogue.RequestCompleted(model="m", status=503, refusal="no endpoint is ready"),
    catalogue.LimitHit(limit="tokens_per_minute", status=429, tenant="t", retry_after_ms=100),
    catalogue.AdminAction(action="endpoint.remove", target="a", status=200, key_id="k"),
    catalogue.AuthenticationFailed(reason="unknown", status=401, route="/v1/models", address="::1"),
    catalogue.EndpointLost(endpoint="a", reason="killed", requests=3),
    catalogue.EndpointRestored(endpoint="a", outage_ms=3),
    catalogue.AuditGap(reason="disk full", lost=3),
    catalogue.LogStarted(version="1", content="digest", fail_closed=False),
    catalogue.LogStopped(),
]


def exported(event: object) -> dict[str, Any]:
    line = Head().line(1_763_736_339_123_456_789, msgspec.json.encode(event)).rstrip(b"\n")
    mapped = to_ocsf("chain-1", line)
    assert leaf_hash(mapped["raw_data"].encode()) == leaf_hash(line)
    return json.loads(msgspec.json.encode(mapped))  # type: ignore[no-any-return]


def test_the_examples_are_the_whole_catalogue() -> None:
    assert {type(event) for event in EXAMPLES} == set(get_args(Event))


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: type(event).__name__)
def test_what_the_schema_requires(event: Event) -> None:
    mapped = exported(event)
    assert mapped.keys() >= REQUIRED[mapped["class_uid"]]
    assert mapped["type_uid"] == mapped["class_uid"] * 100 + mapped["activity_id"]
    assert mapped["category_uid"] == mapped["class_uid"] // 1000
    assert mapped["time"] == 1_763_736_339_123
    assert mapped["metadata"]["version"] == "1.3.0"
    assert {"name", "vendor_name"} <= mapped["metadata"]["product"].keys()
    for at_least_one in (mapped.get("src_endpoint"), mapped.get("user"), mapped.get("actor")):
        assert at_least_one is None or at_least_one


def test_a_request() -> None:
    mapped = exported(EXAMPLES[1])
    assert (mapped["class_uid"], mapped["activity_name"], mapped["status"]) == (6003, "Create", "Success")
    assert mapped["api"]["operation"] == "/v1/chat/completions"
    assert mapped["actor"]["user"] == {"uid": "k", "account": {"name": "acme"}}
    assert mapped["resources"] == [{"type": "model", "name": "m", "uid": "ab"}, {"type": "endpoint", "name": "a"}]
    assert mapped["metadata"]["tenant_uid"] == "acme"
    assert exported(EXAMPLES[0])["src_endpoint"] == {"ip": "10.0.0.7"}


def test_a_refusal_and_an_administrator() -> None:
    refused = exported(EXAMPLES[2])
    assert (refused["status_id"], refused["status_code"], refused["status_detail"]) == (
        2,
        "503",
        "no endpoint is ready",
    )
    assert refused["src_endpoint"] == {"name": "unknown"}
    removed = exported(EXAMPLES[4])
    assert (removed["activity_name"], removed["resources"]) == ("Delete", [{"type": "target", "name": "a"}])


def test_authentication_and_gaps() -> None:
    failed = exported(EXAMPLES[5])
    assert (failed["class_uid"], failed["status"], failed["status_detail"]) == (3002, "Failure", "unknown")
    gap = exported(EXAMPLES[8])
    assert (gap["class_uid"], gap["severity"], gap["unmapped"]["lost"]) == (6002, "High", 3)


def test_a_kind_of_a_later_version() -> None:
    mapped = exported({"kind": "moon_phase", "phase": "full"})
    assert (mapped["class_uid"], mapped["activity_name"]) == (6002, "moon_phase")
    assert mapped["unmapped"] == {"phase": "full"}


def test_export_between_two_moments_and_over_chains(tmp_path: Path) -> None:
    logs = [open_log(tmp_path), open_log(tmp_path)]
    for number in range(10):
        logs[number % 2].record(completed(number))
    assert all([log.close() for log in logs])
    everything = [json.loads(line) for line in export_lines(tmp_path, since=None, until=None, form="jsonl")]
    assert len(everything) == 14
    times = [record["time"] for record in everything]
    assert times == sorted(times) and {record["chain"] for record in everything} == {log.chain.name for log in logs}
    first, last = times[3], times[9]
    some = [json.loads(line) for line in export_lines(tmp_path, since=first, until=last, form="ocsf")]
    assert [event["metadata"]["original_time"] for event in some] == [str(time) for time in times[3:9]]


def test_an_export_of_what_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="no audit log here"):
        list(export_lines(tmp_path, since=None, until=None, form="jsonl"))
    log = open_log(tmp_path)
    log.close()
    path = next(chains(tmp_path)[0].glob("*.jsonl"))
    path.write_bytes(path.read_bytes() + b"nonsense\n")
    with pytest.raises(AuditError, match="line 3 is no record: see `shoal audit verify"):
        list(export_lines(tmp_path, since=None, until=None, form="jsonl"))
    assert not verify_directory(tmp_path).ok and len(lines_of(tmp_path)) == 3
