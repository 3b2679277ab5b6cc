"""Where the time from a command to its first token goes: phases in order, and how fast each rank read its weights.

Seconds are of whoever measured a phase; clocks of different machines are never compared.
"""

from __future__ import annotations

import msgspec


class StartProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far an engine that starts has come."""

    what: str
    """For people: what is being done."""
    fraction: float
    """Of it, 0 to 1."""
    bytes_read: int = 0
    """Of the weights, by all ranks; 0 while none are read."""
    bytes_total: int = 0


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    where: str
    """command, engine, or rank N."""
    name: str
    seconds: float


class RankLoad(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one rank came by its weights."""

    rank: int
    bytes_read: int
    """From files, or from the page cache that holds them."""
    read_seconds: float
    """It waited for bytes and had nothing else to do."""
    convert_seconds: float
    """The rest of loading: it made of bytes what layers compute with, while more were read."""
    reading_seconds: float
    """At least one of its threads was reading."""

    @property
    def gigabytes_per_second(self) -> float:
        """10^9 bytes a second while any were read; 0 if there were none."""
        return self.bytes_read / self.reading_seconds / 1e9 if self.reading_seconds else 0.0


class StartReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    phases: list[Phase]
    """One after the other. Of ranks that work side by side only the slowest one's."""
    ranks: list[RankLoad]
    total_seconds: float

    @property
    def other_seconds(self) -> float:
        """In no phase: messages between processes, ranks that waited for each other."""
        return self.total_seconds - sum(phase.seconds for phase in self.phases)

    def inside(self, before: list[Phase], after: list[Phase], total_seconds: float) -> StartReport:
        """The same start as someone sees it who did something before and after it."""
        return StartReport(phases=[*before, *self.phases, *after], ranks=self.ranks, total_seconds=total_seconds)


class Laps:
    """Phases of one place, each of which ends where the next begins. `now` is a monotonic second."""

    def __init__(self, where: str, now: float) -> None:
        self.phases: list[Phase] = []
        self._where = where
        self._at = now

    def end(self, name: str, now: float) -> None:
        """What was done since the last phase, or since the beginning."""
        self.add(name, now - self._at)
        self._at = now

    def end_two(self, first: str, first_seconds: float, second: str, now: float) -> None:
        """Two phases that took turns: the first for so long in all, the second for the rest."""
        self.add(first, first_seconds)
        self.add(second, now - self._at - first_seconds)
        self._at = now

    def resume(self, now: float) -> None:
        """What was since the last phase is in none."""
        self._at = now

    def add(self, name: str, seconds: float) -> None:
        """A phase that was measured otherwise."""
        self.phases.append(Phase(self._where, name, seconds))

    def report(self, ranks: list[RankLoad]) -> StartReport:
        return StartReport(phases=self.phases, ranks=ranks, total_seconds=sum(phase.seconds for phase in self.phases))


def slowest(reports: list[StartReport]) -> StartReport:
    """Of starts side by side: the phases of the one that took longest, what was read by all."""
    last = max(reports, key=lambda report: report.total_seconds)
    return msgspec.structs.replace(last, ranks=[rank for report in reports for rank in report.ranks])
