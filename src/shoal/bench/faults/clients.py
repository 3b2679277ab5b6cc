"""Clients that remember every token and its time, that take a lost gateway for a pause, and that never repeat quietly.

A stream whose connection is lost is taken up at any gateway (`GET /v1/streams/ID` with `Last-Event-ID`, where ID is the
answer's `x-request-id`); a request that had no answer at all is sent again.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import msgspec

from shoal.bench.faults.workload import Spec
from shoal.bench.http_client import Answer, ConnectionLost, Exchange, events

End = Literal["completed", "refused", "expired", "failed", "lost"]
"""refused: not accepted (429 or 503) · expired: ended at its own deadline with what it had · failed: ended with an
error that says so · lost: no end within the bound."""
Phase = Literal["queued", "prefill", "first_token", "decode", "last_token", "unseen"]
"""unseen: its answer comes whole."""
_RETRY_SECONDS = 0.05
_LONGEST_BACKOFF = 1.0


class Choice(msgspec.Struct):
    """One generation, as it came."""

    token_ids: list[int] = []
    times: list[float] = []
    """Monotonic second of each token; empty where the answer came whole."""
    text: str = ""
    logprobs: list[float] = []
    finish: str | None = None


class Outcome(msgspec.Struct):
    """What came of one request."""

    spec: int
    request_id: str
    sent: float
    choices: dict[int, Choice] = {}
    end: End | None = None
    ended: float = 0.0
    error: str = ""
    usage: tuple[int, int] | None = None
    """Tokens of the prompt and of the answer, as the server counted them."""
    breaks: int = 0
    """Connections lost after an answer had begun."""
    unanswered: int = 0
    """Connections lost before that."""
    resumed: int = 0
    server_id: str | None = None
    """The request's id as the server answered it; streams are resumed under it."""
    last_event: str | None = None
    retry_after: float | None = None

    @property
    def num_tokens(self) -> int:
        """Of the choice that is furthest."""
        return max((len(choice.token_ids) for choice in self.choices.values()), default=0)

    @property
    def first_token(self) -> float | None:
        return min((choice.times[0] for choice in self.choices.values() if choice.times), default=None)

    def gaps(self) -> Iterator[tuple[float, float]]:
        """(from, until) of every two tokens of a choice that follow each other."""
        for choice in self.choices.values():
            yield from zip(choice.times, choice.times[1:], strict=False)


class Client:
    """Sends requests to whichever gateway answers."""

    def __init__(
        self, gateways: Callable[[], Sequence[str]], headers: dict[str, str], *, patience: float, name: str
    ) -> None:
        self._gateways = gateways
        self._headers = headers
        self._patience = patience
        self._name = name
        self._count = 0
        self.live: dict[str, tuple[Outcome, Spec]] = {}
        """Under way, by request id."""
        self.on_progress: Callable[[Outcome, Spec], None] = lambda outcome, spec: None
        """Called when a request was sent and with every event of it."""

    async def run(self, spec: Spec) -> Outcome:
        """To its end, or for `patience` seconds."""
        self._count += 1
        outcome = Outcome(spec.number, f"{self._name}-{self._count}", time.monotonic())
        self.live[outcome.request_id] = outcome, spec
        self.on_progress(outcome, spec)
        try:
            async with asyncio.timeout(self._patience):
                await self._until_ended(outcome, spec)
        except TimeoutError:
            outcome.end, outcome.error = "lost", outcome.error or f"no end within {self._patience:g} s"
        finally:
            del self.live[outcome.request_id]
        outcome.ended = time.monotonic()
        return outcome

    async def _until_ended(self, outcome: Outcome, spec: Spec) -> None:
        while True:
            for url in self._gateways():
                try:
                    exchange = await Exchange.connect(url)
                except ConnectionLost as error:
                    outcome.error = str(error)
                    continue
                try:
                    if await self._exchange(exchange, outcome, spec):
                        return
                except ConnectionLost as error:
                    outcome.breaks += exchange.answered
                    outcome.unanswered += not exchange.answered
                    outcome.error = str(error)
                finally:
                    exchange.close()
            await asyncio.sleep(_RETRY_SECONDS)

    async def _exchange(self, exchange: Exchange, outcome: Outcome, spec: Spec) -> bool:
        """One connection's worth; whether the request has ended. Raises ConnectionLost."""
        headers = self._headers | {"x-request-id": outcome.request_id}
        resumes = spec.stream and outcome.server_id is not None
        if resumes:
            last = {} if outcome.last_event is None else {"last-event-id": outcome.last_event}
            await exchange.send("GET", f"/v1/streams/{outcome.server_id}", headers | last)
        else:
            await exchange.send("POST", spec.path, headers, json.dumps(spec.body).encode())
        status = await exchange.head()
        if status == 200 and spec.stream:
            outcome.resumed += resumes
            outcome.server_id = exchange.headers.get("x-request-id", outcome.server_id)
            return await self._read_stream(exchange, outcome, spec)
        answer = await exchange.whole()
        if status == 200:
            _take_whole(outcome, answer)
            self.on_progress(outcome, spec)
            return True
        return self._refused(answer, outcome, resumes)

    def _refused(self, answer: Answer, outcome: Outcome, resumes: bool) -> bool:
        if resumes and answer.status == 404 and not outcome.num_tokens:
            outcome.server_id = None  # nothing of it was kept: as if it had not been sent
            return False
        if answer.status == 503 and len(self._gateways()) > 1 and not outcome.num_tokens:
            outcome.error = answer.body.decode("utf-8", "replace")[:200]
            if _error_code(answer) == "draining":
                return False  # this gateway is on its way out, the other is not
        outcome.end = "refused" if answer.status in (429, 503) and not outcome.num_tokens else "failed"
        outcome.error = f"{answer.status}: {answer.body.decode('utf-8', 'replace')[:200]}"
        wait = answer.headers.get("retry-after", "")
        outcome.retry_after = float(wait) if wait.replace(".", "", 1).isdigit() else None
        return True

    async def _read_stream(self, exchange: Exchange, outcome: Outcome, spec: Spec) -> bool:
        async for event_id, data in events(exchange.chunks()):
            if event_id is not None:
                outcome.last_event = event_id
            if data == "[DONE]":
                _end_of_stream(outcome, spec)
                return True
            body = json.loads(data)
            if "error" in body:
                outcome.end, outcome.error = "failed", json.dumps(body["error"])[:200]
                return True
            _take_chunk(outcome, body)
            self.on_progress(outcome, spec)
        raise ConnectionLost("the stream ended without [DONE]")


