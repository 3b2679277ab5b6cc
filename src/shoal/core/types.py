"""The types that cross a boundary: client request, step plan, step result, output, failures, load.

They are msgspec structs, so the type is the wire format: `msgspec.msgpack` encodes each of them as it stands.
Token ids are plain ints; times are seconds of one monotonic clock, passed in by the driver; lengths count tokens.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "deadline", "error", "lost"]
"""lost: the workers failed, through no fault of the request's; it may go on elsewhere with what it has."""
GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "ebnf"]


class Grammar(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A constraint on the generated text, compiled before it reaches the engine."""

    kind: GrammarKind
    source: str
    """The schema, pattern or grammar as text; choices as a JSON list."""
    compiled: str
    """xgrammar's serialised compiled grammar (JSON)."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the next token is drawn. The defaults change nothing: temperature 1, no filter, no penalty."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """Always set: the front draws one where the client gave none. Sequence i draws with (seed, i, position)."""
    logprobs: int | None = None
    """How many alternatives to report beside the drawn token; 0 reports the drawn one alone, None nothing."""
    grammar: Grammar | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client sent, tokenised and validated. It becomes `n` sequences, named (id, 0) .. (id, n-1)."""

    id: str
    prompt: list[int]
    max_tokens: int
    """Most tokens to generate, >= 1."""
    sampling: Sampling = Sampling()
    n: int = 1
    min_tokens: int = 0
    """End-of-text and stop tokens cannot be drawn before this many tokens were generated."""
    stop_token_ids: list[int] = []
    """Ids that end a sequence: the model's end-of-text ids unless the client ignores them, and the client's own."""
    priority: int = 0
    """Lower runs first."""
    deadline: float | None = None
    """Monotonic second after which the request is ended with what it has."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    resume: dict[int, list[int]] | None = None
    """Of a request that goes on here after another engine: the sequences to generate, by index, with the tokens that
    each has already. `max_tokens` and `min_tokens` count them, penalties and grammar know them, and a draw depends on
    the position alone: what follows is what would have followed there. None is all `n` sequences from the start."""


class Rejected(msgspec.Struct, frozen=True):
    """Why a request was not accepted. Nothing was kept of it."""

    request_id: str
    reason: str
    field: str | None = None
    """The field of `Request` at fault; None where the engine is merely full."""
    retryable: bool = False


# --- one step -------------------------------------------------------------------------------------------------------


class SlotAssignment(msgspec.Struct, frozen=True):
    """A sequence enters a slot: everything that the worker must know of it, once."""

    slot: int
    request_id: str
    index: int
    """Which of the request's `n` sequences."""
    tokens: list[int]
    """Prompt, then what it had generated before a preemption."""
    num_prompt: int
    block_ids: list[int]
    sampling: Sampling
    min_tokens: int
    stop_token_ids: list[int]
    """Only for masking them before `min_tokens`; the core decides when a sequence ends."""


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's part of a step: tokens [start, start + num_tokens) are computed.

    Their ids are the slot's known tokens at those positions; the last may be a token that an earlier step, still in
    flight, is about to draw: steps run in order, so the worker knows it by then.
    """

    slot: int
    start: int
    num_tokens: int
    sample: bool
    """Draw the token at position start + num_tokens: true where the row reaches the end of what is known."""
    new_block_ids: list[int]
    """Blocks to append to the slot's block table before the step."""


class Drawn(msgspec.Struct, frozen=True, array_like=True):
    """A token that the last stage of a pipeline drew, for the stages that have not seen it."""

    slot: int
    position: int
    token_id: int


class StepPlan(msgspec.Struct, frozen=True):
    """One forward pass over a mixed batch, as diffs to the state of the worker's slots.

    The worker applies `drawn`, `released`, then `assigned`, then the rows in order.
    """

    plan_id: int
    released: list[int]
    assigned: list[SlotAssignment]
    rows: list[Row]
    drawn: list[Drawn] = []
    """Of results committed since the last plan; empty unless the engine is a pipeline."""

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one generated position, of the distribution before temperature and filters."""

    logprob: float
    """Of the drawn token."""
    top_ids: list[int]
    """Most probable first."""
    top_logprobs: list[float]


class Sampled(msgspec.Struct, frozen=True, array_like=True):
    """What a worker drew for one row with `sample`."""

    slot: int
    token_id: int
    logprobs: TokenLogprobs | None = None


class SequenceFailure(msgspec.Struct, frozen=True, array_like=True):
    """One sequence could not be prepared or sampled. The rest of the batch goes on.

    Its KV is computed all the same, in this step and in later plans that are in flight already, for other sequences may
    share the blocks by then: only nothing more is drawn for the slot. Where a row reaches a token that was never drawn,
    any token will do; such a block is not shared.
    """

    slot: int
    message: str


class StepResult(msgspec.Struct, frozen=True, tag=True):
    plan_id: int
    sampled: list[Sampled]
    failed: list[SequenceFailure] = []


class WorkerFailure(msgspec.Struct, frozen=True, tag=True):
    """The step did not happen and the workers' state is gone. Arrives where a result would."""

    plan_id: int
    message: str


# --- what comes out -------------------------------------------------------------------------------------------------


class Output(msgspec.Struct, frozen=True, array_like=True):
    """What one commit yields for one sequence. The last one of a sequence has `finish`."""

    request_id: str
    index: int
    token_ids: list[int]
    """New tokens, in order; a stop token is the last one and is counted."""
    logprobs: list[TokenLogprobs] = []
    """One a token where the request asked for them, else empty."""
    finish: FinishReason | None = None
    stop_token: int | None = None
    """The stop token that ended the sequence."""
    error: str | None = None
    num_cached: int = 0
    """Prompt tokens that were found in the prefix cache at the first admission."""


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What the router and the metrics see. Counters count from the engine's start."""

    num_waiting: int
    num_running: int
    num_blocks: int
    num_free_blocks: int
    """Free or evictable."""
    num_live_tokens: int
    """KV entries that running sequences hold; shared blocks are counted once."""
    num_waiting_tokens: int
    """Prompt tokens of waiting sequences."""
    steps: int
    prompt_tokens: int
    """Computed prompt tokens, without those found in the cache."""
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    in_flight: int
    """Plans without a result."""
    failures: int
