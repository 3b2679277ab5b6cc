"""The engine as a process: inbox -> plan -> submit -> poll -> commit -> one message out.

Started by EngineClient as `python -m shoal.serve.engine_process ADDRESS [RECORDING]` with its EngineConfig as JSON on
the first line of standard input. Standard input stays open as long as the parent lives: at its end this process exits,
whatever it is doing, so that nothing outlives a front that was killed.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import BinaryIO

import msgspec
import zmq

from shoal.core.config import EngineConfig, SchedulerConfig
from shoal.core.engine_core import EngineCore
from shoal.core.expert_load import ExpertLoad, merged
from shoal.core.replay import RecordingCore
from shoal.core.start_report import Phase, StartProgress
from shoal.core.types import Output, Rejected, StepPlan, StepResult, WorkerFailure
from shoal.engine.child import bind_to_parent, first_line, plain, process_age
from shoal.engine.executor import open_executor
from shoal.serve.messages import (
    HEARTBEAT_SECONDS,
    Abort,
    Add,
    EngineInfo,
    Started,
    StartFailed,
    Starting,
    Step,
    encode,
    to_engine,
)
from shoal.serve.warm_spares import WarmSpares, require_possible_spares


class WorkerLost(Exception):
    """The worker failed and cannot be replaced: the engine ends. The message is for the user."""


class EngineLoop:
    def __init__(self, config: EngineConfig, socket: zmq.Socket[bytes], recording: BinaryIO | None) -> None:
        self._config = config
        self._socket = socket
        require_possible_spares(config)
        self._executor = open_executor(config)
        imported = Phase("engine", "import", process_age())  # one rank's executor brings torch
        info = self._executor.start(self._report_start)
        # A worker that is made anew must be as large as the scheduler thinks, however much memory is free by then.
        self._config = msgspec.structs.replace(config, kv_cache_bytes=info.rank_kv_bytes, max_len=info.max_len)
        self._num_blocks = info.num_blocks
        self._num_experts = 0 if info.spec.moe is None else info.spec.moe.num_experts
        self._experts_due = time.monotonic()
        scheduler = SchedulerConfig(
            num_blocks=info.num_blocks,
            max_len=info.max_len,
            vocab_size=info.spec.vocab_size,
            block_size=config.block_tokens,
            max_sequences=config.max_sequences,
            max_batch_tokens=config.max_batch_tokens,
            depth=max(config.depth, config.layout.pp),  # every stage has a batch of its own
            stages=config.layout.pp,
            prefix_caching=config.prefix_caching,
        )
        self._core: EngineCore | RecordingCore = (
            EngineCore(scheduler) if recording is None else RecordingCore(scheduler, recording.write)
        )
        self._plans: deque[StepPlan] = deque()
        self._outputs: list[Output] = []
        self._rejected: list[Rejected] = []
        self._progress_at = time.monotonic()
        self._send(
            Started(
                EngineInfo(
                    spec=info.spec,
                    num_blocks=info.num_blocks,
                    block_size=config.block_tokens,
                    max_len=info.max_len,
                    weight_bytes=info.weight_bytes,
                    kv_bytes=info.kv_bytes,
                    device=info.device,
                    ops=info.ops,
                    attention=info.attention,
                    dtype=info.dtype,
                    start=info.start.inside([imported], [], process_age()),
                ),
                self._core.load(),
            )
        )
        self._spares = WarmSpares(self._config, info.num_blocks)

    def run(self) -> None:
        """Until told to stop. Nothing of the engine is left then, however it ends."""
        try:
            while self._drain_inbox():
                self._fill_pipeline()
                if self._plans:
                    self._finish_oldest()
                self._send_step()
        finally:
            self._executor.stop()
            self._spares.close()

    def _report_start(self, progress: StartProgress) -> None:
        self._send(Starting(progress))

    def _send(self, message: msgspec.Struct) -> None:
        self._socket.send(encode(message))

    def _drain_inbox(self) -> bool:
        """Take in what has come; wait for something if there is nothing else to do. False to stop."""
        idle = not self._core.has_work()
        if idle:
            self._progress_at = time.monotonic()
        wait_ms = int(HEARTBEAT_SECONDS * 1000) if idle else 0
        while self._socket.poll(wait_ms):
            wait_ms = 0
            message = to_engine.decode(self._socket.recv())
            now = time.monotonic()
            if isinstance(message, Add):
                rejected = self._core.add(message.request, now)
                if rejected is not None:
                    self._rejected.append(rejected)
            elif isinstance(message, Abort):
                self._core.abort(message.request_id, now, message.index)
            else:
                return False
        if idle and (failure := self._executor.failure()) is not None:
            # After the inbox: a request that has just come waits for the new workers, and is not sent to the lost ones.
            self._outputs += self._core.fail(failure, time.monotonic())
            self._rebuild(failure)
        return True

    def _fill_pipeline(self) -> None:
        while (plan := self._core.plan(time.monotonic())) is not None:
            self._executor.submit(plan)
            self._plans.append(plan)
        self._outputs += self._core.take_outputs()

    def _finish_oldest(self) -> None:
        result: StepResult | WorkerFailure | None = None
        while result is None:
            result = self._executor.poll(HEARTBEAT_SECONDS)
        plan = self._plans.popleft()
        self._outputs += self._core.commit(plan.plan_id, result, time.monotonic())
        if isinstance(result, WorkerFailure):
            self._rebuild(result.message)
        self._progress_at = time.monotonic()
        if self._config.check:
            self._core.check()

    def _rebuild(self, failure: str) -> None:
        """What ran has ended with an error; what waits goes on with new workers."""
        self._plans.clear()
        self._send_step()
        self._executor.stop()
        spare = self._spares.take()
        then = "starting new workers" if spare is None else "a warm spare takes over"
        print(f"shoal engine: {failure}; {then}", file=sys.stderr, flush=True)
        if spare is not None:
            self._executor = spare
            return
        self._executor = open_executor(self._config)
        try:
            num_blocks = self._executor.start().num_blocks
        except Exception as error:
            raise WorkerLost(f"no new worker could be started: {plain(error)}") from error
        if num_blocks < self._num_blocks:
            raise WorkerLost(f"the new worker has {num_blocks} KV blocks, the scheduler {self._num_blocks}")

    def _send_step(self) -> None:
        load, spares, experts = self._core.load(), self._spares.num_ready, self._expert_load()
        self._send(Step(self._outputs, self._rejected, load, self._progress_at, spares, experts))
        self._outputs, self._rejected = [], []

    def _expert_load(self) -> ExpertLoad | None:
        """What experts have computed; None less than half a heartbeat after the last, and of other models."""
        now = time.monotonic()
        if not self._num_experts or now < self._experts_due:
            return None
        self._experts_due = now + HEARTBEAT_SECONDS / 2
        counts = self._executor.expert_rows()
        return merged(counts, self._num_experts, self._config.layout.ep) if counts else None


def main(arguments: list[str]) -> int:
    line = first_line()
    bind_to_parent()
    if not line:
        return 1  # the parent died before it could say what to run
    config = msgspec.json.decode(line, type=EngineConfig)
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.set_hwm(0)  # the front reads all the time; a limit would only turn its pause into a deadlock
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(arguments[0])
    recording = open(arguments[1], "wb", buffering=1 << 16) if len(arguments) > 1 else None  # noqa: SIM115
    try:
        try:
            loop = EngineLoop(config, socket, recording)
        except Exception as error:
            socket.send(encode(StartFailed(plain(error))))
            return 1
        try:
            loop.run()
        except WorkerLost as error:
            print(f"shoal engine: {error}", file=sys.stderr, flush=True)
            return 1
        return 0
    finally:
        if recording is not None:
            recording.close()
        socket.close()
        context.term()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