def _end_of_stream(outcome: Outcome, spec: Spec) -> None:
    finished = [choice for choice in outcome.choices.values() if choice.finish is not None]
    if any(choice.finish == "deadline" for choice in finished):
        outcome.end = "expired"
    elif len(finished) == spec.num_choices:
        outcome.end = "completed"
    else:
        outcome.end = "failed"
        outcome.error = f"[DONE] came with {len(finished)} of {spec.num_choices} choices finished"


def _error_code(answer: Answer) -> str:
    try:
        return str(answer.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return ""


def _take_chunk(outcome: Outcome, body: dict[str, Any]) -> None:
    now = time.monotonic()
    for part in body["choices"]:
        choice = outcome.choices.setdefault(part["index"], Choice())
        ids = part.get("token_ids") or []
        choice.token_ids += ids
        choice.times += [now] * len(ids)
        choice.text += part["text"] if "text" in part else part["delta"].get("content") or ""
        choice.logprobs += _logprobs(part)
        choice.finish = part.get("finish_reason") or choice.finish
    _take_usage(outcome, body)


def _take_whole(outcome: Outcome, answer: Answer) -> None:
    body = answer.json()
    for part in body["choices"]:
        text = part["text"] if "text" in part else part["message"]["content"] or ""
        outcome.choices[part["index"]] = Choice(
            list(part.get("token_ids") or []), [], text, _logprobs(part), part["finish_reason"]
        )
    _take_usage(outcome, body)
    expired = any(choice.finish == "deadline" for choice in outcome.choices.values())
    outcome.end = "expired" if expired else "completed"


def _take_usage(outcome: Outcome, body: dict[str, Any]) -> None:
    if usage := body.get("usage"):
        outcome.usage = usage["prompt_tokens"], usage["completion_tokens"]


def _logprobs(part: dict[str, Any]) -> list[float]:
    given = part.get("logprobs")
    if not given:
        return []
    if "token_logprobs" in given:
        return list(given["token_logprobs"])
    return [entry["logprob"] for entry in given["content"] or []]


class Load:
    """As many clients as there are `streams`, each sending one request after the other until told to stop."""

    def __init__(self, client: Client, specs: Sequence[Spec], lengths: dict[int, int], *, streams: int, seed: int):
        self._client = client
        self._specs = specs
        self._lengths = lengths
        """Tokens of each request's longest choice, from the undisturbed run."""
        self._streams = streams
        self._rng = random.Random(seed)
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._watchers: list[tuple[Phase, asyncio.Future[str]]] = []
        self.prefill_seconds = 0.05
        """A request without a token after so long is taken to be in its prefill."""
        self.outcomes: list[Outcome] = []
        client.on_progress = self._progress

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._one_client()) for _ in range(self._streams)]

    async def stop(self) -> None:
        """No new requests; those under way come to their end."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def reach(self, phase: Phase, seconds: float) -> bool:
        """Until some request enters the phase. Returns at that very event, before another token is read."""
        watcher: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._watchers.append((phase, watcher))
        try:
            async with asyncio.timeout(seconds):
                await watcher
            return True
        except TimeoutError:
            return False
        finally:
            self._watchers.remove((phase, watcher))

    def census(self) -> dict[Phase, int]:
        """Requests under way, by phase."""
        found: dict[Phase, int] = {}
        for outcome, spec in self._client.live.values():
            phase = self._phase(outcome, spec)
            found[phase] = found.get(phase, 0) + 1
        return found

    def _phase(self, outcome: Outcome, spec: Spec) -> Phase:
        done = outcome.num_tokens
        if not spec.stream:
            return "unseen"
        if done == 0:
            return "prefill" if time.monotonic() - outcome.sent >= self.prefill_seconds else "queued"
        if done == 1:
            return "first_token"
        return "last_token" if done >= self._lengths.get(spec.number, 1 << 30) - 1 else "decode"

    def _progress(self, outcome: Outcome, spec: Spec) -> None:
        if not self._watchers:
            return
        phase = self._phase(outcome, spec)
        self._wake(phase)
        if phase == "queued":
            asyncio.get_running_loop().call_later(self.prefill_seconds, self._look_again, outcome, spec)

    def _look_again(self, outcome: Outcome, spec: Spec) -> None:
        if outcome.end is None and self._phase(outcome, spec) == "prefill":
            self._wake("prefill")

    def _wake(self, phase: Phase) -> None:
        for wanted, watcher in self._watchers:
            if wanted == phase and not watcher.done():
                watcher.set_result(phase)

    async def _one_client(self) -> None:
        order: list[Spec] = []
        while not self._stopping:
            if not order:
                order = self._rng.sample(self._specs, len(self._specs))
            outcome = await self._client.run(order.pop())
            self.outcomes.append(outcome)
            if outcome.end == "refused":
                await asyncio.sleep(min(outcome.retry_after or _LONGEST_BACKOFF, _LONGEST_BACKOFF))
