"""Records as events of the Open Cybersecurity Schema Framework, for SIEMs: one JSON object each.

| kind | class |
|---|---|
| request_accepted, request_completed, limit_hit, admin_action | API Activity (6003) |
| authentication_failed | Authentication (3002) |
| endpoint_lost, endpoint_restored, audit_gap, log_started, log_stopped | Application Lifecycle (6002) |

What has no attribute there is in `unmapped`, under its name here; `raw_data` is the record's line, from which its leaf
hash follows.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import msgspec

from shoal import __version__

OCSF_VERSION = "1.3.0"
_API, _AUTHENTICATION, _LIFECYCLE = 6003, 3002, 6002
_CLASSES = {
    _API: ("API Activity", 6, "Application Activity"),
    _AUTHENTICATION: ("Authentication", 3, "Identity & Access Management"),
    _LIFECYCLE: ("Application Lifecycle", 6, "Application Activity"),
}
_SEVERITIES = {1: "Informational", 2: "Low", 3: "Medium", 4: "High"}
_ACTIONS = {
    "create": (1, "Create"),
    "add": (1, "Create"),
    "status": (2, "Read"),
    "list": (2, "Read"),
    "drain": (3, "Update"),
    "rotate": (3, "Update"),
    "reload": (3, "Update"),
    "remove": (4, "Delete"),
    "revoke": (4, "Delete"),
}
_PRODUCT = {"name": "shoal", "vendor_name": "shoal", "version": __version__}
_ANYONE = "anonymous"


class _AnyRecord(msgspec.Struct):
    """Of any version: an export shows kinds that it does not know, too."""

    seq: int
    time: int
    event: dict[str, Any]


_decode = msgspec.json.Decoder(_AnyRecord).decode


def to_ocsf(chain: str, line: bytes) -> dict[str, Any]:
    """Raises ValueError where the line is no record."""
    record = _decode(line)
    event = dict(record.event)
    kind = str(event.pop("kind", "unknown"))
    class_uid, activity, name, severity, fields = _classified(kind, event)
    class_name, category, category_name = _CLASSES[class_uid]
    caller = {"tenant_uid": event["tenant"]} if event.get("tenant") else {}
    mapped = {
        "class_uid": class_uid,
        "class_name": class_name,
        "category_uid": category,
        "category_name": category_name,
        "activity_id": activity,
        "activity_name": name,
        "type_uid": class_uid * 100 + activity,
        "type_name": f"{class_name}: {name}",
        "severity_id": severity,
        "severity": _SEVERITIES[severity],
        "time": record.time // 1_000_000,
        "metadata": {
            "version": OCSF_VERSION,
            "product": _PRODUCT,
            "uid": f"{chain}:{record.seq}",
            "log_name": chain,
            "sequence": record.seq,
            "event_code": kind,
            "original_time": str(record.time),
            **caller,
        },
        **fields,
        "raw_data": line.decode(),
    }
    rest = {key: value for key, value in event.items() if key not in _MAPPED}
    return mapped | ({"unmapped": rest} if rest else {})


_MAPPED = frozenset(["tenant", "key_id", "address", "request_id", "route", "method", "status", "duration_ms"])


def _classified(kind: str, event: dict[str, Any]) -> tuple[int, int, str, int, dict[str, Any]]:
    """Class, activity and its name, severity, attributes of the class."""
    if kind in ("request_accepted", "request_completed", "limit_hit", "admin_action"):
        return _API, *_api(kind, event)
    if kind == "authentication_failed":
        return _AUTHENTICATION, 1, "Logon", 3, _authentication(event)
    names = {"log_started": (3, "Start"), "log_stopped": (4, "Stop")}
    activity, name = names.get(kind, (99, kind))
    failed = kind in ("endpoint_lost", "audit_gap")
    severity = (4 if event.get("lost") else 3) if failed else 1
    fields = {"app": _PRODUCT, **_status(failed, str(event.get("reason", "")))}
    return _LIFECYCLE, activity, name, severity, fields


def _api(kind: str, event: dict[str, Any]) -> tuple[int, str, int, dict[str, Any]]:
    status = int(event.get("status", 0))
    operation = str(event.get("action") or event.get("route") or kind)
    activity, name = (99, "Other") if kind in ("request_accepted", "limit_hit") else (1, "Create")
    if kind == "admin_action":
        activity, name = _ACTIONS.get(operation.rpartition(".")[2], (99, "Other"))
    failed = status >= 400
    detail = str(event.get("refusal") or event.get("limit") or event.get("detail") or "")
    response = {"response": {"code": status, **({"error": detail} if failed and detail else {})}} if status else {}
    request = {"request": {"uid": event["request_id"]}} if event.get("request_id") else {}
    fields: dict[str, Any] = {
        "actor": {"user": _user(event)},
        "api": {"operation": operation, "service": {"name": "shoal"}, **request, **response},
        "src_endpoint": _source(event),
        **(_status(failed, detail) | {"status_code": str(status)} if status else {}),
    }
    if event.get("route"):
        fields["http_request"] = {"http_method": "POST", "url": {"path": event["route"]}}
    if status:
        fields["http_response"] = {"code": status}
    if event.get("duration_ms"):
        fields["duration"] = event["duration_ms"]
    resources = _resources(event)
    if resources:
        fields["resources"] = resources
    return activity, name, 2 if failed else 1, fields


def _resources(event: dict[str, Any]) -> list[dict[str, str]]:
    """The model and the endpoints that were used, or what an administrator changed."""
    found = []
    model = event.get("served_model") or event.get("model")
    if model:
        digest = {"uid": event["weights_digest"]} if event.get("weights_digest") else {}
        found.append({"type": "model", "name": str(model), **digest})
    found += [{"type": "endpoint", "name": str(name)} for name in event.get("endpoints", [])]
    if event.get("target"):
        found.append({"type": "target", "name": str(event["target"])})
    return found


def _authentication(event: dict[str, Any]) -> dict[str, Any]:
    method = {"http_method": event["method"]} if event.get("method") else {}
    return {
        "user": _user(event),
        "service": {"name": "shoal"},
        "src_endpoint": _source(event),
        "auth_protocol_id": 99,
        "auth_protocol": "API key",
        "status_code": str(event.get("status", 401)),
        **_status(True, str(event.get("reason", ""))),
        **({"http_request": {**method, "url": {"path": event["route"]}}} if event.get("route") else {}),
    }


def _status(failed: bool, detail: str) -> dict[str, Any]:
    status: dict[str, Any] = {"status_id": 2, "status": "Failure"} if failed else {"status_id": 1, "status": "Success"}
    return status | ({"status_detail": detail} if detail else {})


def _user(event: dict[str, Any]) -> dict[str, Any]:
    account = {"account": {"name": event["tenant"]}} if event.get("tenant") else {}
    return {"uid": event.get("key_id") or _ANYONE, **account}


def _source(event: dict[str, Any]) -> dict[str, str]:
    address = str(event.get("address") or "")
    try:
        return {"ip": str(ipaddress.ip_address(address))}
    except ValueError:
        return {"name": address or "unknown"}
