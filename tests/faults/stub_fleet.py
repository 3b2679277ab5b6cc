"""A fleet without a model, small enough to be read: its tokens are a function of request and position.

It keeps the contract, or breaks it in the way that `--flaw` says, so that the suite itself can be tested.
`python -m tests.faults.stub_fleet --deployment FILE --port N`, or `--engine --port N` for an endpoint on its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from shoal.bench.faults.deployment import free_port
from shoal.core.fleet_types import EndpointStatus, FleetStatus, ModelStatus

TICK = 0.01
HUNG_SECONDS = 0.6


def token_at(seed: int, index: int, position: int) -> int:
    return zlib.crc32(f"{seed} {index} {position}".encode()) % 1000


# --- an endpoint ------------------------------------------------------------------------------------------------------


async def engine(port: int) -> None:
    """JSON lines over TCP: [attempt, seed, index, position, end] begins, [attempt, position, token] comes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        work: dict[str, list[Any]] = {}

        async def listen() -> None:
            while line := await reader.readline():
                attempt, *rest = json.loads(line)
                work[attempt] = rest

        listening = asyncio.create_task(listen())
        with contextlib.suppress(OSError):
            while not listening.done():
                lines = [[]]
                for attempt, state in list(work.items()):
                    seed, index, position, end = state
                    lines.append([attempt, position, token_at(seed, index, position)])
                    state[2] += 1
                    if state[2] >= end:
                        del work[attempt]
                writer.write("".join(json.dumps(line) + "\n" for line in lines).encode())
                await writer.drain()
                await asyncio.sleep(TICK)
        writer.close()

    await asyncio.start_server(serve, "127.0.0.1", port)
    parent = os.getppid()
    while os.getppid() == parent:  # however the parent ended
        await asyncio.sleep(0.1)
    os._exit(0)


class Sequence:
    def __init__(self, request: Running, index: int) -> None:
        self.request = request
        self.index = index
        self.tokens: list[int] = []
        self.text = ""
        self.attempt = ""


class Endpoint:
    """One connection to an engine, made again when it is lost; the engine too where it is ours."""

    def __init__(self, fleet: Fleet, name: str, url: str | None) -> None:
        self.fleet = fleet
        self.name = name
        self.url = url
        self.port = free_port() if url is None else urlsplit(url).port
        self.process: subprocess.Popen[bytes] | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.work: dict[str, Sequence] = {}
        self.state = "starting"
        self.epoch = self.restarts = 0
        self.heard = 0.0

    async def run(self) -> None:
        while True:
            if self.url is None and (self.process is None or self.process.poll() is not None):
                self.restarts += self.process is not None
                words = [sys.executable, "-m", "tests.faults.stub_fleet", "--engine", "--port", str(self.port)]
                self.process = subprocess.Popen(words)
            with contextlib.suppress(OSError):
                reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
                await self.listen(reader)
            if self.state == "ready":
                self.epoch += 1
                self.state = "down"
            self.fleet.move(self)
            await asyncio.sleep(0.05)

    async def listen(self, reader: asyncio.StreamReader) -> None:
        self.heard = time.monotonic()
        while line := await reader.readline():
            self.heard = time.monotonic()
            self.state = "ready"
            said = json.loads(line)
            if said and (sequence := self.work.get(said[0])) is not None:
                self.fleet.took(self, sequence, said[2])

    def begin(self, sequence: Sequence) -> None:
        self.fleet.attempts += 1
        sequence.attempt = f"a{self.fleet.attempts}"
        self.work[sequence.attempt] = sequence
        position = len(sequence.tokens)
        if position:
            position += ("gap" in self.fleet.flaws) - ("repeat" in self.fleet.flaws)
        body = [sequence.attempt, sequence.request.seed, sequence.index, position, 1 << 30]
        assert self.writer is not None
        self.writer.write((json.dumps(body) + "\n").encode())

    def look(self) -> None:
        if self.state == "ready" and time.monotonic() - self.heard > HUNG_SECONDS:
            self.state = "fenced"
            self.epoch += 1
            self.fleet.move(self)


