"""Clients that misbehave: they leave, read slowly, send slowly, send nonsense, send twice, or send far too much.

As with the other faults, each is aimed at one address and proves itself by what came back from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import resource
import struct
import termios
import time
from collections.abc import Sequence

import msgspec

from shoal.bench.faults.clients import Client, Outcome
from shoal.bench.faults.injectors import NotInjected
from shoal.bench.faults.workload import COMPLETIONS, Spec
from shoal.bench.http_client import Answer, ConnectionLost, Exchange, events, fetch
from shoal.bench.processes import Process, comes_true, open_files

_LONG = {"prompt": "fish", "max_tokens": 256, "ignore_eos": True, "return_token_ids": True, "stream": True, "seed": 5}
_RECOVERY_SECONDS = 10.0
_BAD_BODIES: tuple[bytes, ...] = (
    b"",
    b"{",
    b"null",
    b"[]",
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "max_tokens": 1e400}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "n": 100000}',
    b'{"prompt": "a", "max_tokns": 4}',
    b'{"prompt": [99999999999]}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "fish"}}}}',
)


class Leave:
    """Clients that leave with a reset after so many tokens: 0 is before the first, None before any answer."""

    def __init__(self, url: str, headers: dict[str, str], model: str, after: Sequence[int | None]) -> None:
        self.breaches: list[str] = []
        self._url = url
        self._headers = headers
        self._model = model
        self._after = after
        self._left = 0

    async def inject(self) -> None:
        results = await asyncio.gather(*(self._one(tokens) for tokens in self._after), return_exceptions=True)
        self._left = sum(result is True for result in results)

    async def _one(self, tokens: int | None) -> bool:
        last = max(count or 0 for count in self._after) + 1
        async with asyncio.timeout(30):
            exchange = await Exchange.connect(self._url)
            try:
                body = _LONG | {"model": self._model, "max_tokens": last}
                await exchange.send("POST", COMPLETIONS, self._headers, json.dumps(body).encode())
                if tokens is None:
                    return True
                if await exchange.head() != 200:
                    return False
                seen, source = 0, events(exchange.chunks())
                async with contextlib.aclosing(source):  # type: ignore[type-var]
                    while seen < tokens:
                        _, data = await anext(source)
                        seen += sum(len(choice.get("token_ids") or []) for choice in json.loads(data)["choices"])
                return True
            finally:
                exchange.reset()

    async def verify(self) -> str:
        if self._left < len(self._after):
            raise NotInjected(f"{self._left} of {len(self._after)} clients got as far as they meant to")
        return f"{self._left} clients left with a reset"

    async def heal(self) -> None:
        pass


class SlowReader:
    """A client that asks for much and reads nothing."""

    def __init__(self, url: str, headers: dict[str, str], model: str) -> None:
        self.breaches: list[str] = []
        self._url = url
        self._headers = headers
        self._body = _LONG | {"model": model, "logprobs": 5, "n": 2}
        self._exchange: Exchange | None = None

    async def inject(self) -> None:
        with contextlib.suppress(ConnectionLost):
            self._exchange = await Exchange.connect(self._url, receive_buffer=2048)
            await self._exchange.send("POST", COMPLETIONS, self._headers, json.dumps(self._body).encode())

    async def verify(self) -> str:
        if self._exchange is None or not await comes_true(lambda: self._unread() > 0, 5.0):
            raise NotInjected("nothing waits unread in the slow reader's socket")
        return f"{self._unread()} bytes unread in the client's socket, its buffer full"

    def _unread(self) -> int:
        assert self._exchange is not None
        plain = self._exchange.socket()
        raw = fcntl.ioctl(plain.fileno(), termios.FIONREAD, b"\0\0\0\0") if plain.fileno() >= 0 else b"\0\0\0\0"
        return int(struct.unpack("i", raw)[0])

    async def heal(self) -> None:
        if self._exchange is not None:
            self._exchange.reset()


class SlowLoris:
    """Connections whose headers arrive a byte at a time."""

    def __init__(self, url: str, connections: int = 16, every: float = 0.25) -> None:
        self.breaches: list[str] = []
        self._url = url
        self._connections = connections
        self._every = every
        self._sent = 0
        self._open: list[Exchange] = []
        self._task: asyncio.Task[None] | None = None

    async def inject(self) -> None:
        for _ in range(self._connections):
            with contextlib.suppress(ConnectionLost):
                exchange = await Exchange.connect(self._url)
                self._open.append(exchange)
                await exchange.send_raw(b"POST /v1/completions HTTP/1.1\r\nx-slow: ")
        self._task = asyncio.create_task(self._drip())

    async def _drip(self) -> None:
        while True:
            for exchange in self._open:
                with contextlib.suppress(ConnectionLost):
                    await exchange.send_raw(b"a")
                    self._sent += 1
            await asyncio.sleep(self._every)

    async def verify(self) -> str:
        if len(self._open) < self._connections or self._sent < self._connections:
            raise NotInjected(f"{len(self._open)} of {self._connections} slow connections were made")
        return f"{self._connections} connections, {self._sent} bytes of headers one by one"

    async def heal(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for exchange in self._open:
            exchange.close()


class BadBodies:
    """Bodies that are malformed, out of range, nested without end or too large: each is the client's mistake."""

    def __init__(self, url: str, headers: dict[str, str], oversized: int = 64 << 20) -> None:
        self.breaches: list[str] = []
        self._url = url
        self._headers = headers
        self._oversized = oversized
        self._statuses: list[int] = []

    async def inject(self) -> None:
        for body in _BAD_BODIES:
            with contextlib.suppress(ConnectionLost):
                answer = await fetch(self._url, COMPLETIONS, method="POST", headers=self._headers, body=body)
                self._judge(answer, body[:60])
        # Only announced: a server that reads it all before it refuses would be slow, not safe.
        with contextlib.suppress(ConnectionLost):
            exchange = await Exchange.connect(self._url)
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: a\r\ncontent-length: {self._oversized}\r\n"
            lines = "".join(f"{name}: {value}\r\n" for name, value in self._headers.items())
            try:
                async with asyncio.timeout(10):
                    await exchange.send_raw((head + lines + "\r\n").encode() + b"{" * 1000)
                    self._judge(await exchange.whole(), b"oversized")
            except TimeoutError:
                self.breaches.append("an oversized body was not refused within 10 s")
            finally:
                exchange.close()

    def _judge(self, answer: Answer, body: bytes) -> None:
        self._statuses.append(answer.status)
        if not 400 <= answer.status < 500:
            self.breaches.append(f"{body!r} was answered with status {answer.status}")

    async def verify(self) -> str:
        if len(self._statuses) < len(_BAD_BODIES):
            raise NotInjected(f"{len(self._statuses)} of {len(_BAD_BODIES) + 1} bad requests were answered")
        counts = {status: self._statuses.count(status) for status in sorted(set(self._statuses))}
        return "answered " + ", ".join(f"{count} x {status}" for status, count in counts.items())

    async def heal(self) -> None:
        pass


