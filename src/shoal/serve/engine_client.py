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
from shoal.core.expert_load import ExpertLoad
from shoal.core.start_report import StartProgress
from shoal.core.types import EngineLoad, Output, Rejected, Request
from shoal.serve.messages import Abort, Add, EngineInfo, Started, StartFailed, Starting, Step, Stop, encode, from_engine

Progress = Callable[[StartProgress], None]


class EngineStartError(Exception):
    """The engine did not start. The message is for the user."""


class EngineLost(Exception):
    """The engine process ended while it was needed."""


class RequestRejected(Exception):
    """The engine did not accept a request."""

    def __init__(self, rejected: Rejected) -> None:
        super().__init__(rejected.reason)
        self.rejected = rejected


class EngineClient:
    """Made by `start`, ended by `stop`. For one asyncio loop."""

    def __init__(self, process: asyncio.subprocess.Process, directory: str, on_step: Callable[[Step], None]) -> None:
        self._process = process
        self._directory = directory
        self._on_step = on_step
        self._streams: dict[str, asyncio.Queue[Output | Exception]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self.info: EngineInfo
        self.load: EngineLoad | None = None
        self.experts: list[ExpertLoad] = []
        """What its experts have computed, once it has said so; of a group, an entry for each engine."""
        self.progress_at = time.monotonic()
        """Monotonic second of the engine's last sign of progress."""
        self.num_spares = 0
        """Warm ones that are ready."""
        self.lost: str | None = None
        """Why the engine is gone; None while it runs."""

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
            client.progress_at = time.monotonic()
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
        return len(self._streams)

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

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Outputs of all its sequences as they come, each sequence's last one with `finish`.

        Leaving the iterator early aborts what is left of the request. Raises RequestRejected or EngineLost.
        """
        if self.lost is not None:
            raise EngineLost(self.lost)
        queue: asyncio.Queue[Output | Exception] = asyncio.Queue()
        self._streams[request.id] = queue
        left = request.n
        try:
            await self._socket.send(encode(Add(request)))
            while left:
                item = await queue.get()
                if isinstance(item, Exception):
                    left = 0
                    raise item
                if item.finish is not None:
                    left -= 1
                yield item
        finally:
            del self._streams[request.id]
            if left and self.lost is None:
                self.abort(request.id)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request or one of its sequences; it frees its blocks before the engine's next step."""
        self._send_soon(Abort(request_id, index))

    def _send_soon(self, message: Abort | Stop) -> None:
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
            self.progress_at = message.progress_at
            self.num_spares = message.num_spares
            for rejected in message.rejected:
                self._put(rejected.request_id, RequestRejected(rejected))
            for output in message.outputs:
                self._put(output.request_id, output)
            self._on_step(message)

    def _put(self, request_id: str, item: Output | Exception) -> None:
        queue = self._streams.get(request_id)
        if queue is not None:
            queue.put_nowait(item)

    async def _watch(self) -> None:
        """Until the process ends, or says what cannot be read: then it is of no use any more."""
        reading = self._tasks[0]
        ended = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait([reading, ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if self._process.returncode is None:
            self.lost = f"a message of the engine cannot be read: {reading.exception()}"
        else:
            self.lost = f"the engine process ended with status {self._process.returncode}"
        for queue in self._streams.values():
            queue.put_nowait(EngineLost(self.lost))

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Wait for what runs, at most so long, then end the process. Nothing of it is left afterwards."""
        deadline = time.monotonic() + drain_seconds
        while self._streams and self.lost is None and time.monotonic() < deadline:
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
            self.lost = "the engine was stopped"
        for queue in self._streams.values():
            queue.put_nowait(EngineLost(self.lost))
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._socket.close()
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)


def _environment() -> dict[str, str]:
    """Of the engine process: the native kernels have their own threads, and torch's would spin beside them."""
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
