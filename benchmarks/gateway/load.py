"""Open-loop load: requests go out when the schedule says, whatever becomes of those before them.

    python benchmarks/gateway.py load --url http://127.0.0.1:8101 --rate 200 --seconds 10

Times count from the *intended* send; a request that failed counts as infinitely late. Every answer is compared token by
token with what the mocks say. A run in which the generator itself was late is INVALID. Several --url share the requests
in turn. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import random
import resource
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvloop

from gateway.arrivals import Arrival, Phase, from_trace, poisson
from gateway.streams import Connection, Stream
from gateway.timing import TICK
from gateway.tokens import Difference, Vocabulary, compare, vocabulary

LATE_P99, LATE_MOST = 0.005, 0.1
"""Seconds after the intended send. A generator that is later than this measures itself."""
DISTINCT_PROMPTS = 512
"""Of each length; requests take them in turn."""


@dataclass(frozen=True)
class Shape:
    """What a request looks like."""

    model: str = "mock"
    api: str = "completions"
    """completions or chat."""
    prompt: str = "text"
    """text, or ids: token ids, which chat does not have and sglang-router does not take."""
    headers: tuple[str, ...] = ()
    extra: str = "{}"
    """JSON object of further fields."""


class Prompts:
    """Prompts of every length and what is answered to them, made once."""

    def __init__(self, words: Vocabulary, shape: Shape, seed: int) -> None:
        self._words, self._shape = words, shape
        self._draw = random.Random(seed)
        self._shared: list[int] = []
        """What prompts begin with that have something in common."""
        self._made: dict[tuple[int, int, int], tuple[Any, list[int]]] = {}
        self._answers: dict[tuple[int, int, int, int], list[int]] = {}

    def get(self, number: int, arrival: Arrival) -> tuple[Any, list[int]]:
        """As it is sent, and its whole answer."""
        prompt = (number % DISTINCT_PROMPTS, arrival.num_prompt, arrival.num_shared)
        if prompt not in self._made:
            self._made[prompt] = self._make(arrival.num_prompt, arrival.num_shared)
        sent, tokens = self._made[prompt]
        key = (*prompt, arrival.num_output)
        if key not in self._answers:
            self._answers[key] = self._words.continuation(tokens, arrival.num_output)
        return sent, self._answers[key]

    def _make(self, length: int, num_shared: int) -> tuple[Any, list[int]]:
        if num_shared > len(self._shared):
            self._shared += self._draw.choices(self._words.ids, k=num_shared - len(self._shared))
        tokens = self._shared[:num_shared] + self._draw.choices(self._words.ids, k=length - num_shared)
        if self._shape.prompt == "ids":
            return tokens, tokens
        text = self._words.text(tokens)
        if self._shape.api == "chat":
            messages = [{"role": "user", "content": text}]
            return messages, self._words.encode_chat(messages)
        return text, self._words.encode(text)


def make_streams(
    arrivals: Sequence[Arrival], shape: Shape, words: Vocabulary, hosts: Sequence[str], seed: int
) -> tuple[list[Stream], list[list[int]]]:
    """Requests as bytes, and the answers they must get."""
    prompts = Prompts(words, shape, seed)
    path = "/v1/chat/completions" if shape.api == "chat" else "/v1/completions"
    streams, expected = [], []
    for number, arrival in enumerate(arrivals):
        sent, answer = prompts.get(number, arrival)
        fields = {"model": shape.model, "messages" if shape.api == "chat" else "prompt": sent}
        fields |= {"max_tokens": arrival.num_output, "stream": True, "temperature": 0.0, "return_token_ids": True}
        body = json.dumps(fields | json.loads(shape.extra)).encode()
        head = [f"POST {path} HTTP/1.1", f"host: {hosts[number % len(hosts)]}", "content-type: application/json"]
        head += [f"content-length: {len(body)}", *shape.headers]
        streams.append(Stream(number, "\r\n".join([*head, "", ""]).encode() + body))
        expected.append(answer)
    return streams, expected


class Generator:
    """Sends streams over as many connections as they need."""

    def __init__(self, urls: Sequence[str]) -> None:
        split = [urlsplit(url) for url in urls]
        self._targets = [(part.hostname or "127.0.0.1", part.port or 80) for part in split]
        self._free: list[deque[Connection]] = [deque() for _ in urls]
        self._loop = asyncio.get_running_loop()
        self._left = 0
        self._done = asyncio.Event()
        self._all: set[Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()

    async def run(self, streams: Sequence[Stream], arrivals: Sequence[Arrival], patience: float) -> float:
        """Until every stream has ended, or `patience` seconds after the last was sent; the time it began."""
        self._left = len(streams)
        began = time.monotonic() + 0.1
        for stream, arrival in zip(streams, arrivals, strict=True):
            stream.intended = began + arrival.at
        due = deque(streams)
        while due:
            while due and due[0].intended <= time.monotonic():
                self._send(due.popleft())
            if due:
                await asyncio.sleep(max(TICK, due[0].intended - time.monotonic()))
        try:
            await asyncio.wait_for(self._done.wait(), patience)
        except TimeoutError:
            for connection in list(self._all):
                connection.fail(f"not done {patience:g} s after the last request was sent")
        for connection in self._all:
            connection.close()
        return began

    async def warm(self, connections: int) -> None:
        """Open so many to each target, for the run is not to measure handshakes that a client has but once."""
        for target in range(len(self._targets)):
            for first in range(0, connections, 64):
                await asyncio.gather(*(self._open(target, None) for _ in range(min(64, connections - first))))

    def _send(self, stream: Stream) -> None:
        target = stream.number % len(self._targets)
        free = self._free[target]
        while free:
            connection = free.pop()
            if connection.usable:
                connection.send(stream)
                return
            self._all.discard(connection)
        task = self._loop.create_task(self._open(target, stream))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, target: int, stream: Stream | None) -> None:
        connection = Connection(self._free[target].append, self._ended)
        if stream is not None:
            connection.send(stream)
            stream.sent = time.monotonic()  # if it cannot connect: the generator was not late
        self._all.add(connection)
        try:
            await self._loop.create_connection(lambda: connection, *self._targets[target])
        except OSError as error:
            connection.fail(f"cannot connect: {error}")
            self._all.discard(connection)
            return
        if stream is None:
            self._free[target].append(connection)

    def _ended(self, stream: Stream) -> None:
        self._left -= 1
        if not self._left:
            self._done.set()


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one run. Seconds; percentiles over all requests, those that failed at infinity."""

    valid: bool
    why_invalid: str
    offered: int
    completed: int
    refused: int
    """429 and 503."""
    failed: int
    missing_tokens: int
    duplicate_tokens: int
    unequal: int
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    """(last - first token) / (tokens - tokens of the first chunk), of each stream."""
    gap_p50: float
    """Between two chunks of a stream."""
    gap_p99: float
    gap_max: float
    e2e_p50: float
    e2e_p99: float
    events: int
    events_per_second: float
    tokens: int
    seconds: float
    """From the first intended send to the last end."""
    late_p99: float
    """Of the generator itself: from the intended send to the real one."""
    late_max: float
    generator_cpu: float
    """Cores, of this process."""
    first_error: str


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value at or below which so many are; `ordered` is sorted. NaN of nothing."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def figures_of(streams: Sequence[Stream], expected: Sequence[list[int]], words: Vocabulary, cpu: float) -> Figures:
    ttft, e2e, late, gaps, itls = [], [], [], [], []
    differences = []
    for stream, answer in zip(streams, expected, strict=True):
        late.append(stream.sent - stream.intended)
        ok = stream.complete and bool(stream.times)
        ttft.append(stream.times[0] - stream.intended if ok else math.inf)
        e2e.append(stream.ended - stream.intended if ok else math.inf)
        gaps += [after - before for before, after in zip(stream.times, stream.times[1:], strict=False)]
        if stream.complete:
            differences.append(difference(stream, answer, words))
            later = sum(stream.counts[1:])
            itls += [(stream.times[-1] - stream.times[0]) / later] if later else []
    for values in (ttft, e2e, late, gaps, itls):
        values.sort()
    refused = sum(stream.status in (429, 503) for stream in streams)
    completed = len(differences)
    began, ended = min(s.intended for s in streams), max(s.ended for s in streams)
    events = sum(len(stream.times) for stream in streams)
    late_p99, late_max = percentile(late, 0.99), late[-1]
    why = f"late by {late_p99 * 1e3:.1f} ms at p99, {late_max * 1e3:.0f} ms at most"
    return Figures(
        valid=late_p99 <= LATE_P99 and late_max <= LATE_MOST,
        why_invalid=why if late_p99 > LATE_P99 or late_max > LATE_MOST else "",
        offered=len(streams),
        completed=completed,
        refused=refused,
        failed=len(streams) - completed - refused,
        missing_tokens=sum(d.missing for d in differences),
        duplicate_tokens=sum(d.duplicate for d in differences),
        unequal=sum(d.unequal for d in differences),
        ttft_p50=percentile(ttft, 0.5),
        ttft_p99=percentile(ttft, 0.99),
        itl_p50=percentile(itls, 0.5),
        gap_p50=percentile(gaps, 0.5),
        gap_p99=percentile(gaps, 0.99),
        gap_max=gaps[-1] if gaps else math.nan,
        e2e_p50=percentile(e2e, 0.5),
        e2e_p99=percentile(e2e, 0.99),
        events=events,
        events_per_second=events / (ended - began),
        tokens=sum(sum(stream.counts) for stream in streams),
        seconds=ended - began,
        late_p99=late_p99,
        late_max=late_max,
        generator_cpu=cpu / (ended - began),
        first_error=next((f"{s.status} {s.error}" for s in streams if not s.complete), ""),
    )


