"""An endpoint that speaks OpenAI's HTTP API with token ids: vLLM, SGLang, or another shoal.

Here is how it starts and what it reports; what becomes of a request is in openai_attempt.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time

import msgspec

from shoal.core.fleet_types import EndpointFailure, EndpointKind, EndpointReport
from shoal.core.types import Rejected, Request, Sampling
from shoal.serve import openai_dialect as dialect
from shoal.serve.endpoint import Attempt, EndpointInfo, EndpointListener, EndpointStartError
from shoal.serve.http_client import Exchange, HttpClient, HttpError, HttpResponse
from shoal.serve.openai_attempt import CompletionStream, OpenAIAttempt, Sequence
from shoal.serve.openai_dialect import Body, Load, Server

_COMPLETIONS = "/v1/completions"
_BUSY_POLL_SECONDS = 0.5
_IDLE_POLL_SECONDS = 1.0
_LEAST_POLL_SECONDS = 0.05
_ANSWER_SECONDS = 10.0
"""For a poll. There is one at a time, so a server that hangs is asked once, not again and again."""
_START_SECONDS = 60.0
"""For each request of a start; the first generation may compile kernels."""
_REFUSED_SECONDS = 1.0
"""Without a byte while the server refuses connections, until a stream is given up."""
_REPORT_SECONDS = 0.1
"""Least time between reports of steps that were seen in streams."""
_DEFAULT_BLOCK_SIZE = 16

_encode = msgspec.json.Encoder().encode


class OpenAIEndpoint:
    """May be started again after it was gone: `start` learns anew what runs there."""

    kind: EndpointKind = "openai"
    info: EndpointInfo

    def __init__(
        self,
        name: str,
        url: str,
        *,
        vocab_size: int,
        model: str | None = None,
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
        max_sequences: int | None = None,
        idle_seconds: float = 60.0,
    ) -> None:
        """Raises ValueError, with a message for the user.

        `vocab_size` is of the gateway's own files of the model: these servers do not tell. `model` is needed where the
        server has several. A stream fails as hung after `idle_seconds` without a byte in which the server made no step
        either.
        """
        self.name = name
        self.address = url.rstrip("/").removesuffix("/v1")
        self._model = model
        self._vocab_size = vocab_size
        self._max_sequences = max_sequences
        self._idle_seconds = idle_seconds
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = HttpClient(self.address, headers=headers, tls=tls)
        self._listener: EndpointListener | None = None
        self.server: Server = "vllm"
        self.served_model = ""
        self._tries: dict[str, OpenAIAttempt] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._poll_path = "/metrics"
        self._steps = 0
        """Never falls: what the server counted, and between two polls what was seen in streams."""
        self._seen_steps = 0
        """In streams since the last poll; a part of `_steps`."""
        self._counted_steps: int | None = None
        """By the server at the last poll."""
        self._mark = 0
        self._progress_at = 0.0
        self._reported_at = 0.0
        self._load = Load()
        """As last polled."""

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self, listener: EndpointListener) -> None:
        await self._stop_watching()
        card = await self._model_card()
        self.server, self.served_model = dialect.server_of(card), card.id
        if card.max_model_len is None:
            raise self._start_error(f"/v1/models does not say the max_model_len of {card.id!r}")
        await self._try_out()
        page = await self._ask("GET", "/metrics")
        # Without a metrics page, whatever answers shows that the server lives.
        self._poll_path = "/metrics" if page.status == 200 else "/v1/models"
        load = dialect.load_of(page.body) if page.status == 200 else Load()
        self.info = EndpointInfo(
            max_len=card.max_model_len,
            vocab_size=self._vocab_size,
            block_size=load.block_size or _DEFAULT_BLOCK_SIZE,
            num_blocks=load.num_blocks,
            max_sequences=self._max_sequences,
            exact_resume=self.server == "shoal",
        )
        self._load, self._counted_steps, self._seen_steps = load, load.steps, 0
        self._progress_at = time.monotonic()
        self._listener = listener
        self._watcher = asyncio.create_task(self._watch(listener), name=f"watch {self.name}")

    async def stop(self) -> None:
        await self._stop_watching()
        for one in list(self._tries.values()):
            one.fail(EndpointFailure(kind="drained", message="the endpoint was taken away"))
        self._client.close()

    async def _stop_watching(self) -> None:
        if self._watcher is not None:
            watcher, self._watcher = self._watcher, None
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    async def _model_card(self) -> dialect.ModelCard:
        answer = await self._ask("GET", "/v1/models")
        if answer.status != 200:
            refusal = dialect.refusal_of("", answer.status, answer.headers, answer.body)
            raise self._start_error(refusal.reason if isinstance(refusal, Rejected) else refusal.message)
        try:
            return msgspec.json.decode(answer.body, type=dialect.Models).choose(self._model)
        except msgspec.DecodeError as error:
            raise self._start_error(f"/v1/models is not OpenAI's: {error}") from None
        except ValueError as error:
            raise self._start_error(str(error)) from None

    async def _try_out(self) -> None:
        """One token: that requests are taken, and that token ids come back, is better known before there are any."""
        request = Request(id="", prompt=[0], max_tokens=1, sampling=Sampling(temperature=0.0))
        body = dialect.body_of(request, self.served_model, self.server, time.monotonic())
        answer = await self._ask("POST", _COMPLETIONS, _encode(body))
        if answer.status != 200:
            refusal = dialect.refusal_of("", answer.status, answer.headers, answer.body)
            raise self._start_error(refusal.reason if isinstance(refusal, Rejected) else refusal.message)
        try:
            events = dialect.Events().feed(answer.body)
            chunks = [dialect.decode_chunk(event) for event in events if event != b"[DONE]"]
        except dialect.Unreadable as error:
            raise self._start_error(str(error)) from None
        for chunk in chunks:
            if chunk.error is not None:
                raise self._start_error(f"it cannot generate: {chunk.error.message}")
        if not any(choice.token_ids for chunk in chunks for choice in chunk.choices):
            raise self._start_error("it does not send token ids; vLLM and SGLang have return_token_ids since mid-2026")

    async def _ask(self, method: str, path: str, body: bytes | None = None) -> HttpResponse:
        try:
            return await self._client.fetch(method, path, body, seconds=_START_SECONDS)
        except HttpError as error:
            raise self._start_error(str(error)) from None

    def _start_error(self, message: str) -> EndpointStartError:
        return EndpointStartError(f"endpoint {self.name!r} at {self.address}: {message}")

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, attempt: Attempt) -> None:
        one = OpenAIAttempt(self, attempt)
        self._tries[attempt.request.id] = one
        one.begin()

    def abort(self, request_id: str, index: int | None = None) -> None:
        one = self._tries.get(request_id)
        if one is not None:
            one.abort(index)

    def send(self, body: Body, stream: CompletionStream) -> Exchange:
        return self._client.send("POST", _COMPLETIONS, _encode(body), stream)

    def forget(self, request_id: str) -> None:
        self._tries.pop(request_id, None)

    # --- reports ----------------------------------------------------------------------------------------------------

    def stepped(self, sequence: Sequence) -> None:
        """A sequence gets one chunk a step, so its second chunk since a step was seen is of another."""
        if sequence.mark == self._mark:
            self._mark += 1
            self._steps += 1
            self._seen_steps += 1
        sequence.mark = self._mark

    def progressed(self, now: float) -> None:
        self._progress_at = now
        if now - self._reported_at >= _REPORT_SECONDS and self._listener is not None:
            self._report(self._listener, now)

    def _report(self, listener: EndpointListener, now: float) -> None:
        self._reported_at = now
        listener.reported(
            self.name,
            EndpointReport(
                at=now,
                num_running=self._load.num_running,
                num_waiting=self._load.num_waiting,
                kv_usage=self._load.kv_usage,
                steps=self._steps,
            ),
        )

    def poll_soon(self) -> None:
        self._wake.set()

    async def _watch(self, listener: EndpointListener) -> None:
        was_closed = False
        while True:
            self._wake.clear()
            try:
                answer = await self._client.fetch("GET", self._poll_path, seconds=_ANSWER_SECONDS)
            except HttpError as error:
                # Before a server that is not there a balancer accepts connections, only to close them. Twice, for the
                # first may have been a connection that something else reset.
                if error.kind == "refused" or (error.kind == "closed" and was_closed):
                    if not self._still_completes(time.monotonic()):
                        self._watcher = None
                        listener.gone(self.name, str(error))
                        return
                elif error.kind == "closed":
                    self._wake.set()
                was_closed = error.kind == "closed"
            else:
                was_closed = False
                if answer.status == 200:
                    self._polled(listener, dialect.load_of(answer.body))
            self._end_idle_streams(time.monotonic())
            await asyncio.sleep(_LEAST_POLL_SECONDS)
            pause = _BUSY_POLL_SECONDS if self._tries else _IDLE_POLL_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause - _LEAST_POLL_SECONDS):
                    await self._wake.wait()

    def _polled(self, listener: EndpointListener, load: Load) -> None:
        now = time.monotonic()
        if load.steps is not None:
            if self._counted_steps is not None and load.steps > self._counted_steps:
                self._steps += max(load.steps - self._counted_steps - self._seen_steps, 0)
                self._progress_at = now
            self._counted_steps = load.steps
            self._seen_steps = 0
        self._load = load
        self._report(listener, now)

    def _still_completes(self, now: float) -> bool:
        """A server that shuts down refuses new connections while it completes its streams. vLLM on SIGTERM does not
        complete them: it ends its engine at once, and then waits without end for their clients to leave."""
        recent = [one.has_heard and now - one.heard_at <= _REFUSED_SECONDS for one in self._tries.values()]
        for one in list(self._tries.values()):
            if not any(recent) or now - one.heard_at > _REFUSED_SECONDS:
                one.fail(EndpointFailure(kind="lost", message="it refuses connections and sends nothing any more"))
        return any(recent)

    def _end_idle_streams(self, now: float) -> None:
        for one in list(self._tries.values()):
            silent = now - max(one.heard_at, self._progress_at)
            if silent > self._idle_seconds:
                one.fail(EndpointFailure(kind="hung", message=f"neither a token nor a step for {silent:.0f} s"))
