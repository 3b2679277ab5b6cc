"""Is distribution needed at all? The three signals for it, what a smaller precision would do, and where more GPUs stop
helping one sequence."""

from __future__ import annotations

import msgspec

from shoal.core.cost.memory import budget
from shoal.core.cost.model import CostModel
from shoal.core.cost.profiles import profile
from shoal.core.cost.types import StepShape, WeightPrecision
from shoal.core.hardware import DeviceSpec
from shoal.plan.candidates import WEIGHT_BITS, Shape, crosses_nodes, refusal, sizes_for
from shoal.plan.engines import Engine
from shoal.plan.rejections import where_time_goes
from shoal.plan.search import Search
from shoal.plan.setups import Verdict
from shoal.plan.units import show_bytes, show_duration, show_rate


class Signal(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    present: bool
    evidence: str
    remedy: str = ""


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """What another precision of the weights would need for the same goal."""

    precision: WeightPrecision
    setup: str
    devices: int
    dollars_per_hour: float | None
    saves: int
    """Devices, against the answer."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence alone, over so many GPUs."""

    devices: int
    seconds: float
    """For a token."""
    fits: bool
    crosses_nodes: bool
    goes: str
    """Where the time goes."""


# --- the three signals ------------------------------------------------------------------------------------------------


def signals(search: Search) -> list[Signal]:
    """What one GPU does; where the model does not fit in it, what the smallest engine that holds it does."""
    smallest = _smallest(search.workshop.fitting)
    fits = _fits(search, bool(smallest) and smallest[0].choice.shape.devices == 1)
    if not smallest:
        return [fits]
    targets = search.goal.targets
    best = max(
        smallest, key=lambda engine: (engine.capacity, -engine.curve.idle.excess(targets) if engine.curve.idle else 0.0)
    )
    return [fits, _idle_compute(search, best), _batching(search, best)]


def _smallest(engines: list[Engine]) -> list[Engine]:
    least = min((engine.choice.shape.devices for engine in engines), default=0)
    return [engine for engine in engines if engine.choice.shape.devices == least]


def _fits(search: Search, passed: bool) -> Signal:
    name = "it does not fit in one GPU"
    options, told = search.options, []
    for weights in options.weights:
        shape = search.workshop.engine_shape(Shape(), weights, options.caches[0], min(options.chunks))
        memory = budget(shape, profile(options.profile))
        needed = search.goal.demand.longest * memory.bytes_per_token + memory.bytes_per_sequence
        text = (
            f"{weights}: {show_bytes(memory.weights)} of weights, {show_bytes(needed)} of KV for the longest sequence"
        )
        told.append(f"{text}, of {show_bytes(memory.total)} usable")
        passed = passed or memory.cache >= needed
    return Signal(
        name=name,
        present=not passed,
        evidence="; ".join(told),
        remedy="" if passed else "a smaller precision, or split the model: tp within a node, pp across nodes",
    )


def compute_used(engine: Engine, batch: float) -> float:
    """Of the device's rate, by a decode step."""
    step = engine.decode_step(max(1, round(batch)))
    rates = engine.cost.engine.cluster.device.rates
    rate = rates.get("bfloat16") or max(rates.values())
    return sum(part.operations for part in step.parts) / (step.seconds * rate)


def _idle_compute(search: Search, engine: Engine) -> Signal:
    """A target is missed by one request alone, or at a load that leaves most of the compute idle."""
    name = "p99 rises with idle compute"
    targets = search.goal.targets
    idle = engine.curve.idle
    which = str(engine.choice.shape) if engine.choice.shape.devices > 1 else "one GPU"
    if idle is None or not targets:
        return Signal(name=name, present=False, evidence="no latency is asked for")
    share = compute_used(engine, 1)
    missed = [target for target in targets if idle.value(target) > target.seconds]
    if missed:
        target = missed[0]
        return Signal(
            name=name,
            present=True,
            evidence=f"on {which} one request alone has {target.flag.removeprefix('--')} of"
            f" {show_duration(idle.value(target))} (target {show_duration(target.seconds)}), with {share:.1%} of the"
            " compute used by its tokens",
            remedy="split every layer over more GPUs (tp), or a smaller precision",
        )
    return Signal(
        name=name,
        present=False,
        evidence=f"on {which} one request alone meets the targets: ITL {show_duration(idle.itl_mean)}, TTFT"
        f" {show_duration(idle.ttft_p99)}",
    )


def _batching(search: Search, engine: Engine) -> Signal:
    name = "batching has hit its limit"
    rate = search.goal.demand.rate
    load = engine.curve.best(search.goal.targets)
    which = str(engine.choice.shape) if engine.choice.shape.devices > 1 else "one GPU"
    if load is None or not load.rate:
        return Signal(
            name=name,
            present=True,
            evidence=f"{which} meets the targets for no two requests at once",
            remedy="more ranks in an engine first, then replicas",
        )
    curve = engine.curve
    limit = "its KV cache is full" if curve.full and curve.held < 2 * load.batch + 8 else "a target binds"
    evidence = (
        f"in closed form {which} carries {show_rate(load.rate)} at {load.batch:.0f} sequences at once, where {limit}"
    )
    present = load.rate < rate
    return Signal(
        name=name,
        present=present,
        evidence=f"{evidence}; asked are {show_rate(rate)}",
        remedy="replicas (dp): each adds as much" if present else "",
    )


# --- a smaller precision ----------------------------------------------------------------------------------------------


def smaller_precisions(given: tuple[WeightPrecision, ...], device: DeviceSpec) -> list[WeightPrecision]:
    """That the device computes in, or that at least are fewer bytes to read."""
    bits = min(WEIGHT_BITS[precision] for precision in given)
    eight: WeightPrecision = "float8" if "float8" in device.rates else "int8"
    four: WeightPrecision = "float4" if "float4" in device.rates else "int4"
    return [precision for precision in (eight, four) if WEIGHT_BITS[precision] < bits]


def advice(search: Search, answer: Verdict | None) -> list[Advice]:
    """Of each smaller precision that needs fewer devices than the answer, or any where there is none."""
    found = []
    for precision in smaller_precisions(search.options.weights, search.goal.cluster.device):
        most = None if answer is None else answer.setup.devices - 1
        options = msgspec.structs.replace(
            search.options, weights=(precision,), pools=False, closer=4, most_devices=most, first=True
        )
        other = Search(search.model, search.goal, options, search.calibration).run().answer
        if other is None or (answer is not None and other.setup.devices >= answer.setup.devices):
            continue
        found.append(
            Advice(
                precision=precision,
                setup=str(other.setup),
                devices=other.setup.devices,
                dollars_per_hour=other.setup.dollars_per_hour,
                saves=0 if answer is None else answer.setup.devices - other.setup.devices,
            )
        )
    return found


# --- where more GPUs stop helping -------------------------------------------------------------------------------------


def steps_by_devices(search: Search) -> list[Step]:
    """The time of a token of one sequence alone, by tensor-parallel ranks; also where it does not fit."""
    goal, options = search.goal, search.options
    weights, cache = options.weights[0], options.caches[0]
    context = int(search.workshop.traffic.context)
    found = []
    for size in sizes_for(goal.cluster):
        shape = Shape(tp=size)
        if refusal(shape, search.model) is not None:
            break
        engine = search.workshop.engine_shape(shape, weights, cache, min(options.chunks))
        cost = CostModel(engine, search.calibration)
        step = cost.step(StepShape(decode_rows=1, decode_context=context, sampled=1))
        needed = goal.demand.longest * cost.memory().bytes_per_token
        found.append(
            Step(
                devices=size,
                seconds=step.seconds,
                fits=cost.memory().cache >= needed,
                crosses_nodes=bool(crosses_nodes(shape, goal.cluster)),
                goes=where_time_goes(step, shape, goal.cluster),
            )
        )
    return found


def turning_point(steps: list[Step]) -> str:
    """In words; empty where every further GPU helps."""
    if len(steps) < 2:
        return ""
    best = min(steps, key=lambda step: step.seconds)
    later = [step for step in steps if step.devices > best.devices]
    if not later:
        return ""
    worse = later[0]
    return (
        f"one sequence alone is fastest on {best.devices} GPUs ({show_duration(best.seconds)} a token);"
        f" {worse.devices} take {show_duration(worse.seconds)}: {worse.goes}"
    )
