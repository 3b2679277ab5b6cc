"""Statuses of fleets for whatever shows or exports them: every state, nothing at all, one that is short."""

from __future__ import annotations

import time
from typing import get_args

import msgspec

from shoal.core.fleet_types import (
    EndpointState,
    EndpointStatus,
    FleetEvent,
    FleetStatus,
    ModelStatus,
    Percentiles,
    SpareCapacity,
)

STATES: tuple[EndpointState, ...] = get_args(EndpointState)
REASONS: dict[EndpointState, str] = {
    "starting": "loading weights, 62%",
    "suspect": "no step for 2.4 s with 7 requests",
    "fenced": "no step for 5.1 s; its 7 requests went on elsewhere",
    "draining": "asked to by shoal fleet drain",
    "down": "process ended by signal 9; restart in 4 s",
}


def endpoint(name: str, state: EndpointState = "ready", **fields: object) -> EndpointStatus:
    busy = state in ("ready", "suspect", "draining")
    known = EndpointStatus(
        name=name,
        kind="shoal",
        address="pid 4711",
        state=state,
        reason=REASONS.get(state),
        layout="tp2",
        dtype="bfloat16",
        epoch=3,
        restarts=1 if state in ("down", "fenced") else 0,
        requests=7 if busy else 0,
        tokens=8123 if busy else 0,
        num_running=6 if busy else None,
        num_waiting=1 if busy else None,
        kv_usage=0.43 if busy else None,
        step_age=2.4 if state == "suspect" else 0.02 if busy else None,
        median_step=0.021,
        prefill_speed=5230.0 if busy else None,
        decode_seconds=0.021 if busy else None,
        breaker="open" if state == "down" else "closed",
        completed=1290,
        failures=2 if state == "down" else 0,
    )
    return msgspec.structs.replace(known, **fields)


def model(name: str, endpoints: list[EndpointStatus], **fields: object) -> ModelStatus:
    known = ModelStatus(
        name=name,
        policy="predicted",
        endpoints=endpoints,
        running=sum(e.requests for e in endpoints),
        waiting=2,
        waiting_tokens=911,
        n_plus_one=SpareCapacity(ok=True, largest="a-0", load=310.0, capacity=500.0),
        ttft=Percentiles(p50=0.084, p90=0.21, p99=0.64, count=1200),
        itl=Percentiles(p50=0.021, p90=0.034, p99=0.092, count=1180),
        e2e=Percentiles(p50=1.9, p90=4.2, p99=11.0, count=1180),
        accepted=5231,
        completed=5201,
        failed=0,
        refused=12,
        migrations=18,
        retries=4,
        hedges=1,
        degradations=0,
        generated_tokens=812_331,
        tokens_per_second=312.4,
    )
    return msgspec.structs.replace(known, **fields)


def fleet(models: list[ModelStatus], **fields: object) -> FleetStatus:
    now = time.time()
    events = [
        FleetEvent(time=now - 300, kind="added", message="small-1 was added"),
        FleetEvent(time=now - 42, kind="endpoint_lost", message="small-5: process ended by signal 9"),
        FleetEvent(time=now - 41.9, kind="migrated", message="7 requests went on at small-0 after 0.31 s"),
    ]
    known = FleetStatus(
        version="0.4.0", uptime=93_784.0, draining=False, models=models, events=events, audit="ok", journal="ok"
    )
    return msgspec.structs.replace(known, **fields)


def every_state() -> FleetStatus:
    endpoints = [endpoint(f"small-{i}", state) for i, state in enumerate(("ready", *STATES))]
    openai = endpoint("big-0", kind="openai", address="http://127.0.0.1:8001", layout="", dtype="", kv_usage=0.93)
    return fleet([model("smollm2-135m", endpoints), model("llama-70b", [openai, endpoint("big-1", spare=True)])])


def empty() -> FleetStatus:
    return fleet([], events=[], audit="off", journal="off")


def nothing_known() -> FleetStatus:
    """As in the first second: endpoints that have reported nothing yet."""
    bare = EndpointStatus(name="new-0", kind="openai", address="http://127.0.0.1:8001", state="starting")
    return fleet([ModelStatus(name="new", policy="least_tokens", endpoints=[bare])], events=[])


def short_and_degraded() -> FleetStatus:
    short = SpareCapacity(ok=False, short_by=140.0, largest="big-0", load=390.0, capacity=250.0)
    big = model(
        "llama-70b",
        [endpoint("big-0"), endpoint("big-1", "down")],
        served_by="smollm2-135m",
        n_plus_one=short,
        degradations=31,
        failed=1,
    )
    return fleet([big], audit="the log was cut off after entry 1201", draining=True)
