"""Mock OpenAI engines: vLLM's endpoints and stream format, tokens that can be checked, time by a law.

    python benchmarks/gateway.py mock --ports 8101,8102 --ttft-ms 20 --itl-ms 20

One process, an engine on each port. It says one line of JSON once all of them listen. Every chunk is put together from
ready-made bytes, for the mock shares a core with the load generator and must not be what is measured. Sampling
parameters, stop strings, logprobs and grammars have no effect: a request gets `max_tokens` tokens (gateway/tokens.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import Any
from zlib import crc32

import httptools
import uvloop

from gateway.timing import Law, Schedule
from gateway.tokens import Vocabulary, state_after, state_of, vocabulary

VERSION = "0.32.0"
"""Of vLLM, whose API this is."""
BLOCK_TOKENS = 128
"""Of a block of the prefix cache."""
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 503: "Service Unavailable"}


class BadRequest(Exception):
    """The client's mistake; the message is for it."""


class PrefixCache:
    """Which blocks of prompts were computed and not evicted since. Of a capacity of 0 it finds nothing."""

    def __init__(self, num_tokens: int) -> None:
        self._capacity = num_tokens // BLOCK_TOKENS
        self._blocks: OrderedDict[int, None] = OrderedDict()
        """By checksum of the prompt up to its end, least recently used first; of a prompt its end before its begin."""

    def use(self, prompt: list[int]) -> int:
        """Tokens of it that need not be computed; from now on all its blocks are there."""
        if not self._capacity:
            return 0
        data, size = memoryview(array("I", prompt)).cast("B"), 4 * BLOCK_TOKENS
        state, chain = 0, []
        for end in range(size, len(data) + 1, size):
            state = crc32(data[end - size : end], state)
            chain.append(state)
        found = next((number for number, block in enumerate(chain) if block not in self._blocks), len(chain))
        for block in reversed(chain[: self._capacity]):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
        return min(found * BLOCK_TOKENS, len(prompt) - 1)

    def clear(self) -> None:
        self._blocks.clear()


@dataclass
class Engine:
    """One of them: what all its connections share."""

    model: str
    vocabulary: Vocabulary
    schedule: Schedule
    max_len: int = 1 << 17
    cache: PrefixCache = field(default_factory=lambda: PrefixCache(0))
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    ids: Any = field(default_factory=count)

    def metrics(self) -> str:
        label = f'{{engine="0",model_name="{self.model}"}}'
        values = {
            "vllm:num_requests_running": ("gauge", self.schedule.num_running),
            "vllm:num_requests_waiting": ("gauge", self.schedule.num_waiting),
            "vllm:kv_cache_usage_perc": ("gauge", 0.0),
            "vllm:prompt_tokens_total": ("counter", self.prompt_tokens),
            "vllm:generation_tokens_total": ("counter", self.generated_tokens),
            "vllm:request_success_total": ("counter", self.finished),
            "vllm:iteration_tokens_total_count": ("counter", self.schedule.steps),
        }
        return "".join(f"# TYPE {name} {kind}\n{name}{label} {value}\n" for name, (kind, value) in values.items())

    def models(self) -> dict[str, Any]:
        card = {"id": self.model, "object": "model", "created": 0, "owned_by": "vllm", "parent": None, "permission": []}
        return {"object": "list", "data": [card | {"root": self.vocabulary.path, "max_model_len": self.max_len}]}


class Dialect:
    """What differs between completions and chat: ready-made bytes of each token's choice."""

    def __init__(self, words: Vocabulary, *, chat: bool) -> None:
        self.chat = chat
        self._words = words
        self.chunk_object = "chat.completion.chunk" if chat else "text_completion"
        self.object = "chat.completion" if chat else "text_completion"
        self.id_prefix = "chatcmpl-" if chat else "cmpl-"
        self.choice = lru_cache(maxsize=None)(self._choice)

    def _choice(self, index: int, token: int, with_ids: bool, finish: str | None) -> bytes:
        text = self._words.texts[token]
        said = {"delta": {"content": text}} if self.chat else {"text": text}
        ids = {"token_ids": [token]} if with_ids else {}
        choice = {"index": index, **said, "logprobs": None, "finish_reason": finish, "stop_reason": None, **ids}
        return json.dumps(choice, separators=(",", ":")).encode() + b"]}\n\n"

    def first(self, index: int, prompt: list[int] | None) -> bytes:
        """What a chat's stream begins with."""
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        ids = b"" if prompt is None else b',"prompt_token_ids":' + _compact(prompt)
        return _compact(choice) + b"]" + ids + b"}\n\n"

    def whole(self, index: int, tokens: list[int], with_ids: bool, prompt: list[int]) -> dict[str, Any]:
        text = self._words.text(tokens)
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        ids: dict[str, Any] = {"token_ids": tokens} if with_ids else {}
        if with_ids and not self.chat:
            ids["prompt_token_ids"] = prompt
        return {"index": index, **said, "logprobs": None, "finish_reason": "length", "stop_reason": None, **ids}


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class SaidSequence:
    """One of an answer's: a job of the schedule."""

    def __init__(self, answer: Answer, index: int) -> None:
        self.answer, self.index = answer, index
        self.num_prompt = answer.num_new if index == 0 else 0  # the prompt is computed once
        self.tokens: list[int] = []
        self.state = answer.state

    def step(self) -> bool:
        answer = self.answer
        token = answer.engine.vocabulary.next(self.state)
        self.state = state_after(self.state, token)
        self.tokens.append(token)
        answer.engine.generated_tokens += 1
        more = len(self.tokens) < answer.max_tokens
        answer.said(self, token, more)
        return more


