"""An engine of several ranks, each a process, as one executor.

The driver has no model and brings no torch. It starts the ranks through a launcher, tells them what to load and whom
they talk to, and then sends every rank each step plan; the rank that draws sends the results back. It hears of a rank's
death from the end of its connection, and of one that hangs from its silence.
"""

from __future__ import annotations

import os
import secrets
import select
import tempfile
import time
from collections import Counter, deque
from pathlib import Path
from typing import TypeVar

import msgspec

from shoal.checkpoint.resolve import load_spec, resolve
from shoal.core.config import EngineConfig
from shoal.core.expert_load import BadExpertLoad, HeldRows, rows_of
from shoal.core.layout import Axis, require_possible
from shoal.core.model_spec import ModelSpec
from shoal.core.start_report import Laps, StartProgress, slowest
from shoal.core.types import StepPlan, StepResult, WorkerFailure
from shoal.engine.channel import ChannelClosed
from shoal.engine.executor import Progress, WorkerInfo
from shoal.engine.launch import make_launcher, shared_secret
from shoal.engine.rank_messages import (
    Allocate,
    Count,
    Counted,
    Done,
    Group,
    HoldsWeights,
    Load,
    LoadedPart,
    Measure,
    Progressed,
    RankFailed,
    Ready,
    Run,
    Stop,
    StoreGet,
    StoreReply,
    StoreSet,
    encode,
    to_driver,
)
from shoal.engine.rendezvous import LaunchError, Member, Rendezvous
from shoal.engine.step_log import StepLog

Part = TypeVar("Part", HoldsWeights, LoadedPart, Ready)

_LAST_WORDS_SECONDS = 0.3
"""After one rank's failure: others see it as a peer that does not answer, and the one that is at fault may be later."""


