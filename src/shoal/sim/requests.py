"""Requests of a simulation: what arrives, and what became of it."""

from __future__ import annotations

from typing import Literal

import msgspec

Status = Literal["waiting", "done", "rejected", "failed"]


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """A request of a trace. It generates `num_output` tokens, or what fits, which nobody knows before."""

    id: str
    at: float
    runs: tuple[tuple[int, int], ...]
    """The prompt, as runs of (token id, times): equal runs at equal positions are equal prefixes."""
    num_output: int
    limit: int
    """What the client allows: all that a router is told of the length."""
    blocks: tuple[bytes, ...] | None = ()
    """Hashes of the prompt's blocks, for the router; None: computed as it arrives."""
    session: str = ""

    @property
    def num_prompt(self) -> int:
        return sum(times for _, times in self.runs)

    def prompt(self) -> list[int]:
        tokens: list[int] = []
        for token, times in self.runs:
            tokens += [token] * times
        return tokens


class Outcome(msgspec.Struct, kw_only=True):
    """What became of a request; times of the simulation's clock, None for what never was."""

    id: str
    arrived: float
    num_prompt: int
    num_output: int
    """Tokens that it asks for."""
    generated: int = 0
    """Tokens that it was given: fewer where it failed, has not ended, or reached the longest sequence that fits."""
    endpoint: str = ""
    """The last one."""
    num_cached: int = 0
    """Prompt tokens that the first endpoint found in its cache."""
    first_token: float | None = None
    end: float | None = None
    """Of the last token; of a request that failed, None."""
    status: Status = "waiting"
    reason: str = ""
    """Why it was rejected or failed."""
    moves: int = 0
    """Times that it went on elsewhere after it had begun."""
    retries: int = 0
    """Times that it was sent anew before its first token."""

    @property
    def rejected(self) -> bool:
        return self.status == "rejected"

    @property
    def ttft(self) -> float | None:
        """Seconds from its arrival to its first token."""
        return None if self.first_token is None else self.first_token - self.arrived

    @property
    def e2e(self) -> float | None:
        """Seconds from its arrival to its last token."""
        return None if self.end is None else self.end - self.arrived

    @property
    def tpot(self) -> float | None:
        """(last token - first token) / (tokens - 1); None of a single token, which has no next."""
        if self.end is None or self.first_token is None or self.generated < 2:
            return None
        return (self.end - self.first_token) / (self.generated - 1)
