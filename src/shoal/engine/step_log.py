"""Step log: what every rank did in every step, and when the driver sent it the plan, for whoever asks where time goes.

A directory with `driver.jsonl` and a `rank-N.jsonl` for each rank, a line a step, written as steps end. Seconds are of
the monotonic clock, which the processes of one host share; those of several hosts do not compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from shoal.core.types import StepPlan

Entry = TypeVar("Entry", bound=msgspec.Struct)


class RankStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    plan_id: int
    sequences: int
    tokens: int
    began: float
    """Second at which the rank had the plan and started on it."""
    ended: float
    waited: float
    """Seconds between the two in which it waited for the stage before it."""


class Submitted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    plan_id: int
    began: float
    """Second at which the driver had the plan; it encodes it and sends it to every rank."""
    ended: float


class StepLog:
    """One writer's file. Made anew by the first step of each engine that runs: a warm spare writes nothing."""

    def __init__(self, directory: str, writer: str) -> None:
        self._path = Path(directory) / f"{writer}.jsonl"
        self._file: BinaryIO | None = None
        self._encoder = msgspec.json.Encoder()

    def rank_step(self, plan: StepPlan, began: float, ended: float, waited: float) -> None:
        if plan.rows:
            tokens = sum(row.num_tokens for row in plan.rows)
            self._write(RankStep(plan.plan_id, len(plan.rows), tokens, began, ended, waited))

    def submitted(self, plan: StepPlan, began: float, ended: float) -> None:
        self._write(Submitted(plan.plan_id, began, ended))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, entry: msgspec.Struct) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb", buffering=0)
        self._file.write(self._encoder.encode(entry) + b"\n")


def read_ranks(directory: Path) -> dict[int, list[RankStep]]:
    """Every rank's steps in their order. Raises FileNotFoundError if the directory has no step log."""
    files = {int(path.stem.removeprefix("rank-")): path for path in directory.glob("rank-*.jsonl")}
    if not files:
        raise FileNotFoundError(f"{directory} holds no step log: no rank-N.jsonl")
    return {rank: list(_read(files[rank], RankStep)) for rank in sorted(files)}


def read_submitted(directory: Path) -> list[Submitted]:
    return list(_read(directory / "driver.jsonl", Submitted))


def busy_share(steps: list[RankStep], least_sequences: int = 1) -> float | None:
    """Of the time that a rank was in steady decode, what it computed in; None if it never was.

    Steady decode is a step of at least so many sequences, a token each, behind another such step; its time runs from
    the end of the one before to its own end.
    """
    busy = total = 0.0
    for before, step in zip(steps, steps[1:], strict=False):
        if all(s.tokens == s.sequences >= least_sequences for s in (before, step)):
            total += step.ended - before.ended
            busy += step.ended - step.began - step.waited
    return busy / total if total else None


def broadcast_seconds(submitted: list[Submitted], ranks: dict[int, list[RankStep]], sequences: int) -> list[float]:
    """From the driver's having a plan of so many sequences to the last rank's starting on it, step by step.

    Only with depth 1 do the ranks wait for the plan, so that this is the time of the broadcast.
    """
    sent = {entry.plan_id: entry.began for entry in submitted}
    last: dict[int, float] = {}
    for steps in ranks.values():
        for step in steps:
            if step.sequences == step.tokens == sequences and step.plan_id in sent:
                last[step.plan_id] = max(last.get(step.plan_id, 0.0), step.began)
    return [began - sent[plan_id] for plan_id, began in last.items()]


def _read(path: Path, kind: type[Entry]) -> Iterator[Entry]:
    decoder = msgspec.json.Decoder(kind)
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):  # the last may be half written
                yield decoder.decode(line)