class SentTwice:
    """The same request, under the same id, twice at once: equal answers, or one of them refused as a duplicate."""

    def __init__(self, url: str, headers: dict[str, str], spec: Spec, request_id: str) -> None:
        self.breaches: list[str] = []
        self._url = url
        self._headers = headers | {"x-request-id": request_id}
        self._body = spec.body | {"stream": False}
        self._body.pop("stream_options", None)
        self._path = spec.path
        self._answers: list[Answer] = []

    async def inject(self) -> None:
        raw = json.dumps(self._body).encode()
        sent = [
            fetch(self._url, self._path, method="POST", headers=self._headers, body=raw, seconds=60) for _ in range(2)
        ]
        answers = await asyncio.gather(*sent, return_exceptions=True)
        self._answers = [answer for answer in answers if isinstance(answer, Answer)]

    async def verify(self) -> str:
        if len(self._answers) < 2:
            raise NotInjected(f"{len(self._answers)} of 2 equal requests were answered")
        good = [answer for answer in self._answers if answer.status == 200]
        if not good or any(answer.status not in (200, 409) for answer in self._answers):
            self.breaches.append(f"two equal requests were answered {[answer.status for answer in self._answers]}")
        elif len(good) == 2 and good[0].json()["choices"] != good[1].json()["choices"]:
            self.breaches.append("two equal requests have unequal answers")
        return f"answered {' and '.join(str(answer.status) for answer in self._answers)}"

    async def heal(self) -> None:
        pass