class ParallelExecutor:
    """Raises LayoutError where the model cannot be run in the layout of `config`, BadExpertLoad for a wrong file."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        spec = load_spec(resolve(config.model, download=False).path)
        require_possible(config.layout, spec)
        self._expert_rows = {} if config.expert_load is None else _read_expert_load(Path(config.expert_load), spec)
        self._launcher = make_launcher(config)
        self._rendezvous: Rendezvous | None = None
        self._members: list[Member] = []
        self._groups: list[Group] = []
        self._poll = select.poll()
        self._heard_at: list[float] = []
        self._watching_silence = False
        self._plans: deque[StepPlan] = deque()
        """Submitted and without a result, oldest first."""
        self._results: deque[StepResult] = deque()
        self._failure: str | None = None
        self._step_log = None if config.step_log is None else StepLog(config.step_log, "driver")
        self._counted: dict[int, list[HeldRows]] = {}
        """What each rank's experts have computed, as it last said."""
        self._store: dict[str, bytes] = {}
        self._wanted: dict[str, list[int]] = {}
        """Keys that nobody has set yet, and the ranks that wait for them."""
        self._progress = [StartProgress("starting the ranks", 0.0)] * config.layout.ranks
        """Of each rank, as far as it has said."""

    # --- start ------------------------------------------------------------------------------------------------------

    def start(self, progress: Progress | None = None) -> WorkerInfo:
        """Raises LaunchError where ranks do not come together or one cannot load its part."""
        began, laps = time.monotonic(), Laps("engine", time.monotonic())
        report = progress or (lambda progress: None)
        launch, ranks = self._config.launch, self._config.layout.ranks
        secret = shared_secret(launch)
        try:
            self._rendezvous = Rendezvous(launch.host, self._port(), secret, ranks)
            self._launcher.launch(self._rendezvous.address, secret, ranks)
            self._members = self._rendezvous.wait(launch.join_seconds, lambda: self._ended(report))
            laps.end("spawn", min(member.joined_at for member in self._members))
            laps.end("rendezvous", time.monotonic())
            self._heard_at = [time.monotonic()] * ranks
            for member in self._members:
                self._poll.register(member.channel, select.POLLIN)
            self._groups = self._make_groups()
            self._send_load()
            self._collect(HoldsWeights, report)
            self._broadcast(encode(Measure()))
            parts = self._collect(LoadedPart, report)
            remove_shared(self._groups)  # all have mapped it: nobody's end leaves any of it behind
            agreed = Allocate(min(p.num_blocks for p in parts), min(p.max_len for p in parts))
            self._broadcast(encode(agreed))
            infos = [ready.info for ready in self._collect(Ready, report)]
        except BaseException:
            self.stop()
            raise
        self._watching_silence = True
        return msgspec.structs.replace(
            infos[0],
            weight_bytes=sum(info.weight_bytes for info in infos),
            rank_weight_bytes=max(info.weight_bytes for info in infos),
            kv_bytes=sum(info.kv_bytes for info in infos),
            rank_kv_bytes=max(info.kv_bytes for info in infos),
            device=_count_alike([info.device for info in infos]),
            start=slowest([info.start for info in infos]).inside(laps.phases, [], time.monotonic() - began),
        )

    def _ended(self, report: Progress) -> str | None:
        report(_together(self._progress))
        return self._launcher.ended()

    def _port(self) -> int:
        return self._launcher.driver_port or self._config.launch.port

    def _make_groups(self) -> list[Group]:
        """Every group of more than one rank, once."""
        layout, groups = self._config.layout, {}
        directory = Path("/dev/shm") if os.path.isdir("/dev/shm") else Path(tempfile.gettempdir())
        name = f"shoal-{os.getpid()}-{secrets.token_hex(6)}"
        axes: tuple[Axis, ...] = ("tensor", "pipeline", "context")
        for axis in axes:
            for rank in range(layout.ranks):
                members = layout.group(rank, axis)
                if len(members) > 1:
                    key = (axis, *members)
                    path = str(directory / f"{name}-{axis}-{members[0]}")
                    groups[key] = Group(axis, members, self._backend(members), path)
        return list(groups.values())

    def _backend(self, ranks: list[int]) -> str:
        asked = self._config.launch.comm
        if asked != "auto":
            return asked
        if self._config.device.startswith("cuda"):
            return "nccl"
        one_host = len({self._members[rank].host for rank in ranks}) == 1
        return "shared_memory" if one_host else "gloo"

    def _send_load(self) -> None:
        on_host: Counter[str] = Counter(member.host for member in self._members)
        seen: Counter[str] = Counter()
        for member in self._members:
            own = [group for group in self._groups if member.rank in group.ranks]
            load = Load(
                config=self._config,
                local_rank=seen[member.host],
                ranks_on_host=on_host[member.host],
                groups=own,
                expert_rows=self._expert_rows,
            )
            seen[member.host] += 1
            member.channel.send(encode(load))

    def _collect(self, kind: type[Part], report: Progress) -> list[Part]:
        """One message of a kind from every rank, in the ranks' order. Raises LaunchError."""
        answers: dict[int, Part] = {}
        while len(answers) < len(self._members):
            for rank, message in self._receive(0.05):
                if isinstance(message, kind):
                    answers[rank] = message
                elif isinstance(message, RankFailed):
                    raise LaunchError(message.message)
                elif isinstance(message, Progressed):
                    self._progress[rank] = message.progress
            report(_together(self._progress))
            if self._failure is not None:
                raise LaunchError(self._failure)
        return [answers[rank] for rank in range(len(self._members))]

    # --- steps ------------------------------------------------------------------------------------------------------

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)
        if self._failure is not None:
            return
        began = time.monotonic()
        self._broadcast(encode(Run(plan)))
        if self._step_log is not None:
            self._step_log.submitted(plan, began, time.monotonic())

    def poll(self, timeout: float | None = None) -> StepResult | WorkerFailure | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._plans:
            if self._results:
                self._plans.popleft()
                return self._results.popleft()
            if self._failure is not None:
                return WorkerFailure(self._plans.popleft().plan_id, self._failure)
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left < 0:
                return None
            self._attend(0.25 if left is None else min(left, 0.25))
        return None

    def expert_rows(self) -> list[HeldRows]:
        if self._failure is None:
            self._broadcast(encode(Count()))
        return [rows for rank in sorted(self._counted) for rows in self._counted[rank]]

    def failure(self) -> str | None:
        if self._failure is None and self._watching_silence:
            self._attend(0.0)
        return self._failure

    def stop(self) -> None:
        if self._failure is None:
            self._broadcast(encode(Stop()))
            self._launcher.wait(1.0)
        self._watching_silence = False
        for member in self._members:
            member.channel.close()
        self._launcher.kill()
        remove_shared(self._groups)
        if self._rendezvous is not None:
            self._rendezvous.close()
        if self._step_log is not None:
            self._step_log.close()
            self._step_log = None
        self._members, self._groups, self._rendezvous = [], [], None
        self._plans.clear()
        self._results.clear()
        self._failure = self._failure or "the engine was stopped"

    def _broadcast(self, message: bytes) -> None:
        for member in self._members:
            try:
                member.channel.send(message)
            except ChannelClosed as error:
                self._fail(f"rank {member.rank} (process {member.pid}) is gone: {error}")

    def _attend(self, timeout: float) -> None:
        """Take in what the ranks have to say, for at most `timeout` seconds, and notice those that say nothing."""
        for rank, message in self._receive(timeout):
            self._take(rank, message)
        silence = self._config.launch.silence_seconds
        now = time.monotonic()
        for member, heard_at in zip(self._members, self._heard_at, strict=True):
            if self._watching_silence and now - heard_at > silence:
                self._fail(f"rank {member.rank} (process {member.pid}) has said nothing for {now - heard_at:.1f} s")

    def _take(self, rank: int, message: object) -> None:
        if isinstance(message, Counted):
            self._counted[rank] = message.rows
        elif isinstance(message, Done):
            if isinstance(message.result, WorkerFailure):
                self._last_words(message.result.message)
            elif self._failure is None:
                self._results.append(message.result)

    def _last_words(self, message: str) -> None:
        """A rank whose step failed may only have waited for another: give that one's end time to be known."""
        if self._failure is not None:
            return
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while self._failure is None and time.monotonic() < deadline:
            self._receive(0.05)
        self._fail(message)

    def _fail(self, message: str) -> None:
        """The first reason stands."""
        if self._failure is None:
            ended = self._launcher.ended()
            self._failure = ended or message

    def _receive(self, timeout: float) -> list[tuple[int, object]]:
        """Messages by rank. Store requests are served here; a rank that is gone becomes the failure."""
        by_descriptor = {member.channel.fileno(): member for member in self._members}
        messages: list[tuple[int, object]] = []
        for descriptor, _ in self._poll.poll(timeout * 1000):
            member = by_descriptor[descriptor]
            try:
                received = [to_driver.decode(frame) for frame in member.channel.received()]
            except (ChannelClosed, msgspec.DecodeError) as error:
                self._poll.unregister(member.channel)
                self._fail(f"rank {member.rank} (process {member.pid}) is gone: {error}")
                continue
            self._heard_at[member.rank] = time.monotonic()
            for message in received:
                if isinstance(message, StoreSet | StoreGet):
                    self._serve_store(member, message)
                else:
                    messages.append((member.rank, message))
        return messages

    def _serve_store(self, member: Member, message: StoreSet | StoreGet) -> None:
        if isinstance(message, StoreGet):
            self._wanted.setdefault(message.key, []).append(member.rank)
        else:
            self._store[message.key] = message.value
        value = self._store.get(message.key)
        if value is not None:
            for rank in self._wanted.pop(message.key, []):
                self._members[rank].channel.send(encode(StoreReply(value)))


def _read_expert_load(path: Path, spec: ModelSpec) -> dict[int, list[int]]:
    try:
        return rows_of(path.read_bytes(), spec)
    except OSError as error:
        raise BadExpertLoad(f"{path}: {error.strerror or error}") from None
    except BadExpertLoad as error:
        raise BadExpertLoad(f"{path}: {error}") from None


def remove_shared(groups: list[Group]) -> None:
    """The files' names; ranks that have mapped them keep the memory."""
    for group in groups:
        if group.backend == "shared_memory":
            for path in (group.path, group.path + ".new"):
                Path(path).unlink(missing_ok=True)


def _count_alike(names: list[str]) -> str:
    """cpu x 2."""
    return ", ".join(name if count == 1 else f"{name} x {count}" for name, count in Counter(names).items())


def _together(ranks: list[StartProgress]) -> StartProgress:
    """What the rank that is furthest behind does, and what all have read."""
    last = min(ranks, key=lambda progress: progress.fraction)
    return StartProgress(
        last.what,
        last.fraction,
        sum(progress.bytes_read for progress in ranks),
        sum(progress.bytes_total for progress in ranks),
    )
