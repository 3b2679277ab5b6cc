"""Endpoints that do what a test tells them, the clients of their fleet, and the fleet."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

from shoal.core.admission import AdmissionConfig
from shoal.core.degradation import Degrader
from shoal.core.engine_core import sequences_of
from shoal.core.failover import FailoverConfig
from shoal.core.fleet_types import EndpointFailure, EndpointReport, FailureKind
from shoal.core.health import HealthConfig
from shoal.core.retry_budget import RetryBudget
from shoal.core.router import RoutingConfig
from shoal.core.types import Output, Request
from shoal.serve.endpoint import Attempt, EndpointInfo, EndpointListener
from shoal.serve.errors import ApiError
from shoal.serve.fleet import Fleet, SupervisionConfig
from shoal.serve.flight import Flight
from shoal.serve.pool import Pool

LENGTH = 12


def token(index: int, position: int) -> int:
    """What any endpoint draws there."""
    return 100 * index + position


class ScriptedEndpoint:
    """Does what it is told, one attempt at a time. Attempts that it has lost or that were taken from it are remembered,
    for what it may say late."""

    kind = "shoal"
    address = "in this test"

    def __init__(self, name: str, max_sequences: int = 64) -> None:
        self.name = name
        self.info = EndpointInfo(
            max_len=1000, vocab_size=10_000, block_size=16, max_sequences=max_sequences, exact_resume=True
        )
        self.attempts: dict[str, tuple[Attempt, dict[int, list[int]]]] = {}
        self.gone: list[tuple[Attempt, dict[int, list[int]]]] = []
        self.steps = 0
        self.listener: EndpointListener
        self.starts = 0

    async def start(self, listener: EndpointListener) -> None:
        self.listener = listener
        self.starts += 1

    async def stop(self) -> None:
        pass

    def submit(self, attempt: Attempt) -> None:
        sequences = {index: list(tokens) for index, tokens in sequences_of(attempt.request).items()}
        for index, tokens in sequences.items():
            assert tokens == [token(index, position) for position in range(len(tokens))], "resumed with what it has"
            assert len(tokens) < attempt.request.max_tokens, "something is left to do"
        self.attempts[attempt.request.id] = attempt, sequences

    def abort(self, request_id: str, index: int | None = None) -> None:
        found = self.attempts.get(request_id)
        if found is None:
            return
        if index is not None:
            found[1].pop(index, None)
        if index is None or not found[1]:
            self.gone.append(self.attempts.pop(request_id))

    def step(self, request_id: str, count: int = 1) -> None:
        """Draw tokens of every sequence of an attempt."""
        attempt, sequences = self.attempts[request_id]
        self.steps += 1
        self.listener.reported(self.name, EndpointReport(at=asyncio.get_running_loop().time(), steps=self.steps))
        self._draw(attempt, sequences, count)
        if not sequences:
            self.attempts.pop(request_id, None)

    def _draw(self, attempt: Attempt, sequences: dict[int, list[int]], count: int) -> None:
        for index, tokens in list(sequences.items()):
            new = [token(index, p) for p in range(len(tokens), min(len(tokens) + count, attempt.request.max_tokens))]
            tokens += new
            done = len(tokens) == attempt.request.max_tokens
            if done:
                del sequences[index]
            attempt.output(Output(attempt.request.id, index, new, finish="length" if done else None))

    def speak_late(self) -> None:
        """As one that wakes up, of everything that was taken from it."""
        for attempt, sequences in self.gone:
            self._draw(attempt, {index: list(tokens) for index, tokens in sequences.items()}, 3)

    def fail(self, request_id: str, kind: FailureKind) -> None:
        self.gone.append(self.attempts.pop(request_id))
        self.gone[-1][0].ended(EndpointFailure(kind=kind, message="as told"))

    def die(self) -> None:
        for request_id in list(self.attempts):
            self.fail(request_id, "lost")
        self.listener.gone(self.name, "it died")


class Client:
    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, str] = {}
        self.error: ApiError | None = None

    def output(self, output: Output) -> None:
        assert self.error is None and output.index not in self.finish, "nothing comes after the end"
        assert output.finish != "lost"
        self.tokens.setdefault(output.index, []).extend(output.token_ids)
        if output.finish is not None:
            self.finish[output.index] = output.finish

    def failed(self, error: ApiError) -> None:
        assert self.error is None
        self.error = error

    def check(self) -> None:
        for index, tokens in self.tokens.items():
            assert tokens == [token(index, position) for position in range(len(tokens))], "a token is lost or repeated"


class Scene:
    """A fleet of scripted endpoints, whose clock is the loop's."""

    def __init__(self, count: int, **failover: Any) -> None:
        self.events: list[str] = []
        self.pool = Pool(
            "m",
            RoutingConfig(policy="least_tokens"),
            FailoverConfig(**({"again_seconds": 0.0} | failover)),
            AdmissionConfig(),
            RetryBudget(ratio=1.0, floor=100.0),
            lambda kind, message: self.events.append(kind),
        )
        health = HealthConfig(stall_seconds=0.3, first_seconds=0.3, fence_seconds=0.1)
        supervision = SupervisionConfig(restart_seconds=0.01)
        self.fleet = Fleet({"m": self.pool}, Degrader({}, ["m"]), health, supervision)
        self.endpoints = [ScriptedEndpoint(f"e{number}") for number in range(count)]
        self.clients: dict[str, Client] = {}
        self.flights: dict[str, Flight] = {}
        self._ids = itertools.count()

    async def __aenter__(self) -> Scene:
        await asyncio.gather(*(self.fleet.add(endpoint, self.pool) for endpoint in self.endpoints))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.fleet.stop()

    def ask(self, **fields: Any) -> str:
        request = Request(id=f"r{next(self._ids)}", prompt=[1, 2, 3], **({"max_tokens": LENGTH} | fields))
        self.clients[request.id] = Client()
        self.flights[request.id] = self.pool.submit(request, self.clients[request.id])
        return request.id

    def running(self) -> Iterator[tuple[ScriptedEndpoint, str]]:
        for endpoint in self.endpoints:
            for request_id in list(endpoint.attempts):
                yield endpoint, request_id

    async def do(self, action: str, argument: Any, random: Any) -> None:
        """One step of a story; those that need a running attempt do nothing without one."""
        endpoint = self.endpoints[argument] if action in ("die", "late", "drain") else None
        if action == "ask":
            self.ask(n=argument)
        elif action == "die" and endpoint:
            endpoint.die()
        elif action == "late" and endpoint:
            endpoint.speak_late()
        elif action == "drain" and endpoint:
            member = self.fleet.member(endpoint.name)
            member.draining = not member.draining
            self.pool.move_all(member, EndpointFailure(kind="drained", message="told"))
        elif action == "wait":
            await self.settle()
        elif running := list(self.running()):
            self._do_to(*random.choice(running), action, argument)

    def _do_to(self, endpoint: ScriptedEndpoint, attempt_id: str, action: str, argument: Any) -> None:
        flight = self.flights[attempt_id.rpartition(".")[0]]
        if action == "step":
            endpoint.step(attempt_id, argument)
        elif action == "fail":
            endpoint.fail(attempt_id, argument)
        elif action == "workers":
            attempt, _ = endpoint.attempts[attempt_id]
            attempt.output(Output(attempt_id, 0, [], finish="lost", error="a rank died"))
        else:
            flight.abort(argument if action == "abort" else None)

    async def settle(self) -> None:
        """Let what is due happen: moves, restarts."""
        await asyncio.sleep(0.03)

    async def finish(self) -> None:
        """Everything to its end."""
        for _ in range(200):
            await asyncio.sleep(0.005)
            for endpoint, request_id in self.running():
                if request_id in endpoint.attempts:
                    endpoint.step(request_id, LENGTH)
            if not self.pool.flights:
                return
        raise AssertionError(f"these did not end: {list(self.pool.flights)}")
