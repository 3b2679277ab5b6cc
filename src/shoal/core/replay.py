"""A run of the core as a file: every call with its arguments and its time, and every plan that came of it.

Replayed into a fresh core, the calls must give the same plans. A bug report is such a file; so is a regression test.
The file has one JSON object a line, the configuration first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from shoal.core.config import SchedulerConfig
from shoal.core.engine_core import EngineCore
from shoal.core.types import EngineLoad, Output, Rejected, Request, StepPlan, StepResult, WorkerFailure


class ConfigRecord(msgspec.Struct, frozen=True, tag="config"):
    config: SchedulerConfig


class AddRecord(msgspec.Struct, frozen=True, tag="add"):
    request: Request
    now: float


class AbortRecord(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str
    now: float
    index: int | None


class PlanRecord(msgspec.Struct, frozen=True, tag="plan"):
    now: float
    plan: StepPlan | None
    """What the recorded run planned."""


class CommitRecord(msgspec.Struct, frozen=True, tag="commit"):
    plan_id: int
    result: StepResult | WorkerFailure
    now: float


class FailRecord(msgspec.Struct, frozen=True, tag="fail"):
    message: str
    now: float


Record = ConfigRecord | FailRecord | AddRecord | AbortRecord | PlanRecord | CommitRecord

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def encode(record: Record) -> bytes:
    """One line of a recording, newline included."""
    return _encoder.encode(record) + b"\n"


def decode_all(lines: Iterable[bytes]) -> Iterable[Record]:
    """Records of a recording. Raises msgspec.ValidationError or DecodeError for what is not one."""
    return (_decoder.decode(line) for line in lines if line.strip())


class RecordingCore:
    """An EngineCore that hands each call to `write` as it is made. Same methods, same results."""

    def __init__(self, config: SchedulerConfig, write: Callable[[bytes], object]) -> None:
        self.core = EngineCore(config)
        self.config = config
        self._write = write
        write(encode(ConfigRecord(config)))

    def add(self, request: Request, now: float) -> Rejected | None:
        self._write(encode(AddRecord(request, now)))
        return self.core.add(request, now)

    def abort(self, request_id: str, now: float, index: int | None = None) -> None:
        self._write(encode(AbortRecord(request_id, now, index)))
        self.core.abort(request_id, now, index)

    def plan(self, now: float) -> StepPlan | None:
        plan = self.core.plan(now)
        self._write(encode(PlanRecord(now, plan)))
        return plan

    def commit(self, plan_id: int, result: StepResult | WorkerFailure, now: float) -> list[Output]:
        self._write(encode(CommitRecord(plan_id, result, now)))
        return self.core.commit(plan_id, result, now)

    def fail(self, message: str, now: float) -> list[Output]:
        self._write(encode(FailRecord(message, now)))
        return self.core.fail(message, now)

    def take_outputs(self) -> list[Output]:
        return self.core.take_outputs()

    @property
    def in_flight(self) -> int:
        return self.core.in_flight

    def has_work(self) -> bool:
        return self.core.has_work()

    def load(self) -> EngineLoad:
        return self.core.load()

    def check(self) -> None:
        self.core.check()


class Divergence(Exception):
    """A replay planned something else than the recorded run did."""


def replay(records: Iterable[Record], *, check: bool = True) -> int:
    """Run a recording through a fresh core; `check` verifies the invariants after every call. Returns the plans made.

    Raises Divergence at the first plan that differs, ValueError if the recording does not start with its configuration.
    """
    core: EngineCore | None = None
    num_plans = 0
    for number, record in enumerate(records, start=1):
        if isinstance(record, ConfigRecord):
            core = EngineCore(record.config)
            continue
        if core is None:
            raise ValueError("the recording does not start with a configuration")
        if isinstance(record, AddRecord):
            core.add(record.request, record.now)
        elif isinstance(record, AbortRecord):
            core.abort(record.request_id, record.now, record.index)
        elif isinstance(record, CommitRecord):
            core.commit(record.plan_id, record.result, record.now)
        elif isinstance(record, FailRecord):
            core.fail(record.message, record.now)
        else:
            plan = core.plan(record.now)
            if plan != record.plan:
                raise Divergence(f"record {number}: recorded {record.plan}, replayed {plan}")
            num_plans += plan is not None
        core.take_outputs()
        if check:
            core.check()
    return num_plans