def difference(stream: Stream, answer: list[int], words: Vocabulary) -> Difference:
    """By ids; by words where the server passed none on."""
    if stream.ids or not stream.texts:
        return compare(stream.ids, answer)
    said = b"".join(stream.texts).decode()
    if said == words.text(answer):
        return Difference()
    # Each of the mocks' words begins with a space, so that numbers can stand for them.
    numbers = {words.texts[token]: token for token in answer}
    return compare([numbers.get(" " + word, -1) for word in said.split()], answer)


async def measure(
    urls: Sequence[str], arrivals: Sequence[Arrival], shape: Shape, words: Vocabulary, *, warm: int, patience: float
) -> tuple[list[Stream], list[list[int]], float, float]:
    """Streams, what they should hold, when the run began, CPU seconds of this process in it."""
    streams, expected = make_streams(arrivals, shape, words, [urlsplit(url).netloc for url in urls], seed=1)
    generator = Generator(urls)
    await generator.warm(warm)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would stop the clock of all streams
    before = cpu_seconds()
    try:
        began = await generator.run(streams, arrivals, patience)
    finally:
        gc.enable()
        gc.unfreeze()
    return streams, expected, began, cpu_seconds() - before


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def add_server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", action="append", required=True, help="several share the requests in turn")
    parser.add_argument("--model", default="mock")
    parser.add_argument("--tokenizer", default="smollm2-135m", help="as the mocks'")
    parser.add_argument("--warm", type=int, default=64, help="connections to each URL that are open when it begins")


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--api", choices=["completions", "chat"], default="completions")
    parser.add_argument("--prompt", choices=["text", "ids"], default="text")
    parser.add_argument("--header", action="append", default=[], help="further header, such as 'authorization: ...'")
    parser.add_argument("--extra", default="{}", help="further fields of the request, as JSON")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience", type=float, default=30.0, help="seconds to wait after the last request")


