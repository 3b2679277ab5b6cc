"""An OpenAI server with token ids on a real socket, whose faults are scripted, and the fleet's side of an attempt.

Its model is arithmetic: a greedy token depends on all tokens before it, a sampled one also on the seed and on how many
were drawn, as in a server that seeds a generator for each sequence.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

import msgspec

from shoal.core.fleet_types import EndpointFailure, EndpointReport
from shoal.core.types import Output, Rejected, Request

VOCAB = 997


class Fault(msgspec.Struct, kw_only=True):
    """What one completion does instead of ending well; `after` so many tokens of its first sequence."""

    kind: str
    """reset, eof, hang, error_event, abort, no_ids, status, or diverge (goes on, with other tokens)."""
    after: int = 0
    status: int = 503
    headers: dict[str, str] = {}
    body: dict[str, Any] = {}
    happened: bool = False


def next_token(tokens: list[int], seed: int | None, drawn: int) -> int:
    state = 17
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    if seed is not None:
        state = (state * 31 + seed * 7919 + drawn * 104_729) % 1_000_003
    return state % VOCAB


class OpenAIServer:
    """`async with OpenAIServer() as server`."""

    def __init__(self, *, owned_by: str = "vllm", cut: int | None = None, step_seconds: float = 0.0) -> None:
        self.owned_by = owned_by
        self.models = ["tiny"]
        self.cut = cut
        """Bytes a write: None is an event a write."""
        self.step_seconds = step_seconds
        self.faults: list[Fault] = []
        """Of the next completions, one each."""
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.closed_by_client = 0
        self.num_connections = 0
        self.polls_answered = asyncio.Event()
        self.polls_answered.set()
        self.open_polls = 0
        self.most_open_polls = 0
        self.steps = 0
        self.running = 0
        self.url = ""
        self.has_metrics = True
        self._writers: dict[asyncio.StreamWriter, None] = {}
        self._busy: dict[asyncio.StreamWriter, None] = {}
        self._shutting_down = False

    async def __aenter__(self) -> OpenAIServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = "http://{}:{}".format(*self._server.sockets[0].getsockname())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def die(self) -> None:
        """As a killed process: connections are reset, and new ones refused."""
        self._server.close()
        for writer in list(self._writers):
            reset(writer)
        await asyncio.sleep(0)

    def shut_down(self) -> None:
        """As on SIGTERM: no new connections, idle ones are closed, and streams under way are completed."""
        self._shutting_down = True
        self._server.close()
        self.close_idle_connections()

    def close_idle_connections(self) -> None:
        for writer in [writer for writer in self._writers if writer not in self._busy]:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._writers[writer] = None
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                path = head[0].split()[1]
                self.paths.append(path)
                self.headers.append(headers)
                self._busy[writer] = None
                try:
                    await self._answer(path, body, writer)
                finally:
                    self._busy.pop(writer)
                if self._shutting_down:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.pop(writer, None)
            writer.close()

    async def _answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            cards = [{"id": name, "owned_by": self.owned_by, "max_model_len": 512} for name in self.models]
            await self._whole(writer, 200, json.dumps({"object": "list", "data": cards}))
        elif path == "/metrics" and self.has_metrics:
            self.open_polls += 1
            self.most_open_polls = max(self.most_open_polls, self.open_polls)
            await self.polls_answered.wait()
            self.open_polls -= 1
            label = '{engine="0",model_name="tiny"}'
            lines = [
                f"vllm:num_requests_running{label} {self.running}.0",
                f"vllm:num_requests_waiting{label} 0.0",
                f"vllm:kv_cache_usage_perc{label} 0.25",
                f"vllm:iteration_tokens_total_count{label} {self.steps}.0",
                'vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="77"} 1.0',
            ]
            await self._whole(writer, 200, "\n".join(lines) + "\n")
        elif path == "/v1/completions":
            await self._complete(json.loads(body), writer)
        else:
            await self._whole(writer, 404, "{}")

    async def _whole(
        self, writer: asyncio.StreamWriter, status: int, body: str, headers: dict[str, str] | None = None
    ) -> None:
        extra = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
        writer.write(head.encode() + body.encode())
        await writer.drain()

    # --- completions ------------------------------------------------------------------------------------------------

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.bodies.append(body)
        is_probe = body["prompt"] == [0]
        fault = self.faults.pop(0) if self.faults and not is_probe else Fault(kind="none")
        if fault.kind == "status":
            fault.happened = True
            await self._whole(writer, fault.status, json.dumps(fault.body), fault.headers)
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        self.running += 1
        try:
            if not await self._tokens(body, fault, writer):
                return
            cached = {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 3}}
            await self._event(writer, {"choices": [], "usage": cached})
            await self._bytes(writer, b"data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        except ConnectionError:
            self.closed_by_client += 1
            raise
        finally:
            self.running -= 1

    async def _tokens(self, body: dict[str, Any], fault: Fault, writer: asyncio.StreamWriter) -> bool:
        """Whether the stream goes on to its end."""
        n = body.get("n", 1)
        resume = body.get("resume")
        given = {int(i): tokens for i, tokens in resume.items()} if resume else {i: [] for i in range(n)}
        generated = {i: list(tokens) for i, tokens in given.items()}
        unfinished = list(given)
        while unfinished:
            self.steps += 1
            await asyncio.sleep(self.step_seconds)
            for i in list(unfinished):
                if i == min(given) and len(generated[i]) - len(given[i]) == fault.after:
                    happened = await self._fault(fault, i, writer)
                    if happened:
                        return False
                choice = self._choice(body, i, generated[i], bool(resume), fault)
                if choice["finish_reason"] is not None:
                    unfinished.remove(i)
                await self._event(writer, {"id": "x", "choices": [choice]})
        return True

    def _choice(
        self, body: dict[str, Any], i: int, generated: list[int], resumed: bool, fault: Fault
    ) -> dict[str, Any]:
        # A seed's generator has come as far as this request has drawn, unless the server knows what went before.
        seed = body.get("seed")
        token = next_token(body["prompt"] + generated, None if seed is None else seed + i, len(generated))
        if fault.kind == "diverge" and len(generated) >= fault.after:
            fault.happened = True
            token = (token + 1) % VOCAB
        generated.append(token)
        stops = token in body.get("stop_token_ids", []) and len(generated) >= body.get("min_tokens", 0)
        finish = "stop" if stops else "length" if len(generated) >= body["max_tokens"] else None
        choice = {
            "index": i,
            "text": "",
            "token_ids": [token],
            "logprobs": None,
            "finish_reason": finish,
            "stop_reason": token if stops else None,
        }
        if body.get("logprobs") is not None:
            tops = {f"token_id:{token}": -0.5} | {f"token_id:{k}": -1.0 - k for k in range(body["logprobs"])}
            choice["logprobs"] = {
                "tokens": [f"token_id:{token}"],
                "token_logprobs": [-0.5],
                "top_logprobs": [tops],
                "text_offset": [0],
            }
        if fault.kind == "no_ids":
            fault.happened = True
            del choice["token_ids"]
        return choice

    async def _fault(self, fault: Fault, i: int, writer: asyncio.StreamWriter) -> bool:
        if fault.kind in ("none", "diverge", "no_ids"):
            return False
        fault.happened = True
        if fault.kind == "reset":
            reset(writer)
        elif fault.kind == "eof":
            writer.close()
        elif fault.kind == "hang":
            await asyncio.Event().wait()
        elif fault.kind == "error_event":
            await self._event(writer, {"error": {"message": "the engine core died", "code": 500}})
            writer.write(b"0\r\n\r\n")
        elif fault.kind == "abort":
            await self._event(writer, {"choices": [{"index": i, "token_ids": [], "finish_reason": "abort"}]})
            writer.write(b"0\r\n\r\n")
        return True

    async def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        await self._bytes(writer, b"data: " + json.dumps(event).encode() + b"\n\n")

    async def _bytes(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        size = self.cut or len(data)
        for start in range(0, len(data), size):
            part = data[start : start + size]
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()
            if self.cut:
                await asyncio.sleep(0)


def reset(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


# --- the fleet's side ----------------------------------------------------------------------------------------------


class RecordedAttempt:
    """Keeps what an endpoint says, and that it says nothing that it may not."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[Any]] = {}
        self.outputs: list[Output] = []
        self.finished: dict[int, Output] = {}
        self.reason: EndpointFailure | Rejected | None = None
        self.given_up = False
        self.over = asyncio.Event()
        self.progress = asyncio.Event()
        """Set with every output."""
        indices = range(request.n) if request.resume is None else request.resume
        self._open = dict.fromkeys(indices)

    def output(self, output: Output) -> None:
        assert self.reason is None and not self.given_up, "called after its end"
        assert output.request_id == self.request.id
        assert output.index in self._open, f"sequence {output.index} had ended, or was not asked for"
        assert output.token_ids or output.finish
        assert self.request.sampling.logprobs is None or len(output.logprobs) == len(output.token_ids)
        self.outputs.append(output)
        self.tokens.setdefault(output.index, []).extend(output.token_ids)
        self.logprobs.setdefault(output.index, []).extend(output.logprobs)
        if output.finish is not None:
            self.finished[output.index] = output
            del self._open[output.index]
        if not self._open:
            self.over.set()
        self.progress.set()

    def ended(self, reason: EndpointFailure | Rejected) -> None:
        assert self.reason is None and not self.given_up and self._open, "ended twice, or after its end"
        self.reason = reason
        self.over.set()
        self.progress.set()

    def aborted(self, index: int) -> None:
        del self._open[index]

    async def wait(self, seconds: float = 20) -> None:
        async with asyncio.timeout(seconds):
            await self.over.wait()

    async def wait_for_tokens(self, count: int, seconds: float = 20) -> None:
        """Of each of its sequences."""
        async with asyncio.timeout(seconds):
            while any(len(self.tokens.get(i, [])) < count for i in self._open) and not self.over.is_set():
                self.progress.clear()
                await self.progress.wait()


class RecordedFleet:
    def __init__(self) -> None:
        self.reports: list[EndpointReport] = []
        self.gone_because: str | None = None
        self.is_gone = asyncio.Event()

    def reported(self, name: str, report: EndpointReport) -> None:
        assert self.gone_because is None
        previous = [r.steps for r in self.reports if r.steps is not None]
        assert report.steps is None or not previous or report.steps >= previous[-1], "steps fell"
        self.reports.append(report)

    def gone(self, name: str, reason: str) -> None:
        assert self.gone_because is None, "gone twice"
        self.gone_because = reason
        self.is_gone.set()