# --- the gateway ------------------------------------------------------------------------------------------------------


class Running:
    """A request, with the events that its client has got or will."""

    def __init__(self, request_id: str, body: dict[str, Any]) -> None:
        self.id = request_id
        self.body = body
        essence = {key: value for key, value in body.items() if not key.startswith("stream")}
        self.seed = zlib.crc32(json.dumps(essence, sort_keys=True).encode())
        self.sequences = [Sequence(self, index) for index in range(body.get("n", 1))]
        self.left = len(self.sequences)
        self.events: list[str] = []
        self.done = self.broken = False
        self.changed = asyncio.Event()

    def say(self, event: dict[str, Any] | str) -> None:
        self.events.append(event if isinstance(event, str) else json.dumps(event))
        self.changed.set()

    @property
    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": 7, "completion_tokens": sum(len(s.tokens) for s in self.sequences)}


class Fleet:
    def __init__(self, flaws: list[str], endpoints: list[str | None]) -> None:
        self.flaws = flaws
        self.endpoints = [Endpoint(self, f"tiny-{n}", url) for n, url in enumerate(endpoints)]
        self.requests: dict[str, Running] = {}
        self.waiting: list[Sequence] = []
        self.attempts = self.migrations = 0
        self.began = time.monotonic()

    async def run(self) -> None:
        tasks = [asyncio.create_task(endpoint.run()) for endpoint in self.endpoints]
        while not any(task.done() for task in tasks):
            for endpoint in self.endpoints:
                endpoint.look()
            self.place([])
            await asyncio.sleep(0.02)
        await asyncio.gather(*tasks)

    def place(self, more: list[Sequence]) -> None:
        able = [endpoint for endpoint in self.endpoints if endpoint.state == "ready"]
        self.waiting += more
        while able and self.waiting:
            min(able, key=lambda endpoint: len(endpoint.work)).begin(self.waiting.pop(0))

    def move(self, endpoint: Endpoint) -> None:
        moved, endpoint.work = list(endpoint.work.values()), {}
        self.migrations += len(moved)
        for sequence in moved:
            if "breaks" in self.flaws:
                sequence.request.broken = True
                sequence.request.changed.set()
            elif "fails" in self.flaws and not sequence.request.done:
                sequence.request.say({"error": {"message": "an endpoint was lost"}})
                sequence.request.done = True
        self.place([sequence for sequence in moved if not (sequence.request.broken or sequence.request.done)])

    def took(self, endpoint: Endpoint, sequence: Sequence, token: int) -> None:
        request, body = sequence.request, sequence.request.body
        sequence.tokens.append(token)
        text, finish = f"w{token} ", None
        whole = sequence.text + text
        for stop in body.get("stop", []):
            if stop in whole:
                text, finish = whole[: whole.index(stop)][len(sequence.text) :], "stop"
        if finish is None and len(sequence.tokens) >= body["max_tokens"]:
            finish = "length"
        sequence.text += text
        chunk = {"index": sequence.index, "text": text, "token_ids": [token], "finish_reason": finish}
        request.say({"choices": [chunk]})
        if finish:
            del endpoint.work[sequence.attempt]
            request.left -= 1
            if not request.left:
                request.say({"choices": [], "usage": request.usage})
                request.say("[DONE]")
                request.done = True

    def status(self) -> FleetStatus:
        kinds = [("shoal", None if e.process is None else f"pid {e.process.pid}") for e in self.endpoints]
        leaking = "leaks" in self.flaws and self.migrations > 0
        endpoints = [
            EndpointStatus(
                name=e.name,
                kind="openai" if address is None else "shoal",
                address=address or e.url or "",
                state="ready" if "blind" in self.flaws else e.state,
                epoch=0 if "blind" in self.flaws else e.epoch,
                restarts=0 if "blind" in self.flaws else e.restarts,
                requests=len(e.work),
                num_running=len(e.work),
                kv_usage=0.25 if leaking else len(e.work) / 100,
            )
            for e, (_, address) in zip(self.endpoints, kinds, strict=True)
        ]
        model = ModelStatus(name="tiny", policy="least", endpoints=endpoints, migrations=self.migrations)
        return FleetStatus(
            version="0", uptime=time.monotonic() - self.began, draining=False, models=[model], journal="memory"
        )

    # --- what clients see -------------------------------------------------------------------------------------------

    async def generate(self, request: Request) -> Response:
        if int(request.headers.get("content-length", 0)) > 1 << 20:
            return JSONResponse({"error": {"message": "too large"}}, 413)
        try:
            body = json.loads(await request.body())
            assert body["model"] == "tiny" and body["max_tokens"] > 0 and body.get("n", 1) <= 8
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
            return JSONResponse({"error": {"message": "a mistake of the client's"}}, 400)
        running = Running(f"r{len(self.requests)}", body)
        self.requests[running.id] = running
        self.place(list(running.sequences))
        if body.get("stream"):
            return self.stream(running, 0)
        while not (running.done or running.broken):
            await asyncio.sleep(TICK)
        if "error" in running.events[-1] or running.broken:
            return JSONResponse({"error": {"message": "an endpoint was lost"}}, 500)
        whole = [json.loads(event)["choices"] for event in running.events[:-1]]
        choices = [
            {
                "index": s.index,
                "text": s.text,
                "token_ids": s.tokens,
                "finish_reason": [c[0]["finish_reason"] for c in whole if c and c[0]["index"] == s.index][-1],
            }
            for s in running.sequences
        ]
        return JSONResponse({"choices": choices, "usage": running.usage})

    def stream(self, running: Running, start: int) -> Response:
        async def events() -> AsyncIterator[str]:
            at = start
            while True:
                running.changed.clear()
                while at < len(running.events):
                    yield f"id: {at}\ndata: {running.events[at]}\n\n"
                    at += 1
                if running.done and at == len(running.events):
                    return
                if running.broken:
                    raise ConnectionError("as the flaw has it")
                await running.changed.wait()

        return StreamingResponse(events(), headers={"x-request-id": running.id}, media_type="text/event-stream")

    async def resume(self, request: Request) -> Response:
        running = self.requests.get(request.path_params["id"])
        if running is None or running.broken:
            return JSONResponse({"error": {"message": "no such stream"}}, 404)
        return self.stream(running, int(request.headers.get("last-event-id", -1)) + 1)

    async def fleet(self, request: Request) -> Response:
        return Response(msgspec.json.encode(self.status()))

    async def ready(self, request: Request) -> Response:
        return JSONResponse({}, 200 if all(e.state == "ready" for e in self.endpoints) else 503)


async def gateway(flaws: list[str], deployment: Path, port: int) -> None:
    model = yaml.safe_load(deployment.read_text())["models"][0]
    fleet = Fleet(flaws, [e["openai"] for e in model.get("endpoints", [])] or [None] * model["replicas"])
    routes = [
        Route("/v1/chat/completions", fleet.generate, methods=["POST"]),
        Route("/v1/completions", fleet.generate, methods=["POST"]),
        Route("/v1/streams/{id}", fleet.resume),
        Route("/fleet", fleet.fleet),
        Route("/ready", fleet.ready),
    ]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=port, log_level="error"))
    running = asyncio.create_task(fleet.run())
    try:
        await server.serve()
    finally:
        running.cancel()
        for endpoint in fleet.endpoints:
            if endpoint.process is not None:
                endpoint.process.kill()
                endpoint.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--flaw", action="append", default=[])
    parser.add_argument("--deployment", type=Path)
    parser.add_argument("--port", type=int)
    given = parser.parse_args()
    asyncio.run(engine(given.port) if given.engine else gateway(given.flaw, given.deployment, given.port))


if __name__ == "__main__":
    main()
