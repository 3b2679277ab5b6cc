"""A TCP proxy that misbehaves when told to: resets, partitions, delay, throttling, cuts. It needs no privileges.

What a partition holds back is delivered when it heals, as TCP would by sending it again: late words of an endpoint that
was given up must do no harm. Every byte and connection that was touched is counted: the counters prove a fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar

import msgspec

_CHUNK = 1 << 14
Way = Literal["to_server", "to_client"]
T = TypeVar("T")


class Rules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is done to bytes from now on. The defaults pass everything."""

    blocked: tuple[Way, ...] = ()
    """Nothing passes these ways until it is unblocked; connections stay open."""
    delay: float = 0.0
    """Seconds by which every piece is late, each way."""
    bytes_per_second: float | None = None
    cut_after: int | None = None
    """Bytes to the client after which its connection is reset; counted anew for each connection."""
    refuse: bool = False
    """Reset new connections at once."""


class Counters(msgspec.Struct, kw_only=True):
    """Since the proxy began; they only grow."""

    connections: int = 0
    refused: int = 0
    resets: int = 0
    """Connections that carried something and were reset."""
    cut: int = 0
    bytes_to_server: int = 0
    bytes_to_client: int = 0
    blocked_to_server: int = 0
    """Bytes that waited for a partition to heal, or were lost in it."""
    blocked_to_client: int = 0
    delayed: int = 0
    throttled: int = 0


class _Pair:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.server: asyncio.StreamWriter | None = None
        self.sent_to_client = 0

    def reset(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None and not writer.transport.is_closing():
                plain = writer.get_extra_info("socket")
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()


class ChaosProxy:
    """Lives on one event loop; `ProxyThread` is the one to use from elsewhere."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._pairs: list[_Pair] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._unblocked = asyncio.Event()
        self._unblocked.set()
        self.rules = Rules()
        self.counters = Counters()
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pair in self._pairs:
            pair.reset()

    def set_rules(self, rules: Rules) -> None:
        self.rules = rules
        # Those that wait look again at what concerns them.
        self._unblocked.set()
        if rules.blocked:
            self._unblocked = asyncio.Event()

    def reset_all(self) -> int:
        """Reset every connection; how many there were."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            pair.reset()
        self.counters.resets += len(pairs)
        return len(pairs)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = _Pair(writer)
        self.counters.connections += 1
        if self.rules.refuse:
            self.counters.refused += 1
            pair.reset()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._pairs.append(pair)
        try:
            while self.rules.blocked:  # a handshake crosses both ways
                await self._unblocked.wait()
            server_reader, pair.server = await asyncio.open_connection(*self._target)
            await asyncio.gather(
                self._carry(reader, pair.server, "to_server", pair),
                self._carry(server_reader, writer, "to_client", pair),
            )
        except OSError:
            pair.reset()
        except asyncio.CancelledError:
            pair.reset()  # only `stop` cancels
        finally:
            self._tasks.discard(task)
            if pair in self._pairs:
                self._pairs.remove(pair)
            for end in (pair.client, pair.server):
                if end is not None:
                    end.close()

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: Way, pair: _Pair) -> None:
        while data := await source.read(_CHUNK):
            await self._hold(way, len(data))
            if self.rules.delay:
                self.counters.delayed += len(data)
                await asyncio.sleep(self.rules.delay)
            if rate := self.rules.bytes_per_second:
                self.counters.throttled += len(data)
                await asyncio.sleep(len(data) / rate)
            if way == "to_client" and self._cuts(pair, len(data)):
                return
            sink.write(data)
            await sink.drain()
            if way == "to_client":
                self.counters.bytes_to_client += len(data)
            else:
                self.counters.bytes_to_server += len(data)
        await self._hold(way, 0)
        with contextlib.suppress(OSError):
            sink.write_eof()

    async def _hold(self, way: Way, size: int) -> None:
        if way not in self.rules.blocked:
            return
        if way == "to_client":
            self.counters.blocked_to_client += size
        else:
            self.counters.blocked_to_server += size
        while way in self.rules.blocked:
            await self._unblocked.wait()

    def _cuts(self, pair: _Pair, size: int) -> bool:
        pair.sent_to_client += size
        if self.rules.cut_after is None or pair.sent_to_client <= self.rules.cut_after:
            return False
        self.counters.cut += 1
        pair.reset()
        return True


class ProxyThread:
    """A ChaosProxy on a thread and an event loop of its own: a control API that can be called from any thread."""

    def __init__(self, host: str, port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos-proxy", daemon=True)
        self._thread.start()
        self._proxy = self._run(self._make(host, port))
        self.url = f"http://127.0.0.1:{self._proxy.port}"

    @staticmethod
    async def _make(host: str, port: int) -> ChaosProxy:
        proxy = ChaosProxy(host, port)
        await proxy.start()
        return proxy

    def counters(self) -> Counters:
        return self._call(lambda: msgspec.structs.replace(self._proxy.counters))

    def set_rules(self, rules: Rules) -> None:
        self._call(lambda: self._proxy.set_rules(rules))

    def reset_all(self) -> int:
        return self._call(self._proxy.reset_all)

    def close(self) -> None:
        self._run(self._proxy.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, action: Callable[[], T]) -> T:
        async def act() -> T:
            return action()

        return self._run(act())

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)
