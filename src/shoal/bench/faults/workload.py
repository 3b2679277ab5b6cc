"""The requests of a fault run: a seeded mix over everything whose answer must survive a failure exactly."""

from __future__ import annotations

import random
from typing import Any

import msgspec

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

_TEXT = (
    "many fish swim as one and nobody gives the order while the sea turns cold over stones that remember light wind "
    "carries salt past boats whose nets hang dry because every shoal has learned where not to be tonight"
)
_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "size": {"type": "integer", "minimum": 0, "maximum": 9999},
        "tags": {"type": "array", "items": {"enum": ["fast", "honest", "small"]}, "minItems": 2, "maxItems": 6},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
_FEATURES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("greedy", {"temperature": 0.0}),
    ("seeded", {"temperature": 1.0, "seed": 11}),
    ("n=2", {"temperature": 0.9, "seed": 12, "n": 2}),
    ("logprobs", {"temperature": 0.0, "logprobs": True}),
    ("stop", {"temperature": 0.0}),
    ("penalties", {"temperature": 0.7, "seed": 13, "presence_penalty": 0.6, "frequency_penalty": 0.4}),
    ("repetition", {"temperature": 0.0, "repetition_penalty": 1.2}),
    ("schema", {"temperature": 0.0, "response_format": {"type": "json_schema"}}),
)
_GREEDY = ("greedy", "logprobs", "stop")
"""What any OpenAI-compatible endpoint can repeat."""


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """One request of the workload; sent many times, its answer must always be the same."""

    number: int
    feature: str
    path: str
    body: dict[str, Any]

    @property
    def label(self) -> str:
        kind = "chat" if self.path == CHAT else "completion"
        return f"{self.number}: {kind}, {self.feature}{', stream' if self.stream else ''}"

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def num_choices(self) -> int:
        return int(self.body.get("n", 1))


def mix(model: str, *, seed: int, count: int, max_tokens: int, greedy_only: bool = False) -> list[Spec]:
    """`count` requests: features in turn, chats and completions, three in four of them streamed."""
    rng = random.Random(seed)
    features = [(name, fields) for name, fields in _FEATURES if not greedy_only or name in _GREEDY]
    return [_spec(model, number, *features[number % len(features)], max_tokens, rng) for number in range(count)]


def _spec(model: str, number: int, feature: str, fields: dict[str, Any], max_tokens: int, rng: random.Random) -> Spec:
    text = " ".join(rng.choices(_TEXT.split(), k=rng.randint(8, 48)))
    is_chat = bool(rng.getrandbits(1))
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": rng.randint(max_tokens // 2, max_tokens),
        "ignore_eos": True,
        "return_token_ids": True,
        **fields,
    }
    if feature == "schema":
        schema = {"name": "fish", "schema": _SCHEMA, "strict": True}
        body |= {"response_format": {"type": "json_schema", "json_schema": schema}, "ignore_eos": False}
    if is_chat:
        body["messages"] = [{"role": "user", "content": text}]
        if feature == "logprobs":
            body["top_logprobs"] = 2
    else:
        body["prompt"] = text
        if feature == "logprobs":
            body["logprobs"] = 2
    if rng.random() < 0.75:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Spec(number=number, feature=feature, path=CHAT if is_chat else COMPLETIONS, body=body)


def unseen(model: str, num_prompt: int, rng: random.Random) -> Spec:
    """A prompt of so many tokens that no cache has, of ids that any vocabulary has: what it waits is its prefill."""
    body = {"model": model, "prompt": rng.choices(range(16, 256), k=num_prompt), "temperature": 0.0}
    body |= {"max_tokens": 2, "ignore_eos": True, "return_token_ids": True, "stream": True}
    return Spec(number=-1, feature="unseen", path=COMPLETIONS, body=body)


def with_stop(spec: Spec, text: str) -> Spec:
    """With a stop string taken from two thirds into the answer without one, so that it ends there and across tokens."""
    at = len(text) * 2 // 3
    stop = text[at : at + 6]
    return spec if not stop else msgspec.structs.replace(spec, body=spec.body | {"stop": [stop]})
