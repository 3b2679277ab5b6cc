"""A running engine process, as asyncio code sees it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable

import msgspec
import zmq
import zmq.asyncio

from shoal.core.config import EngineConfig
from shoal.core.engine_core import sequences_of
from shoal.core.expert_load import ExpertLoad
from shoal.core.fleet_types import EndpointFailure
from shoal.core.start_report import StartProgress
from shoal.core.types import EngineLoad, Output, Rejected, Request
from shoal.serve.endpoint import Attempt, EndpointStartError
from shoal.serve.messages import Abort, Add, EngineInfo, Started, StartFailed, Starting, Step, Stop, encode, from_engine

Progress = Callable[[StartProgress], None]


class EngineStartError(EndpointStartError):
    """The engine did not start. The message is for the user."""


class EngineLost(Exception):
    """The engine process ended while it was needed."""


class RequestRejected(Exception):
    """The engine did not accept a request."""

    def __init__(self, rejected: Rejected) -> None:
        super().__init__(rejected.reason)
        self.rejected = rejected


class _Running:
    """An attempt under way and how many of its sequences have not ended."""

    __slots__ = ("attempt", "left")

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self.left = len(sequences_of(attempt.request))


class EngineClient:
    """Made by `start`, ended by `stop`. For one asyncio loop."""

    def __init__(self, process: asyncio.subprocess.Process, directory: str, on_step: Callable[[Step], None]) -> None:
        self._process = process
        self._directory = directory
        self._on_step = on_step
        self._running: dict[str, _Running] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self.info: EngineInfo
        self.load: EngineLoad | None = None
        self.experts: list[ExpertLoad] = []
        """What its experts have computed, once it has said so; of a group, an entry for each engine."""
        self.num_spares = 0
        """Warm ones that are ready."""
        self.lost: str | None = None
        """Why the engine is gone; None while it runs."""
        self.when_lost: Callable[[str], None] = lambda reason: None

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        on_progress: Progress | None = None,
        *,
        on_step: Callable[[Step], None] = lambda step: None,
        recording: str | None = None,
    ) -> EngineClient:
        """Spawn the process and wait until the model is loaded. Raises EngineStartError."""
        directory = tempfile.mkdtemp(prefix="shoal-")  # mode 0700: only this user can reach the socket
        address = f"ipc://{directory}/engine"
        command = [sys.executable, "-m", "shoal.serve.engine_process", address, *([recording] if recording else [])]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, env=_environment(), start_new_session=True
        )
        client = cls(process, directory, on_step)
        client._socket.bind(address)
        try:
            if process.stdin is None:
                raise EngineStartError("the engine process has no standard input")
            process.stdin.write(msgspec.json.encode(config) + b"\n")
            started = await client._wait_until_started(on_progress or (lambda progress: None))
            client.info, client.load = started.info, started.load
        except BaseException:
            await client._kill()
            raise
        client._tasks = [asyncio.create_task(client._read()), asyncio.create_task(client._watch())]
        return client

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def num_streams(self) -> int:
        """Requests under way."""
        return len(self._running)

    async def _wait_until_started(self, on_progress: Progress) -> Started:
        ended = asyncio.create_task(self._process.wait())
        try:
            while True:
                received = asyncio.ensure_future(self._socket.recv())
                await asyncio.wait([received, ended], return_when=asyncio.FIRST_COMPLETED)
                if not received.done():
                    received.cancel()
                    raise EngineStartError(f"the engine process ended with status {self._process.returncode}")
                message = from_engine.decode(received.result())
                if isinstance(message, StartFailed):
                    raise EngineStartError(message.message)
                if isinstance(message, Started):
                    return message
                if isinstance(message, Starting):
                    on_progress(message.progress)
        finally:
            ended.cancel()

    def submit(self, attempt: Attempt) -> None:
        """Outputs of all its sequences go to the attempt as they come, each sequence's last one with `finish`."""
        if self.lost is not None:
            failure = EndpointFailure(kind="lost", message=self.lost)
            asyncio.get_running_loop().call_soon(attempt.ended, failure)
            return
        self._running[attempt.request.id] = _Running(attempt)
        self._send_soon(Add(attempt.request))

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Outputs of all its sequences as they come, to be awaited.

        Leaving the iterator early aborts what is left of the request. Raises RequestRejected or EngineLost.
        """
        attempt = _Awaited(request)
        self.submit(attempt)
        left = len(sequences_of(request))
        try:
            while left:
                item = await attempt.queue.get()
                if isinstance(item, Rejected):
                    raise RequestRejected(item)
                if isinstance(item, EndpointFailure):
                    raise EngineLost(item.message)
                left -= item.finish is not None
                yield item
        finally:
            self.abort(request.id)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request or one of its sequences; it frees its blocks before the engine's next step."""
        running = self._running.get(request_id)
        if running is None:
            return
        if index is None:
            del self._running[request_id]
        self._send_soon(Abort(request_id, index))

    def _send_soon(self, message: Add | Abort | Stop) -> None:
        # Not awaited: it is called from code that is being cancelled. Without a high-water mark it never waits anyway.
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send(encode(message))

    async def _read(self) -> None:
        while True:
            message = from_engine.decode(await self._socket.recv())
            if not isinstance(message, Step):
                continue
            self.load = message.load
            if message.experts is not None:
                self.experts = [message.experts]
            self.num_spares = message.num_spares
            self._on_step(message)
            for rejected in message.rejected:
                running = self._running.pop(rejected.request_id, None)
                if running is not None:
                    running.attempt.ended(rejected)
            for output in message.outputs:
                running = self._running.get(output.request_id)
                if running is None:
                    continue  # it was given up
                if output.finish is not None:
                    running.left -= 1
                    if not running.left:
                        del self._running[output.request_id]
                running.attempt.output(output)

    async def _watch(self) -> None:
        """Until the process ends, or says what cannot be read: then it is of no use any more."""
        reading = self._tasks[0]
        ended = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait([reading, ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if self._process.returncode is None:
            self._lose(f"a message of the engine cannot be read: {reading.exception()}")
        else:
            self._lose(f"the engine process ended with status {self._process.returncode}")

    def _lose(self, reason: str) -> None:
        self.lost = reason
        running, self._running = self._running, {}
        for one in running.values():
            one.attempt.ended(EndpointFailure(kind="lost", message=reason))
        self.when_lost(reason)

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Wait for what runs, at most so long, then end the process. Nothing of it is left afterwards."""
        deadline = time.monotonic() + drain_seconds
        while self._running and self.lost is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self.lost is None:
            self._send_soon(Stop())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._process.wait()), 3.0)
        await self._kill()

    async def _kill(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self.lost is None:
            self._lose("the engine was stopped")
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._socket.close()
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)


class _Awaited:
    """An attempt whose outputs are put into a queue."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.queue: asyncio.Queue[Output | EndpointFailure | Rejected] = asyncio.Queue()
        self.output: Callable[[Output], None] = self.queue.put_nowait
        self.ended: Callable[[EndpointFailure | Rejected], None] = self.queue.put_nowait


def _environment() -> dict[str, str]:
    """Of the engine process: the native kernels have their own threads, and torch's would spin beside them."""
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
