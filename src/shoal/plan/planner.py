"""A plan: the answer of a search with everything that is told about it, as one value for tables, pages and files."""

from __future__ import annotations

import msgspec

from shoal.core.cost.calibration import Calibration
from shoal.core.cost.types import Part
from shoal.core.hardware import Provenance
from shoal.core.model_shape import ModelShape
from shoal.plan import impossible
from shoal.plan.engines import Options
from shoal.plan.front import front
from shoal.plan.goal import Demand, Goal, Survive, Target, check
from shoal.plan.impossible import Impossible
from shoal.plan.need import Advice, Signal, Step, advice, signals, steps_by_devices, turning_point
from shoal.plan.rejections import Rejection
from shoal.plan.search import Found, Search
from shoal.plan.setups import Verdict, parts_of
from shoal.plan.units import show_duration


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    parameters: int
    cluster: str
    device: str
    devices: int
    devices_per_node: int
    link: str
    network: str
    dollars_per_device_hour: float | None
    price_source: str
    rate: float
    input: float
    output: float
    longest: int
    workload: str
    targets: tuple[Target, ...]
    budget: float | None
    survive: Survive
    profile: str


class Pools(msgspec.Struct, frozen=True, kw_only=True):
    """Prefill and decode apart: whether, and what it would take."""

    advised: bool
    text: str
    best: Verdict | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    asked: Asked
    goal: str
    signals: tuple[Signal, ...]
    distribution: str
    """Whether it is needed, in a sentence."""
    answer: Verdict | None = None
    parts: tuple[Part, ...] = ()
    """Of a decode step of the answer, at its batch."""
    impossible: Impossible | None = None
    equals: tuple[Verdict, ...] = ()
    near: tuple[Verdict, ...] = ()
    front: tuple[Verdict, ...] = ()
    pools: Pools | None = None
    advice: tuple[Advice, ...] = ()
    alone: tuple[Step, ...] = ()
    """One sequence by the number of GPUs."""
    turning_point: str = ""
    rejections: tuple[Rejection, ...] = ()
    looked_at: int = 0
    """Splits, precisions and chunk sizes."""
    closer: int = 0
    """Setups that were run in the event loop on the way to the answer."""
    provenance: Provenance = "datasheet"


def make_plan(
    model: ModelShape, goal: Goal, options: Options | None = None, calibration: Calibration | None = None
) -> Plan:
    """Raises GoalError where the goal makes no sense; an impossible one has a plan without an answer."""
    options = options or Options()
    check(goal, model.max_len, model.name)
    search = Search(model, goal, options, calibration)
    found = search.run()
    answer = found.answer
    pools = _pools(found) if options.pools and search.workshop.fitting else None
    told = signals(search)
    steps = steps_by_devices(search)
    engine = next((one for one in search.engines if answer and _is(one.choice, answer)), None)
    parts = parts_of(engine.decode_step(max(1, round(answer.prediction.batch)))) if engine and answer else ()
    return Plan(
        asked=_asked(model, goal, options),
        goal=goal.describe(),
        signals=tuple(told),
        distribution=_distribution(told, answer),
        answer=answer,
        parts=parts,
        impossible=impossible.explain(search) if answer is None else None,
        equals=tuple(found.equals),
        near=tuple(found.near),
        front=tuple(front(search, [*([answer] if answer else []), *found.equals])),
        pools=pools,
        advice=tuple(advice(search, answer)),
        alone=tuple(steps),
        turning_point=turning_point(steps),
        rejections=tuple(found.rejections),
        looked_at=found.looked_at,
        closer=found.closer,
        provenance=answer.prediction.provenance if answer else "datasheet",
    )


def _is(choice: object, answer: Verdict) -> bool:
    """The engine of the answer, whose limit on sequences alone was set afterwards; of pools, the one that decodes."""
    wanted = answer.setup.pools[-1].engine
    return all(
        getattr(choice, name) == getattr(wanted, name) for name in ("shape", "weights", "cache", "max_batch_tokens")
    )


def _asked(model: ModelShape, goal: Goal, options: Options) -> Asked:
    cluster, demand = goal.cluster, goal.demand
    return Asked(
        model=model.name,
        parameters=model.num_parameters(),
        cluster=cluster.name or cluster.device.name,
        device=cluster.device.name,
        devices=cluster.num_devices,
        devices_per_node=cluster.devices_per_node,
        link=cluster.scale_up.name,
        network=cluster.network.name if cluster.network is not None and cluster.num_nodes > 1 else "",
        dollars_per_device_hour=cluster.dollars_per_device_hour,
        price_source=cluster.price_source,
        rate=demand.rate,
        input=demand.input,
        output=demand.output,
        longest=demand.longest,
        workload=_workload(demand),
        targets=goal.targets,
        budget=goal.budget,
        survive=goal.survive,
        profile=options.profile,
    )


def _workload(demand: Demand) -> str:
    return demand.source or "all requests alike, arriving at random"


def _distribution(told: list[Signal], answer: Verdict | None) -> str:
    present = [signal.name for signal in told if signal.present]
    if not present:
        return "Distribution is not needed: one GPU holds the model and meets the targets at this rate."
    why = ", and ".join(present)
    if answer is not None and answer.setup.devices == 1:
        return f"One GPU does it, though {why}."
    return f"Distribution is needed: {why}."


def _pools(found: Found) -> Pools:
    """Told as it is: apart only where that is cheaper."""
    best = found.pools
    if best is None:
        text = "Do not disaggregate: no pair of prefill and decode pools meets the targets on this cluster."
        return Pools(advised=False, text=text)
    if found.answer is best and found.colocated is None:
        text = f"Disaggregate: {best.setup} meets the targets, and nothing colocated does."
        return Pools(advised=True, text=text, best=best)
    colocated = found.colocated or found.answer
    assert colocated is not None
    saved = colocated.setup.devices - best.setup.devices
    gain = (
        f"ITL p99 would be {show_duration(best.prediction.itl_p99.value)} instead of"
        f" {show_duration(colocated.prediction.itl_p99.value)}"
    )
    if found.answer is not best:
        text = (
            f"Do not disaggregate: pools need at least {best.setup.devices} GPUs ({best.setup}), colocated engines"
            f" {colocated.setup.devices}; {gain}, which no target asks for."
        )
        return Pools(advised=False, text=text, best=best)
    text = f"Disaggregate: {best.setup} needs {saved} GPUs fewer than {colocated.setup}; {gain}."
    return Pools(advised=True, text=text, best=best)
