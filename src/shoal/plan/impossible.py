"""Nothing meets the goal: which bound breaks it, and the nearest goal that something meets."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import msgspec

from shoal.core.cost.memory import budget
from shoal.core.cost.profiles import profile
from shoal.plan.candidates import engines_that_fit, lost_engines, refusal, shapes
from shoal.plan.engines import Engine
from shoal.plan.goal import Target
from shoal.plan.rejections import where_time_goes
from shoal.plan.screen import Load
from shoal.plan.search import Search
from shoal.plan.setups import Pool, Verdict
from shoal.plan.units import show_bytes, show_duration, show_money, show_rate

SCREENED = 80
"""Engines, those that are fastest for one request alone, whose whole curve is drawn."""
LOOKED_AT = 4
"""Setups that the event loop judges on the way to the nearest goal."""
MOST_LOOKED_AT = 12
"""Setups whose most it is asked for, unless what was found is more than the closed form says of the next."""
HEADROOM = 1.05
"""A goal is said a little above what is predicted, so that it holds when it is asked for."""


class Impossible(msgspec.Struct, frozen=True, kw_only=True):
    bound: str
    """What no setup can do, with its number."""
    nearest: str
    """The goal that something meets, as flags; empty where none is known."""
    setup: str = ""
    """That meets it."""


def explain(search: Search) -> Impossible:
    if not search.workshop.fitting:
        return _does_not_fit(search)
    floors = _floors(search)
    if not floors:
        over_budget = _budget(search)
        if over_budget is not None:
            return over_budget
    engines = search.engines or search.workshop.fitting
    relaxed = _nearest(search, engines)
    if relaxed is not None:
        return relaxed if not floors else msgspec.structs.replace(relaxed, bound="; ".join(floors))
    slower = _slower(search, engines)
    return slower if not floors else msgspec.structs.replace(slower, bound="; ".join(floors))


def _does_not_fit(search: Search) -> Impossible:
    """No engine on the whole cluster holds the weights and one sequence."""
    goal, options = search.goal, search.options
    best = None
    for shape in shapes(search.model, goal.cluster):
        if refusal(shape, search.model) is not None:
            continue
        for weights in options.weights:
            for cache in options.caches:
                engine = search.workshop.engine_shape(shape, weights, cache, min(options.chunks))
                memory = budget(engine, profile(options.profile))
                needed = goal.demand.longest * memory.bytes_per_token + memory.bytes_per_sequence
                missing = needed - memory.cache
                if best is None or missing < best[0]:
                    best = missing, shape, memory, needed
    if best is None:
        return Impossible(bound="the model cannot be split over these devices", nearest="")
    missing, shape, memory, needed = best
    whole = (memory.weights + needed) * shape.devices
    usable = memory.total - memory.activations - memory.workspace
    least = ceil(whole / max(1, usable))
    bound = (
        f"memory: {search.model.name} with a sequence of {goal.demand.longest:,} tokens takes {show_bytes(whole)}, and"
        f" {goal.cluster.num_devices} x {goal.cluster.device.name} can give it {show_bytes(usable * shape.devices)}"
    )
    return Impossible(
        bound=bound, nearest=f"at least {least} such GPUs, or a smaller --precision, or shorter sequences"
    )


def _floors(search: Search) -> list[str]:
    """Targets that one request alone misses on every engine that fits, with the best that any does."""
    told = []
    for target in search.goal.targets:
        alone = [(idle.value(target), engine) for engine in search.workshop.fitting if (idle := engine.curve.idle)]
        if not alone:
            continue
        value, engine = min(alone, key=lambda pair: pair[0])
        if value <= target.seconds:
            continue
        shape = engine.choice.shape
        why = (
            f"a prompt of {engine.traffic.long_input:,.0f} tokens takes that long"
            if target.metric == "ttft"
            else where_time_goes(engine.decode_step(), shape, search.goal.cluster)
        )
        told.append(
            f"{target}: the fastest engine ({shape}) needs {show_duration(value)} for one request alone ({why})"
        )
    return told


def _nearest(search: Search, engines: list[Engine]) -> Impossible | None:
    """The least relaxed targets that are met at the rate: of the engines whose targets must be relaxed least, all that
    the cluster holds of each. None where nothing sustains the rate, or something meets every target."""
    goal = search.goal
    options: list[tuple[float, int, Engine, Load]] = []
    for engine in sorted(engines, key=_alone(goal.targets))[:SCREENED]:
        fits = engines_that_fit(engine.choice.shape.devices, goal.cluster)
        left = fits - _lost(search, engine)
        load = engine.curve_for(()).at(goal.demand.rate / left) if left > 0 else None
        if load is not None:
            options.append((load.excess(goal.targets), fits, engine, load))
    options.sort(key=lambda option: option[0])
    judged = [search.judge(search.candidate(engine, fits, load)) for _, fits, engine, load in options[:LOOKED_AT]]
    best = min((one for one in judged if one is not None), key=lambda one: _excess(one, search), default=None)
    if best is None:
        return None
    prediction = best.degraded or best.prediction
    flags, missed = [], []
    for target in goal.targets:
        value = prediction.interval(target).value
        if value > target.seconds:
            flags.append(f"{target.flag} {show_duration(value * HEADROOM).replace(' ', '')}")
            missed.append(
                f"{target}: {show_duration(value)} is the least at {show_rate(goal.demand.rate)} ({best.setup})"
            )
    if not flags:
        return None
    return Impossible(bound="; ".join(missed), nearest=" ".join(flags), setup=str(best.setup))


def _alone(targets: tuple[Target, ...]) -> Callable[[Engine], float]:
    def excess(engine: Engine) -> float:
        return engine.curve.idle.excess(targets) if engine.curve.idle else float("inf")

    return excess


def _excess(one: Verdict, search: Search) -> float:
    return (one.degraded or one.prediction).excess(search.goal.targets)


def _slower(search: Search, engines: list[Engine]) -> Impossible:
    """The most that is carried under the targets, with the loss that must be survived, by the event loop: of the
    engines that carry most in closed form, all that the cluster holds of each."""
    goal = search.goal
    options: list[tuple[float, int, Engine]] = []
    for engine in engines:
        left = engines_that_fit(engine.choice.shape.devices, goal.cluster) - _lost(search, engine)
        if left > 0 and engine.capacity > 0:
            options.append((engine.capacity * left, left, engine))
    options.sort(key=lambda option: -option[0])
    best: tuple[float, Engine] | None = None
    for near, left, engine in options[:MOST_LOOKED_AT]:
        if best is not None and near < best[0]:
            break
        load = engine.curve.best(goal.targets) or engine.curve.loads[-1]
        carried = search.runs(search.candidate(engine, left, load), left).carries(goal.targets, near)
        if carried and (best is None or carried > best[0]):
            best = carried, engine
    if best is None:
        why = f"nothing is left to serve after the loss of a {goal.survive}" if goal.survive else "no engine serves it"
        return Impossible(bound=why, nearest="")
    most, engine = best
    shape, cluster = engine.choice.shape, goal.cluster
    pool = Pool(engine=engine.choice, replicas=engines_that_fit(shape.devices, cluster))
    bound = (
        f"rate: {cluster.num_devices} x {cluster.device.name} carry {show_rate(most)} at most ({shape}), and"
        f" {show_rate(goal.demand.rate)} is asked for"
    )
    return Impossible(bound=bound, nearest=f"--rate {show_rate(most / HEADROOM)}", setup=str(pool))


def _lost(search: Search, engine: Engine) -> int:
    """With all that fit."""
    devices, cluster = engine.choice.shape.devices, search.goal.cluster
    return lost_engines(engines_that_fit(devices, cluster), devices, cluster, search.goal.survive)


def _budget(search: Search) -> Impossible | None:
    """Something meets the goal but for its price."""
    goal = search.goal
    if goal.budget is None:
        return None
    freed = msgspec.structs.replace(goal, budget=None)
    answer = Search(search.model, freed, search.options, search.calibration).run().answer
    if answer is None or answer.setup.dollars_per_hour is None:
        return None
    price = show_money(answer.setup.dollars_per_hour)
    return Impossible(
        bound=f"budget: the cheapest setup that meets the targets is {answer.setup}, {price}/h",
        nearest=f"--budget {price}/h",
        setup=str(answer.setup),
    )
