"""Replicas of a fleet against each other: the same GPUs with the load elsewhere would need no more of them."""

from __future__ import annotations

from shoal.plan.diagnose import thresholds as limit
from shoal.plan.diagnose.findings import Action, Evidence, Finding
from shoal.plan.diagnose.findings import shown_seconds as seconds
from shoal.plan.diagnose.reading import Part, Reading
from shoal.plan.diagnose.signals import waiting


def part_of(name: str, reading: Reading) -> Part | None:
    """A whole target as one replica; None where it does not say what it has to do."""
    running, queue, itl = reading.gauge("running"), waiting(reading), reading.histogram("itl")
    if running is None or queue is None:
        return None
    return Part(name, running, queue[0], reading.gauge("kv_usage"), itl.mean if itl else None)


def imbalance(parts: list[Part]) -> Finding:
    """Between two replicas or more: one has a queue while another has room, or one is slower at no more load."""
    busiest, idlest = max(parts, key=_load), min(parts, key=_load)
    evidence = [Evidence(_described(part), _load(part), part.name) for part in (busiest, idlest)]
    slow = _slowest(parts)
    is_uneven = busiest.waiting >= limit.WAITING and _load(busiest) >= limit.UNEVEN * _load(idlest)
    if slow is not None:
        one, other = slow
        says = f"{one.name} takes {seconds(one.itl or 0.0)} a token, {other.name} {seconds(other.itl or 0.0)}"
        evidence.append(Evidence(f"{says} with no fewer sequences", one.itl or 0.0, one.name))
    if not is_uneven and slow is None:
        summary = f"{len(parts)} replicas have about the same load"
        if _load(busiest) >= limit.UNEVEN * _load(idlest):
            summary = f"{len(parts)} replicas differ in load, but none has a queue"
        return Finding(signal="imbalance", state="absent", summary=summary, evidence=tuple(evidence))
    actions = []
    if slow is not None:
        actions.append(Action(f"clocks, temperature and neighbours of {slow[0].name}: it is slower at the same load"))
    if is_uneven:
        actions += [
            Action("route by predicted completion or least tokens (shoal: models[].policy: predicted_completion)"),
            Action("if affinity or sessions pin requests: a lower limit of the load it may cause (load_limit)"),
        ]
    summary = f"{busiest.name} has a queue while {idlest.name} has room"
    if slow is not None and not is_uneven:
        summary = f"{slow[0].name} is slower than the others"
    return Finding(
        signal="imbalance",
        state="present",
        certainty="shown" if is_uneven else "indicated",
        summary=summary,
        evidence=tuple(evidence),
        try_first=tuple(actions),
        disproved_by="Over a window of several minutes the replicas' means are alike: then it was chance.",
    )


def _load(part: Part) -> float:
    return part.running + part.waiting


def _described(part: Part) -> str:
    usage = "" if part.kv_usage is None else f", KV cache {part.kv_usage:.0%} full"
    return f"{part.name}: {part.running:.1f} run, {part.waiting:.1f} wait{usage}"


def _slowest(parts: list[Part]) -> tuple[Part, Part] | None:
    """A replica that takes longer a token than one that runs at least as many sequences."""
    pairs = [
        (one, other)
        for one in parts
        for other in parts
        if one.itl and other.itl and one.running <= other.running and one.itl >= limit.SLOW * other.itl
    ]
    return max(pairs, key=lambda pair: (pair[0].itl or 0.0) / (pair[1].itl or 1.0), default=None)