class NoFiles:
    """A process that may open no more files while connections arrive."""

    def __init__(self, aim: Process, target: Process, url: str, connections: int = 24) -> None:
        self.breaches: list[str] = []
        self._aim = aim
        self._target = target
        self._url = url
        self._connections = connections
        self._limits: tuple[int, int] | None = None
        self._most = 0
        self._open: list[Exchange] = []

    async def inject(self) -> None:
        self._limits = resource.prlimit(self._aim.pid, resource.RLIMIT_NOFILE)
        self._most = open_files(self._target.pid) + 4
        resource.prlimit(self._aim.pid, resource.RLIMIT_NOFILE, (self._most, self._limits[1]))
        for _ in range(self._connections):
            with contextlib.suppress(ConnectionLost):
                self._open.append(await Exchange.connect(self._url))  # the kernel accepts, the process cannot

    async def verify(self) -> str:
        limit = resource.prlimit(self._target.pid, resource.RLIMIT_NOFILE)[0]
        if limit != self._most or not await comes_true(lambda: open_files(self._target.pid) >= limit, 2.0):
            raise NotInjected(f"process {self._target.pid} has {open_files(self._target.pid)} of {limit} files open")
        return f"pid {self._target.pid} had all {limit} files open that it may, {len(self._open)} connections arrived"

    async def heal(self) -> None:
        for exchange in self._open:
            exchange.close()
        if self._limits is not None and self._aim.lives:
            resource.prlimit(self._aim.pid, resource.RLIMIT_NOFILE, self._limits)


class Overload:
    """Requests arrive at three times the rate at which the fleet completes them, whatever becomes of those before.

    Each has a deadline. Goodput counts the tokens of answers that were whole in time.
    """

    def __init__(
        self,
        client: Client,
        specs: Sequence[Spec],
        *,
        capacity: float,
        tokens_per_second: float,
        longest_answer: float,
        offered: float = 3.0,
    ) -> None:
        """`capacity`: requests a second without faults, and `longest_answer` the seconds that one took at most then.
        `offered`: multiples of the capacity, three but in the control."""
        # Enough for a request that is begun at once, too little for one behind a minute's backlog.
        deadline = max(2.0, 2 * longest_answer)
        self.breaches: list[str] = []
        self.outcomes: list[Outcome] = []
        self._client = client
        self._specs = [
            msgspec.structs.replace(spec, body=spec.body | {"timeout": round(deadline, 3)}) for spec in specs
        ]
        self._capacity = capacity
        self._tokens_per_second = tokens_per_second
        self._deadline = deadline
        self._longest_answer = longest_answer
        self._offered = offered
        self._began = 0.0
        self._source: asyncio.Task[None] | None = None
        self._sent: list[asyncio.Task[Outcome]] = []

    async def inject(self) -> None:
        self._began = time.monotonic()
        self._source = asyncio.create_task(self._arrive())

    async def _arrive(self) -> None:
        while True:
            due = self._began + len(self._sent) / (self._offered * self._capacity)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self._sent.append(asyncio.create_task(self._client.run(self._specs[len(self._sent) % len(self._specs)])))

    async def verify(self) -> str:
        ended = time.monotonic()
        assert self._source is not None, "verify comes after inject"
        self._source.cancel()
        self.outcomes = list(await asyncio.gather(*self._sent))
        seconds = ended - self._began
        offered = sum(outcome.end in ("completed", "refused", "expired") for outcome in self.outcomes) / seconds
        if offered < 2.4 * self._capacity:
            raise NotInjected(f"{offered:.1f} requests a second were offered, {self._capacity:.1f} is the capacity")
        good = [o for o in self.outcomes if o.end == "completed" and o.ended - o.sent <= self._deadline]
        times = [at for outcome in good for choice in outcome.choices.values() for at in choice.times]
        share = sum(at <= ended for at in times) / seconds / max(self._tokens_per_second, 1e-9)
        if share < 0.9:
            self.breaches.append(f"goodput under overload was {share:.0%} of capacity")
        calm = max(outcome.ended for outcome in self.outcomes) - ended
        # What was accepted last takes as long as it takes without any overload.
        if calm > _RECOVERY_SECONDS + self._longest_answer:
            self.breaches.append(f"requests of the overload were under way {calm:.1f} s after it")
        return (
            f"{offered / self._capacity:.1f} x capacity offered for {seconds:.0f} s with a deadline of "
            f"{self._deadline:.1f} s, goodput {share:.0%} of capacity, calm {calm:.1f} s after"
        )

    async def heal(self) -> None:
        if self._source is not None:
            self._source.cancel()
        await asyncio.gather(*self._sent, return_exceptions=True)
