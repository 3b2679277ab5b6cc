"""Answers in OpenAI's form: whole ones and stream chunks, of chats and of completions.

Each format is told of pieces as they come, by choice, and makes chunks; a whole answer is what the pieces add up to.
"""

from __future__ import annotations

import time
from typing import Any

from shoal.checkpoint.tokenizer import Tokenizer
from shoal.core.types import TokenLogprobs
from shoal.serve.generation import Piece
from shoal.serve.protocol import ChatRequest, CompletionRequest

_LEAST_LOGPROB = -9999.0
"""JSON has no -inf."""


class Usage:
    def __init__(self, prompt_tokens: int, shows_cached: bool = True) -> None:
        """`shows_cached`: whether it may be told how much was found in the prefix cache, which tells what is there."""
        self.prompt = prompt_tokens
        self._shows_cached = shows_cached
        self.completion = 0
        self.cached = 0

    def add(self, piece: Piece) -> None:
        self.completion += len(piece.token_ids)
        self.cached = max(self.cached, piece.num_cached)

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached if self._shows_cached else None},
        }


class ChatFormat:
    """`prompts` has one prompt."""

    def __init__(
        self, body: ChatRequest, tokenizer: Tokenizer, model: str, request_id: str, prompts: list[list[int]]
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt_ids = prompts[0] if body.return_token_ids else None
        self._with_ids = bool(body.return_token_ids)
        self._head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": model}
        self._wants_logprobs = bool(body.logprobs)

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """Chunks before the first piece: each choice's role."""
        chunks = [
            self._chunk({"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": None})
            for i in range(num_choices)
        ]
        if self._prompt_ids is not None:
            chunks[0]["prompt_token_ids"] = self._prompt_ids
        return chunks

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"content": piece.text} if piece.text or piece.finish is None else {},
            "logprobs": self._logprobs(piece.token_ids, piece.logprobs),
        }
        return self._chunk(choice | self._ending(piece, piece.token_ids))

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage.body()}

    def whole(self, choices: list[Piece], usage: Usage) -> dict[str, Any]:
        body = {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": piece.text, "refusal": None},
                    "logprobs": self._logprobs(piece.token_ids, piece.logprobs),
                    **self._ending(piece, piece.token_ids),
                }
                for index, piece in enumerate(choices)
            ],
            "usage": usage.body(),
        }
        return body if self._prompt_ids is None else {**body, "prompt_token_ids": self._prompt_ids}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            **self._head,
            "object": "chat.completion.chunk",
            "choices": [{"finish_reason": None, **choice}],
        }

    def _ending(self, piece: Piece, ids: list[int]) -> dict[str, Any]:
        ending: dict[str, Any] = {"finish_reason": piece.finish, "stop_reason": piece.stop_reason}
        return ending | {"token_ids": ids} if self._with_ids else ending

    def _logprobs(self, ids: list[int], logprobs: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        return {
            "content": [
                {
                    **self._token(token_id, entry.logprob),
                    "top_logprobs": [
                        self._token(i, lp) for i, lp in zip(entry.top_ids, entry.top_logprobs, strict=True)
                    ],
                }
                for token_id, entry in zip(ids, logprobs, strict=False)
            ]
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {
            "token": raw.decode("utf-8", "replace"),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": list(raw),
        }


class CompletionFormat:
    def __init__(
        self, body: CompletionRequest, tokenizer: Tokenizer, model: str, request_id: str, prompts: list[list[int]]
    ) -> None:
        self._tokenizer = tokenizer
        self._with_ids = bool(body.return_token_ids)
        self._wants_logprobs = body.logprobs is not None
        self._head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        per_prompt = body.n or 1
        self._prompts = [prompt for prompt in prompts for _ in range(per_prompt)]
        self._unsent_prompts = dict(enumerate(self._prompts)) if body.return_token_ids else {}
        """Of choices that have had no chunk yet: the ids of a long prompt are not for every chunk."""
        self._echo = [tokenizer.decode(p) if body.echo else "" for p in self._prompts]
        self._offset = [len(text) for text in self._echo]
        """Characters sent of each choice, where the next token's text begins."""

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        return [self._chunk(i, {"text": text, "logprobs": None}) for i, text in enumerate(self._echo) if text]

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._chunk(
            index, {"text": piece.text, "logprobs": self._logprobs(index, piece), **self._ending(index, piece)}
        )

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.body()}

    def whole(self, choices: list[Piece], usage: Usage) -> dict[str, Any]:
        return {
            **self._head,
            "choices": [
                {
                    "index": i,
                    "text": self._echo[i] + piece.text,
                    "logprobs": self._logprobs(i, piece),
                    **self._ending(i, piece),
                }
                for i, piece in enumerate(choices)
            ],
            "usage": usage.body(),
        }

    def _chunk(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": [{"index": index, "finish_reason": None, **choice}]}

    def _ending(self, index: int, piece: Piece) -> dict[str, Any]:
        ending: dict[str, Any] = {"finish_reason": piece.finish, "stop_reason": piece.stop_reason}
        if self._with_ids:
            ending |= {"token_ids": piece.token_ids}
            if index in self._unsent_prompts:
                ending |= {"prompt_token_ids": self._unsent_prompts.pop(index)}
        return ending

    def _logprobs(self, index: int, piece: Piece) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        tokens, offsets = [], []
        for token_id in piece.token_ids[: len(piece.logprobs)]:
            tokens.append(self._tokenizer.token_text(token_id))
            offsets.append(self._offset[index])
            self._offset[index] += len(tokens[-1])
        return {
            "tokens": tokens,
            "token_logprobs": [max(entry.logprob, _LEAST_LOGPROB) for entry in piece.logprobs],
            "top_logprobs": [
                {
                    self._tokenizer.token_text(i): max(lp, _LEAST_LOGPROB)
                    for i, lp in zip(entry.top_ids, entry.top_logprobs, strict=True)
                }
                for entry in piece.logprobs
            ],
            "text_offset": offsets,
        }


def joined(pieces: list[Piece]) -> Piece:
    """All pieces of one sequence as one."""
    last = pieces[-1]
    return Piece(
        last.index,
        "".join(p.text for p in pieces),
        [i for p in pieces for i in p.token_ids],
        [entry for p in pieces for entry in p.logprobs],
        last.finish,
        last.stop_reason,
        last.num_cached,
        last.error,
    )
