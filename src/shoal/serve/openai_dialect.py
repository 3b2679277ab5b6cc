"""OpenAI's completions as an endpoint's dialect: request bodies, stream chunks, errors and metrics of vLLM, SGLang and
shoal. Pure functions over bytes and types: no socket, no clock.

Prompts and outputs are token ids throughout; the servers' text is ignored.
"""

from __future__ import annotations

import math
import re
from difflib import get_close_matches
from typing import Any, Literal

import msgspec

from shoal.core.fleet_types import EndpointFailure
from shoal.core.types import FinishReason, Grammar, Rejected, Request, TokenLogprobs

Server = Literal["vllm", "sglang", "shoal"]
"""Whose fields are spoken. Servers that say none of these names are spoken to as vLLM."""

_MAX_SEED = 1 << 62
"""Seeds are sent to others modulo this, so that seed + index is still one; vLLM also takes -1 for none."""
_ID_PREFIX = "token_id:"
_OF_ENDPOINT = (401, 403, 404, 408)
"""4xx that say nothing of the request: a wrong key, a model that is gone, a proxy's patience."""
_MAX_MESSAGE = 500


# --- requests -------------------------------------------------------------------------------------------------------


class Body(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Of /v1/completions. What has no default here is sent always: servers have defaults of their own, from the
    checkpoint's generation_config.json."""

    model: str
    prompt: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int | None = None
    n: int = 1
    min_tokens: int = 0
    stop_token_ids: list[int] = []
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    return_tokens_as_token_ids: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool
    stream_options: dict[str, bool]
    return_token_ids: bool
    cache_salt: str = ""
    priority: int = 0
    timeout: float | None = None
    """Seconds."""
    resume: dict[int, list[int]] | None = None
    structured_outputs: dict[str, Any] | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None


def body_of(request: Request, model: str, server: Server, now: float) -> Body:
    """All sequences of a request as shoal takes them; for others `replay_of` and `continuation_of` make one of it.

    Stop strings are not sent: the text is made elsewhere, and stopping there is an abort here. SGLang refuses
    priorities unless it is configured to take them, so it gets none.
    """
    sampling = request.sampling
    own = server == "shoal"
    body = Body(
        model=model,
        prompt=request.prompt,
        max_tokens=request.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or -1,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed if sampling.temperature > 0.0 else None,
        n=request.n,
        min_tokens=request.min_tokens,
        stop_token_ids=request.stop_token_ids,
        logit_bias=sampling.logit_bias,
        logprobs=sampling.logprobs,
        return_tokens_as_token_ids=sampling.logprobs is not None,
        # The request's stop ids are all there are. SGLang with ignore_eos ignores them too.
        ignore_eos=server != "sglang" or not request.stop_token_ids,
        skip_special_tokens=False,
        stream=True,
        stream_options={"include_usage": True},
        return_token_ids=True,
        cache_salt=request.cache_salt,
        priority=0 if server == "sglang" else request.priority,
        timeout=max(request.deadline - now, 0.001) if own and request.deadline is not None else None,
        resume=request.resume if own else None,
    )
    return body if sampling.grammar is None else _constrained(body, sampling.grammar, server)


def _constrained(body: Body, grammar: Grammar, server: Server) -> Body:
    if server != "sglang":
        source: Any = grammar.source
        field = {"json_schema": "json", "ebnf": "grammar"}.get(grammar.kind, grammar.kind)
        if grammar.kind == "choice":
            source = msgspec.json.decode(grammar.source)
        elif grammar.kind == "json_object":
            source = True
        return msgspec.structs.replace(body, structured_outputs={field: source})
    if grammar.kind == "regex":
        return msgspec.structs.replace(body, regex=grammar.source)
    if grammar.kind == "ebnf":
        return msgspec.structs.replace(body, ebnf=grammar.source)
    if grammar.kind == "choice":
        choices = "|".join(re.escape(choice) for choice in msgspec.json.decode(grammar.source, type=list[str]))
        return msgspec.structs.replace(body, regex=f"({choices})")
    return msgspec.structs.replace(body, json_schema=grammar.source or '{"type": "object"}')


def needs_replay(request: Request) -> bool:
    """Whether what a server without `resume` draws next depends on more of what it generated than its tokens as a
    prompt tell: how often a token was *generated*, where the grammar is, how far a seed's generator has come.

    `min_tokens` does not: the rest of it is asked for. Nor does repetition_penalty, which counts the prompt as well.
    """
    sampling = request.sampling
    penalised = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
    return sampling.temperature > 0.0 or penalised or sampling.grammar is not None


def replay_of(body: Body, request: Request, index: int) -> Body:
    """One sequence from its start. vLLM gives sequence i of n the seed plus i; the same is done here, with n = 1, since
    it refuses n > 1 of a greedy request and since a sequence alone must be able to draw the same again."""
    return msgspec.structs.replace(body, n=1, seed=_seed(body, request, index))


def continuation_of(body: Body, request: Request, index: int, given: list[int]) -> Body:
    """One sequence, with what it has generated as part of the prompt."""
    return msgspec.structs.replace(
        body,
        n=1,
        prompt=request.prompt + given,
        max_tokens=request.max_tokens - len(given),
        min_tokens=max(request.min_tokens - len(given), 0),
        # Drawing the first numbers of the seed once more would tie the tokens after the seam to those before it.
        seed=_seed(body, request, index + len(given)),
    )


def _seed(body: Body, request: Request, offset: int) -> int | None:
    """None of a greedy request: vLLM makes a generator for every sequence with a seed, which costs speed."""
    return None if body.seed is None else request.sampling.seed % _MAX_SEED + offset


# --- what comes back ------------------------------------------------------------------------------------------------


class Logprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(msgspec.Struct):
    index: int = 0
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    matched_stop: int | str | None = None
    """SGLang's name for stop_reason."""


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens_details: _PromptDetails | None = None

    @property
    def cached(self) -> int:
        details = self.prompt_tokens_details
        return (details.cached_tokens or 0) if details is not None else 0


class Error(msgspec.Struct):
    message: str = ""
    param: str | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Error | None = None


class Unreadable(Exception):
    """A stream is not what was asked for."""


_decode_chunk = msgspec.json.Decoder(Chunk).decode


def decode_chunk(event: bytes) -> Chunk:
    try:
        return _decode_chunk(event)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unreadable(f"its stream is not OpenAI's: {error}") from None


class Events:
    """Server-sent events out of bytes, cut anywhere. Only `data` lines, each of which is one event here."""

    MAX_LINE = 32 << 20

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Raises Unreadable where a line has no end."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > self.MAX_LINE:
            raise Unreadable(f"an event is larger than {self.MAX_LINE} bytes")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


def logprobs_of(logprobs: Logprobs | None, num_tokens: int, num_top: int) -> list[TokenLogprobs]:
    """One entry a token. Raises Unreadable where the server did not send that, or named tokens by their text."""
    if logprobs is None or len(logprobs.token_logprobs) != num_tokens:
        raise Unreadable("the endpoint sent no log-probabilities for some tokens")
    tops = logprobs.top_logprobs or [None] * num_tokens
    if len(tops) != num_tokens:
        raise Unreadable("the endpoint sent no log-probabilities for some tokens")
    entries = []
    for logprob, top in zip(logprobs.token_logprobs, tops, strict=True):
        # The drawn token is among them even if it is not among the most probable.
        ranked = sorted((top or {}).items(), key=lambda item: -item[1])[:num_top]
        ids = [_token_id(name) for name, _ in ranked]
        entries.append(TokenLogprobs(-9999.0 if logprob is None else logprob, ids, [value for _, value in ranked]))
    return entries


def _token_id(name: str) -> int:
    if not name.startswith(_ID_PREFIX) or not name[len(_ID_PREFIX) :].isdecimal():
        raise Unreadable("the endpoint names the tokens of log-probabilities by their text, not by id")
    return int(name[len(_ID_PREFIX) :])


FINISHES: dict[str, FinishReason] = {"stop": "stop", "length": "length", "deadline": "deadline"}
"""Of the server's reasons, those that are the sequence's end; with any other it lost the sequence."""


def stop_token_of(choice: Choice, stop_token_ids: list[int]) -> int | None:
    reason = choice.stop_reason if choice.stop_reason is not None else choice.matched_stop
    if isinstance(reason, int):
        return reason
    last = choice.token_ids[-1] if choice.token_ids else None
    return last if last in stop_token_ids else None


class _ErrorBody(msgspec.Struct):
    error: Error | str | None = None
    message: str = ""
    detail: Any = None


def refusal_of(request_id: str, status: int, headers: dict[bytes, bytes], content: bytes) -> EndpointFailure | Rejected:
    """What an answer other than 200 means."""
    message, field = _error_message(content)
    said = f"{status}: {message[:_MAX_MESSAGE]}" if message else str(status)
    if status in (429, 503):
        return EndpointFailure(kind="overloaded", message=f"it answered {said}", retry_after=_retry_after(headers))
    if 400 <= status < 500 and status not in _OF_ENDPOINT:
        return Rejected(request_id, message[:_MAX_MESSAGE] or f"the endpoint answered {status}", field)
    hint = "; check the endpoint's api_key" if status in (401, 403) else ""
    return EndpointFailure(kind="error", message=f"it answered {said}{hint}")


def _error_message(content: bytes) -> tuple[str, str | None]:
    try:
        body = msgspec.json.decode(content, type=_ErrorBody)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return content.decode("utf-8", "replace").strip(), None
    if isinstance(body.error, Error):
        return body.error.message, body.error.param
    return body.error or body.message or (str(body.detail) if body.detail else ""), None


def _retry_after(headers: dict[bytes, bytes]) -> float | None:
    """Seconds. The form with a date is not taken: no inference server sends it."""
    value = headers.get(b"retry-after", b"").strip()
    return float(value) if re.fullmatch(rb"\d{1,6}(\.\d{1,6})?", value) else None


# --- what it says of itself -----------------------------------------------------------------------------------------


class ModelCard(msgspec.Struct):
    id: str
    owned_by: str = ""
    max_model_len: int | None = None
    parent: str | None = None
    """Of an adapter, the model that it adapts."""


class Models(msgspec.Struct):
    data: list[ModelCard]

    def choose(self, name: str) -> ModelCard:
        """Raises ValueError, with a message for the user."""
        if name:
            for card in self.data:
                if card.id == name:
                    return card
            near = get_close_matches(name, [card.id for card in self.data], n=1, cutoff=0.3)
            has = f"did you mean {near[0]!r}?" if near else f"it has {_listed(self.data)}"
            raise ValueError(f"it has no model {name!r}; {has}")
        base = [card for card in self.data if card.parent is None]
        if len(base) != 1:
            raise ValueError(f"it has {_listed(base)}: say which one to use with `model`")
        return base[0]


def _listed(cards: list[ModelCard]) -> str:
    return ", ".join(repr(card.id) for card in cards) or "no model"


def server_of(card: ModelCard) -> Server:
    if card.owned_by == "shoal":
        return "shoal"
    return "sglang" if card.owned_by == "sglang" else "vllm"


class Load(msgspec.Struct, frozen=True):
    """Of a server's Prometheus page; None is what it does not say."""

    num_running: int | None = None
    num_waiting: int | None = None
    kv_usage: float | None = None
    steps: int | None = None
    """Forward passes; of SGLang tokens, which it counts every few dozen passes: enough to see that it moves."""
    block_size: int | None = None
    num_blocks: int | None = None


_RUNNING = ("num_requests_running", "num_running_reqs")
_WAITING = ("num_requests_waiting", "num_queue_reqs")
_KV_USAGE = ("kv_cache_usage_perc", "token_usage")
_STEPS = ("iteration_tokens_total_count", "engine_steps_total", "realtime_tokens_total")
_CONFIG = "cache_config_info"
_SAMPLE = re.compile(
    rf"^(?:vllm|sglang|shoal):({'|'.join((*_RUNNING, *_WAITING, *_KV_USAGE, *_STEPS, _CONFIG))})(\{{.*\}})? (\S+)",
    re.MULTILINE,
)
_BLOCK_SIZE = re.compile(r'\b(?:block_size|page_size)="(\d+)"')
_NUM_BLOCKS = re.compile(r'\b(?:num_gpu_blocks|num_pages)="(\d+)"')


def load_of(page: bytes) -> Load:
    """Counts are summed over the engines of one server (data parallel), of shares the largest is taken."""
    values: dict[str, list[float]] = {}
    config = ""
    for name, labels, value in _SAMPLE.findall(page.decode("utf-8", "replace")):
        if name == _CONFIG:
            config = labels
        else:
            number = float(value)
            if math.isfinite(number):
                values.setdefault(name, []).append(number)

    def count(names: tuple[str, ...]) -> int | None:
        found = [value for name in names for value in values.get(name, ())]
        return int(sum(found)) if found else None

    shares = [value for name in _KV_USAGE for value in values.get(name, ())]
    size, blocks = _BLOCK_SIZE.search(config), _NUM_BLOCKS.search(config)
    return Load(
        num_running=count(_RUNNING),
        num_waiting=count(_WAITING),
        kv_usage=max(shares) if shares else None,
        steps=count(_STEPS),
        block_size=int(size[1]) if size else None,
        num_blocks=int(blocks[1]) if blocks else None,
    )