def shape_of(arguments: argparse.Namespace) -> Shape:
    if arguments.api == "chat" and arguments.prompt == "ids":
        sys.exit("--prompt ids: chat has no token-id prompts; take --api completions")
    return Shape(arguments.model, arguments.api, arguments.prompt, tuple(arguments.header), arguments.extra)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="gateway.py load", description="One open-loop run.")
    add_server_options(parser)
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second, Poisson")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--trace", type=Path, help="Azure CSV or Mooncake JSON lines, in place of --rate")
    parser.add_argument("--speed", type=float, default=1.0, help="of the trace")
    parser.add_argument("--limit", type=int, help="requests of the trace")
    add_shape_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.trace is not None:
        arrivals = from_trace(arguments.trace, speed=arguments.speed, limit=arguments.limit)
    else:
        phases = [Phase(arguments.seconds, arguments.rate)]
        arrivals = poisson(phases, arguments.prompt_tokens, arguments.output_tokens, arguments.seed)
    words = vocabulary(arguments.tokenizer)
    run = measure(arguments.url, arrivals, shape_of(arguments), words, warm=arguments.warm, patience=arguments.patience)
    streams, expected, _, cpu = uvloop.run(run)
    print(json.dumps(asdict(figures_of(streams, expected, words, cpu))))


if __name__ == "__main__":
    main(sys.argv[1:])
