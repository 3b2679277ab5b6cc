"""What a journal keeps of a request, and what it asks of the store where it keeps it.

See `serve.journal` for what is promised; `serve.journal_sqlite` and `serve.journal_redis` are the stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from shoal.core.types import FinishReason, Request, TokenLogprobs

TOLD_SECONDS = 86400
"""How long it is remembered for a gateway which of its requests others have claimed."""


class JournalConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    location: str
    """Path of the SQLite file, which gateways of one host may share, or redis:// or rediss:// URL."""
    retention_seconds: float = 600.0
    """How long a request is kept after its end, or after its gateway is gone."""
    max_bytes: int = 1 << 30
    """Size of the SQLite file. Requests that ended first go first; where none has ended, the journal is off."""
    commit_seconds: float = 0.02
    settle_seconds: float = 0.002
    """The same, where somebody waits for it: a new request, before its first byte."""
    lease_seconds: float = 3.0
    """A gateway that has written nothing for so long has lost its requests to whoever claims them."""
    round_seconds: float = 2.0
    """How long tokens stay in the log of all requests before they are filed under their own."""
    patience_seconds: float = 1.0
    """How long a store that fails is tried again before the journal turns itself off. New requests wait for it."""
    retry_seconds: float = 10.0
    """How long it stays off. What runs then is not taken up again; later requests are."""
    max_pending: int = 64 << 20
    """Bytes, about, that may wait for a slow store before the journal turns itself off."""


class JournalEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request as it was accepted."""

    request_id: str
    """Drawn by a gateway, never a client's own: no two requests have the same."""
    tenant: str
    model: str
    route: Literal["chat", "completions"]
    body: bytes
    """What the client sent, JSON."""
    request: Request
    """With prompt and seed. Its deadline is of the accepting process's clock and means nothing elsewhere."""
    created: float
    """Unix seconds, for people and for the answer's `created`."""


class Fragment(msgspec.Struct, array_like=True):
    """Some of a sequence's tokens and, with the last ones, its end."""

    request_id: str
    index: int
    offset: int
    """Tokens of the sequence before these. It makes writing the same fragment twice harmless."""
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish: FinishReason | None = None
    stop_token: int | None = None
    num_cached: int = 0


class SequenceProgress(msgspec.Struct, kw_only=True):
    """A prefix of a sequence, as long as the journal has it."""

    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    finish: FinishReason | None = None
    stop_token: int | None = None
    num_cached: int = 0


class JournaledRequest(msgspec.Struct, frozen=True, kw_only=True):
    entry: JournalEntry
    sequences: dict[int, SequenceProgress]
    """All `n`, by index."""
    ended: bool
    """Nothing more will come; every sequence has `finish`, or the request was ended without."""


class Batch(msgspec.Struct, kw_only=True):
    """What one commit writes, in one transaction and in this order."""

    entries: list[JournalEntry] = []
    log: list[Fragment] = []
    """Into the log of all this gateway's requests: one write, however many they are."""
    filed: list[Fragment] = []
    """Each under its own request, so that the log can be short."""
    clears_log: bool = False
    """All that the log has is filed, with `filed`: it is emptied, of `log` too."""
    ended: list[str] = []
    released: list[str] = []


class StoreError(Exception):
    """The store cannot be used now. The message is for the user."""


class Store(Protocol):
    """Where a journal is kept. All calls come from one thread and may wait; each is atomic, or raises StoreError."""

    def open(self) -> None: ...

    def commit(self, batch: Batch) -> list[str]:
        """Write it and renew the lease of all this gateway's requests. Where others have claimed some since, only
        their ids are returned and nothing is written: it is to be called again without them."""

    def load(self, request_ids: Sequence[str]) -> dict[str, JournaledRequest]: ...

    def claim(self, request_id: str) -> bool: ...

    def reserve(self, tenant: str, key: str, request_id: str) -> str | None: ...

    def unreserve(self, tenant: str, key: str, request_id: str) -> None: ...

    def purge(self) -> None: ...

    def close(self) -> None: ...


def assembled(entry: JournalEntry, fragments: Sequence[Fragment], *, ended: bool) -> JournaledRequest:
    """Join fragments, which may come in any order and overlap, to the longest prefixes without a gap."""
    sequences = {index: SequenceProgress() for index in range(entry.request.n)}
    for fragment in sorted(fragments, key=lambda fragment: (fragment.index, fragment.offset)):
        sequence = sequences.setdefault(fragment.index, SequenceProgress())
        known = len(sequence.token_ids) - fragment.offset
        if known < 0:
            continue
        sequence.token_ids += fragment.token_ids[known:]
        sequence.logprobs += fragment.logprobs[known:]
        sequence.num_cached = max(sequence.num_cached, fragment.num_cached)
        if fragment.finish is not None:
            sequence.finish, sequence.stop_token = fragment.finish, fragment.stop_token
    return JournaledRequest(entry=entry, sequences=sequences, ended=ended)
