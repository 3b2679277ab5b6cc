"""The result of a fault run: one row a fault, as a table or as JSON, and which promises were broken."""

from __future__ import annotations

import msgspec

from shoal.bench.faults.oracle import Tally


class Row(msgspec.Struct, kw_only=True):
    fault: str
    injected: int = 0
    """Times that it was seen to have taken effect."""
    skipped: str = ""
    """Why it was not tried at all."""
    control: str = ""
    """What the same proof said when the fault was aimed at nothing."""
    evidence: list[str] = []
    events: list[str] = []
    """What the fleet itself said of the time."""
    phases: dict[str, int] = {}
    """Requests under way when it struck, by phase."""
    tally: Tally = msgspec.field(default_factory=Tally)
    detection: float | None = None
    """Longest time, in seconds, until /fleet showed it."""
    recovery: float | None = None
    """Longest time until the endpoint served again."""
    gap_limit: float | None = None
    kv_left: float = 0.0
    """Share of KV blocks still in use once everything was idle."""
    left_over: dict[str, int] = {}
    """Processes and open files more than before."""
    breaches: list[str] = []
    """Promises of correctness that were broken."""
    late: list[str] = []
    """Promises of time that were broken: on a machine that does other things too, these alone may be its fault."""

    @property
    def ok(self) -> bool:
        return not self.breaches and not self.late


class Report(msgspec.Struct, kw_only=True):
    version: str
    seed: int
    streams: int
    endpoints: list[str]
    undisturbed: Tally
    prefill_again: float
    """Seconds in which as many new prompts as move when an endpoint is lost had their first tokens, without faults."""
    capacity: float
    """Requests a second without faults, with as many clients as `streams`."""
    tokens_per_second: float
    unstable: list[str]
    """Requests whose answers differ without any fault."""
    rows: list[Row]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def markdown(self) -> str:
        head = (
            f"Seed {self.seed}, {self.streams} clients at once, endpoints: {', '.join(self.endpoints)}. Undisturbed: "
            f"{self.capacity:.1f} requests/s, {self.tokens_per_second:.0f} tokens/s, longest gap "
            f"{self.undisturbed.longest_gap:.2f} s, longest TTFT {self.undisturbed.longest_ttft:.2f} s; as "
            f"many prompts as move when an endpoint is lost are prefilled in {self.prefill_again:.2f} s."
        )
        lines = [head, ""]
        if self.unstable:
            lines += [f"Not compared, for they differ without any fault: {'; '.join(self.unstable)}.", ""]
        lines += ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in self.rows]
        lines += ["", "| fault | proof that it took effect | control, aimed at nothing |", "|---|---|---|"]
        lines += [f"| {row.fault} | {_shortened(row)} | {row.control} |" for row in self.rows if not row.skipped]
        broken = [f"- {row.fault}: {breach}" for row in self.rows for breach in row.breaches + row.late]
        return "\n".join([*lines, "", *(["Broken promises:", "", *broken] if broken else ["No promise was broken."])])


_COLUMNS = (
    "fault",
    "times",
    "offered",
    "completed",
    "refused",
    "expired",
    "failed",
    "lost",
    "duplicate tokens",
    "missing tokens",
    "other tokens",
    "unequal",
    "resumed",
    "longest gap s",
    "at the fault s",
    "detected s",
    "back s",
    "KV left",
    "left over",
    "verdict",
)


def _cells(row: Row) -> list[str]:
    if row.skipped:
        return [row.fault, "0", *["-"] * (len(_COLUMNS) - 3), f"not tried: {row.skipped}"]
    t = row.tally
    counts = [t.offered, t.completed, t.refused, t.expired, t.failed, t.lost]
    counts += [t.duplicate_tokens, t.missing_tokens, t.other_tokens, t.unequal, t.resumed]
    left_over = ", ".join(f"{count} {what}" for what, count in row.left_over.items()) or "0"
    return [
        row.fault,
        str(row.injected),
        *map(str, counts),
        f"{t.longest_gap:.2f}",
        f"{t.gap_at_fault:.2f}" + ("" if row.gap_limit is None else f" of {row.gap_limit:.2f}"),
        _seconds(row.detection),
        _seconds(row.recovery),
        f"{row.kv_left:.1%}" if row.kv_left else "0",
        left_over,
        "kept" if row.ok else "**broken**",
    ]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _shortened(row: Row) -> str:
    shown = "; ".join(row.evidence[:2])
    phases = ", ".join(f"{count} {phase}" for phase, count in sorted(row.phases.items()))
    more = f"; and {len(row.evidence) - 2} more" if len(row.evidence) > 2 else ""
    return shown + more + (f" (requests it struck: {phases})" if phases else "")