class Answer:
    """A request under way."""

    def __init__(self, connection: Connection, dialect: Dialect, prompt: list[int], body: dict[str, Any]) -> None:
        engine = connection.engine
        self.engine, self.prompt = engine, prompt
        self._connection, self._dialect = connection, dialect
        default = 16 if not dialect.chat else engine.max_len - len(prompt)
        self.max_tokens: int = body.get("max_completion_tokens") or body.get("max_tokens") or default
        if not prompt or len(prompt) + self.max_tokens > engine.max_len:
            raise BadRequest(
                f"This model's maximum context length is {engine.max_len} tokens; the prompt has {len(prompt)}, "
                f"max_tokens is {self.max_tokens}"
            )
        self.state = state_of(prompt)
        # Prompts are computed in the order in which they come: what one leaves is there when the next begins.
        self.num_new = len(prompt) - engine.cache.use(prompt)
        self._with_ids = bool(body.get("return_token_ids"))
        self._stream = bool(body.get("stream"))
        self._usage = bool((body.get("stream_options") or {}).get("include_usage"))
        name = f"{dialect.id_prefix}{next(engine.ids):016x}"
        kind = dialect.chunk_object if self._stream else dialect.object
        self._head = {"id": name, "object": kind, "created": int(time.time()), "model": engine.model}
        self._prefix = b"data: " + _compact(self._head)[:-1] + b',"choices":['
        self.sequences = [SaidSequence(self, index) for index in range(body.get("n") or 1)]
        self._left = len(self.sequences)

    def begin(self) -> None:
        self.engine.prompt_tokens += len(self.prompt)
        if self._stream:
            self._connection.write(_STREAM_HEAD)
        for sequence in self.sequences:
            self.engine.schedule.add(sequence)

    def said(self, sequence: SaidSequence, token: int, more: bool) -> None:
        if self._stream:
            choice = self._dialect.choice(sequence.index, token, self._with_ids, None if more else "length")
            data = self._prefix + choice
            if len(sequence.tokens) == 1:
                data = self._first_chunk(sequence, data)
            framed = b"%x\r\n%b\r\n" % (len(data), data)
        if not more:
            self._left -= 1
        if self._left:
            if self._stream:
                self._connection.write(framed)
            return
        self.engine.finished += 1
        if self._stream:
            end = self._usage_chunk() if self._usage else b""
            self._connection.write(framed + end + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        else:
            choices = [self._dialect.whole(s.index, s.tokens, self._with_ids, self.prompt) for s in self.sequences]
            self._connection.reply(200, self._head | {"choices": choices, "usage": self._counts()})
        self._connection.done()

    def _first_chunk(self, sequence: SaidSequence, data: bytes) -> bytes:
        """With the prompt's ids where they are asked for; a chat begins with a chunk that names the role."""
        prompt = self.prompt if self._with_ids else None
        if self._dialect.chat:
            return self._prefix + self._dialect.first(sequence.index, prompt) + data
        if prompt is None:
            return data
        return data.removesuffix(b"}]}\n\n") + b',"prompt_token_ids":' + _compact(prompt) + b"}]}\n\n"

    def _counts(self) -> dict[str, int]:
        prompt, output = len(self.prompt), sum(len(sequence.tokens) for sequence in self.sequences)
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    def _usage_chunk(self) -> bytes:
        return _chunk(b"data: " + _compact(self._head | {"choices": [], "usage": self._counts()}) + b"\n\n")


class Connection(asyncio.Protocol):
    def __init__(self, engine: Engine, dialects: dict[bytes, Dialect]) -> None:
        self.engine = engine
        self._dialects = dialects
        self._answer: Answer | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self.write = transport.write
        self._parser = httptools.HttpRequestParser(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None:
            for sequence in self._answer.sequences:
                self.engine.schedule.remove(sequence)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_message_begin(self) -> None:
        self._url, self._body = b"", b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        path = self._url.partition(b"?")[0]
        if path in self._dialects:
            try:
                self._answer = self._read(self._dialects[path])
            except BadRequest as error:
                self.reply(400, {"error": {"message": str(error), "type": "BadRequestError", "code": 400}})
                return
            self._answer.begin()
        elif path == b"/v1/models":
            self.reply(200, self.engine.models())
        elif path == b"/metrics":
            self.reply(200, self.engine.metrics(), "text/plain; version=0.0.4")
        elif path == b"/reset_prefix_cache":
            self.engine.cache.clear()
            self.reply(200, "", "text/plain")
        elif path in (b"/health", b"/ping"):
            self.reply(200, "", "text/plain")
        elif path == b"/version":
            self.reply(200, {"version": VERSION})
        else:
            self.reply(404, {"error": {"message": "Not Found", "type": "NotFoundError", "code": 404}})

    def _read(self, dialect: Dialect) -> Answer:
        try:
            body = json.loads(self._body)
            prompt = body["messages"] if dialect.chat else body["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadRequest(f"not a request: {error}") from None
        words = self.engine.vocabulary
        if dialect.chat:
            prompt = words.encode_chat(prompt)
        elif isinstance(prompt, str):
            prompt = words.encode(prompt)
        elif not all(isinstance(token, int) for token in prompt):
            raise BadRequest("prompt: text or one list of token ids")
        return Answer(self, dialect, prompt, body)

    def reply(self, status: int, content: Any, kind: str = "application/json") -> None:
        data = content.encode() if isinstance(content, str) else _compact(content)
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\n\r\n"
        self.write(head.encode() + data)

    def done(self) -> None:
        self._answer = None


async def serve(engines: Sequence[Engine], ports: Sequence[int]) -> list[asyncio.Server]:
    """Each engine on its port of the loopback; 0 is any free one."""
    loop = asyncio.get_running_loop()
    servers = []
    for engine, port in zip(engines, ports, strict=True):
        words = engine.vocabulary
        dialects = {
            b"/v1/completions": Dialect(words, chat=False),
            b"/v1/chat/completions": Dialect(words, chat=True),
        }
        made = _factory(engine, dialects)
        servers.append(await loop.create_server(made, "127.0.0.1", port, backlog=4096))
    return servers


def _factory(engine: Engine, dialects: dict[bytes, Dialect]) -> Any:
    return lambda: Connection(engine, dialects)


def add_law_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ttft-ms", type=float, default=20.0, help="from the end of the prefill to the first token")
    parser.add_argument("--itl-ms", type=float, default=20.0, help="between two tokens of a sequence")
    parser.add_argument("--prefill-rate", type=float, default=0.0, help="prompt tokens a second; 0: no time")
    parser.add_argument("--slots", type=int, default=1 << 20, help="sequences that run at once; others wait")


def law_of(arguments: argparse.Namespace) -> Law:
    return Law(arguments.ttft_ms / 1e3, arguments.itl_ms / 1e3, arguments.prefill_rate, arguments.slots)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="gateway.py mock", description="Mock OpenAI engines.")
    parser.add_argument("--ports", default="8101,8102", help="one engine on each; 0: any free port")
    parser.add_argument("--model", default="mock", help="its name in the API")
    parser.add_argument("--tokenizer", default="smollm2-135m", help="built-in name or path; empty: none")
    parser.add_argument("--max-len", type=int, default=1 << 17)
    parser.add_argument("--cache-tokens", type=int, default=0, help="of each engine's prefix cache; 0: none")
    add_law_options(parser)
    arguments = parser.parse_args(argv)
    uvloop.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> None:
    words, law = vocabulary(arguments.tokenizer), law_of(arguments)
    ports = [int(port) for port in arguments.ports.split(",")]
    engines = [
        Engine(arguments.model, words, Schedule(law), arguments.max_len, PrefixCache(arguments.cache_tokens))
        for _ in ports
    ]
    servers = await serve(engines, ports)
    print(json.dumps({"ports": [server.sockets[0].getsockname()[1] for server in servers]}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
