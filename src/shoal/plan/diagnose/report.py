"""The whole diagnosis of one engine or a fleet, for people and for machines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from shoal.plan.diagnose.dialects import ENGINES, SHOAL, Dialect
from shoal.plan.diagnose.findings import TITLES, Action, Finding, Targets
from shoal.plan.diagnose.fleet import imbalance, part_of
from shoal.plan.diagnose.reading import Part, Reading, with_device
from shoal.plan.diagnose.signals import diagnose, is_idle

Verdict = Literal["healthy", "idle", "found", "cannot tell"]


class TargetReport(msgspec.Struct, frozen=True):
    source: str
    engine: str
    basis: Literal["window", "lifetime"]
    seconds: float | None
    resets: int
    verdict: Verdict
    findings: tuple[Finding, ...]
    metrics: dict[str, str]
    """By quantity, the name of the metric it was read from."""


class Report(msgspec.Struct, frozen=True):
    verdict: Verdict
    targets: tuple[TargetReport, ...]
    fleet: tuple[Finding, ...]
    """What shows only between replicas."""
    notes: tuple[str, ...]


def report(readings: dict[str, Reading], targets: Targets, notes: tuple[str, ...] = ()) -> Report:
    """Of everything that was read, by where. Expositions of devices alone count for all engines."""
    devices = {source: one for source, one in readings.items() if not one.engine and one.gauges}
    engines = {source: with_device(one, list(devices.values())) for source, one in readings.items() if one.engine}
    strange = [source for source, one in readings.items() if not one.engine and not one.gauges]
    said = [*notes]
    said += [f"{source} has metrics of no engine that is known here" for source in strange]
    if len(engines) > 1 and devices:
        said.append("devices' metrics are means over all engines: name one engine to have them for it alone")
    found = tuple(_target(source, one, targets) for source, one in engines.items())
    parts = _parts(engines)
    fleet = (imbalance(parts),) if len(parts) > 1 else ()
    verdicts = [one.verdict for one in found]
    verdicts += ["found" for one in fleet if one.state == "present"]
    return Report(_worst(verdicts), found, fleet, tuple(said))


def _target(source: str, reading: Reading, targets: Targets) -> TargetReport:
    findings = tuple(_with_levers_of(finding, reading.engine) for finding in diagnose(reading, targets))
    states = [finding.state for finding in findings]
    verdict: Verdict = "healthy"
    if "present" in states:
        verdict = "found"
    elif "unknown" in states:
        verdict = "cannot tell"
    elif is_idle(reading):
        verdict = "idle"
    quantities = (*reading.gauges, *reading.counters, *reading.latencies)
    return TargetReport(
        source=source,
        engine=reading.engine,
        basis=reading.basis,
        seconds=reading.seconds,
        resets=reading.resets,
        verdict=verdict,
        findings=findings,
        metrics={name: reading.metric(name) for name in quantities},
    )


def _with_levers_of(finding: Finding, engine: str) -> Finding:
    """Without what can be pulled in neither that engine nor shoal."""
    kept = tuple(one for one in finding.try_first if one.lever is None or flags_of(one, engine))
    return msgspec.structs.replace(finding, try_first=kept)


def _parts(engines: dict[str, Reading]) -> list[Part]:
    """Replicas: those that a target tells apart, and targets that are one each."""
    parts: list[Part] = []
    for source, reading in engines.items():
        whole = part_of(source, reading)
        parts += reading.parts or ([whole] if whole else [])
    return parts


def _worst(verdicts: list[Verdict]) -> Verdict:
    order: tuple[Verdict, ...] = ("found", "cannot tell", "healthy", "idle")
    return next((one for one in order if one in verdicts), "cannot tell")


# --- in words ---------------------------------------------------------------------------------------------------------


def flags_of(action: Action, engine: str) -> list[str]:
    """The action's flags: of the engine that was read, and of shoal, each with its name."""
    if action.lever is None:
        return []
    dialects: list[Dialect] = [one for one in ENGINES if one.name == engine]
    dialects += [SHOAL] if engine != SHOAL.name else []
    return [
        f"{one.title}: {one.flags[action.lever].format(value=action.value)}"
        for one in dialects
        if action.lever in one.flags
    ]


def headline(target: TargetReport) -> str:
    """One line: what is the matter with it."""
    present = [TITLES[finding.signal] for finding in target.findings if finding.state == "present"]
    if target.verdict == "found":
        return "; ".join(present)
    if target.verdict == "idle":
        return "healthy, and idle: nothing ran, so this says nothing of how it bears load"
    if target.verdict == "cannot tell":
        missing = [what for finding in target.findings for what in finding.missing]
        return f"cannot tell: missing {'; '.join(dict.fromkeys(missing))}"
    return "healthy: none of the three signs"


def window_text(target: TargetReport) -> str:
    """Over which time the numbers are."""
    if target.basis == "lifetime":
        return "its lifetime (counters) and one moment (gauges); --watch 30 sees what happens now"
    seconds = f"{target.seconds:.1f} s" if target.seconds else "unknown length (--window says it)"
    restarted = f", in which it started anew {target.resets} times" if target.resets else ""
    return f"a window of {seconds}{restarted}"


def lines(finding: Finding, engine: str) -> Iterator[tuple[Literal["title", "evidence", "try", "against"], str]]:
    """A finding as it is printed: what kind of line, and its text."""
    sure = "" if finding.state != "present" else f" ({'shown' if finding.certainty == 'shown' else 'indicated'})"
    yield "title", f"{TITLES[finding.signal]}: {_STATE[finding.state]}{sure}. {finding.summary}"
    for evidence in finding.evidence:
        yield "evidence", f"{evidence.says}  [{evidence.metric}]"
    for number, action in enumerate(finding.try_first, 1):
        flags = " | ".join(flags_of(action, engine))
        yield "try", f"{number}. {flags + ': ' if flags else ''}{action.why}"
    if finding.state == "present" and finding.disproved_by:
        yield "against", f"wrong if: {finding.disproved_by}"


_STATE = {"present": "yes", "absent": "no", "unknown": "cannot tell"}
