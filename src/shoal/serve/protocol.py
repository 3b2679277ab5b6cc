"""The API's request bodies: OpenAI's fields, and those that vLLM's users know beside them.

Decoding is strict: a wrong type, an unknown field or a number out of range is an error that names the field. Fields
that only steer OpenAI's own service are accepted and have no effect.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from itertools import accumulate
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from shoal.core.types import GrammarKind
from shoal.serve.errors import invalid


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds on what one request may ask for; checked before anything is computed."""

    body_bytes: int = 8 << 20
    json_depth: int = 32
    n: int = 8
    messages: int = 4096
    prompts: int = 64
    """Prompts in one completion request."""
    stops: int = 16
    stop_bytes: int = 128
    logprobs: int = 20
    logit_biases: int = 1024
    stop_token_ids: int = 128
    header_seconds: float = 10.0
    header_bytes: int = 32 << 10
    headers: int = 100
    body_seconds: float = 30.0


Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Count = Annotated[int, Meta(ge=1)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    name: str = ""
    schema: dict[str, Any] = {}
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class SamplingFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that every generating request has."""

    model: str = ""
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """0 and -1 are off."""
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100.0, le=100.0)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Count | None = None
    best_of: Count | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Meta(ge=0)]] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    max_tokens: Count | None = None
    skip_special_tokens: bool = True
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0
    timeout: Annotated[float, Meta(gt=0.0, le=86400.0)] | None = None
    """Seconds after which the request ends with what it has."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Meta(ge=0)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None


class CompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[Any]
    """Text, token ids, or a list of either."""
    logprobs: Annotated[int, Meta(ge=0)] | None = None
    resume: dict[int, list[Annotated[int, Meta(ge=0)]]] | None = None
    """For other gateways: the sequences to generate, by index, with the tokens that each has already. What comes are
    those that follow, as they would have followed (core/types.py)."""
    cache_salt: str | None = None
    """For other gateways, which derive it from their tenants. Of a client it is refused."""
    echo: bool | None = False
    suffix: str | None = None
    add_special_tokens: bool = True


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str = ""
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str = ""
    tokens: list[Annotated[int, Meta(ge=0)]]
    skip_special_tokens: bool = False


Body = TypeVar("Body", bound=msgspec.Struct)


def decode(raw: bytes, kind: type[Body], limits: Limits) -> Body:
    """A request body, or ApiError 400 saying where it is wrong."""
    too_deep = invalid(f"the body is nested more than {limits.json_depth} levels deep", code="too_deep")
    try:
        body = msgspec.json.decode(raw, type=kind)
    except RecursionError:
        raise too_deep from None
    except msgspec.ValidationError as error:
        if _is_deeper(raw, limits.json_depth):
            raise too_deep from None
        raise _explain(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if _is_deeper(raw, limits.json_depth):
        raise too_deep
    return body


_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = bytes.maketrans(b"[]{}", b"\x01\xff\x01\xff")
"""Brackets to signed bytes: 1 goes a level down, -1 comes up."""


def _is_deeper(raw: bytes, limit: int) -> bool:
    """Whether JSON is nested deeper than `limit`. Without a Python loop: a body may have millions of brackets."""
    if raw.count(b"{") + raw.count(b"[") <= limit:
        return False
    steps = _STRING.sub(b"", raw).translate(_STEPS, _NO_BRACKETS)
    shallow = steps.replace(b"\x01\xff", b"")  # drops one level, and of flat lists nearly everything
    return limit in accumulate(memoryview(shallow).cast("b"))


def _explain(message: str, kind: type[msgspec.Struct]) -> Exception:
    """msgspec's message, with the field in OpenAI's place for it and the nearest field for an unknown one."""
    where = re.search(r" - at `\$\.?(.*)`$", message)
    field = where[1] if where else None
    unknown = re.match(r"Object contains unknown field `(.*?)`", message)
    if unknown:
        near = get_close_matches(unknown[1], kind.__struct_fields__, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return invalid(f"unknown field {unknown[1]!r}{hint}", unknown[1], "unknown_field")
    missing = re.match(r"Object missing required field `(.*?)`", message)
    if missing:
        return invalid(f"field {missing[1]!r} is missing", missing[1], "missing_field")
    return invalid(message.replace(" - at `$.", " - at `"), field.split("[")[0] if field else None)


def stop_strings(body: SamplingFields, limits: Limits) -> list[str]:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > limits.stops:
        raise invalid(f"stop has {len(stops)} strings; at most {limits.stops} are allowed", "stop")
    for stop in stops:
        if not stop or len(stop.encode("utf-8", "replace")) > limits.stop_bytes:
            raise invalid(f"each stop string must have 1 to {limits.stop_bytes} bytes", "stop")
    return stops


_MOST_DIGITS = 20
"""Of a token id spelled out."""


def logit_bias(body: SamplingFields, vocab_size: int, limits: Limits) -> dict[int, float]:
    biases = body.logit_bias or {}
    if len(biases) > limits.logit_biases:
        raise invalid(f"logit_bias has {len(biases)} entries; at most {limits.logit_biases} are allowed", "logit_bias")
    result = {}
    for key, value in biases.items():
        # The length first: Python refuses to convert thousands of digits with an error of its own.
        if len(key) > _MOST_DIGITS or not key.isascii() or not key.isdigit() or int(key) >= vocab_size:
            raise invalid(f"logit_bias: {key[:_MOST_DIGITS]!r} is not a token id in [0, {vocab_size})", "logit_bias")
        result[int(key)] = value
    return result


def grammar_of(body: SamplingFields) -> tuple[GrammarKind, str] | None:
    """The one constraint that a request may ask for, as kind and source."""
    asked: list[tuple[str, GrammarKind, str]] = []

    def ask(field: str, kind: GrammarKind, source: Any) -> None:
        if source is not None:
            asked.append((field, kind, source if isinstance(source, str) else msgspec.json.encode(source).decode()))

    if body.response_format is not None and body.response_format.type == "json_object":
        ask("response_format", "json_object", "")
    elif body.response_format is not None and body.response_format.type == "json_schema":
        if body.response_format.json_schema is None:
            raise invalid("response_format of type json_schema needs json_schema", "response_format")
        ask("response_format", "json_schema", body.response_format.json_schema.schema)
    structured = body.structured_outputs or StructuredOutputs()
    ask("structured_outputs", "json_schema", structured.json)
    ask("structured_outputs", "json_object", "" if structured.json_object else None)
    ask("structured_outputs", "regex", structured.regex)
    ask("structured_outputs", "choice", structured.choice)
    ask("structured_outputs", "ebnf", structured.grammar)
    ask("guided_json", "json_schema", body.guided_json)
    ask("guided_regex", "regex", body.guided_regex)
    ask("guided_choice", "choice", body.guided_choice)
    ask("guided_grammar", "ebnf", body.guided_grammar)
    if len(asked) > 1:
        fields = ", ".join(field for field, _, _ in asked)
        raise invalid(f"only one constraint on the output is allowed, got {len(asked)}: {fields}", asked[1][0])
    return asked[0][1:] if asked else None
