"""The engines that could serve a goal at all: enumerated, pruned by memory and by what one request alone would take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import msgspec

from shoal.core.cost.calibration import Calibration
from shoal.core.cost.memory import budget
from shoal.core.cost.model import CostModel
from shoal.core.cost.profiles import profile
from shoal.core.cost.types import CachePrecision, EngineShape, MemoryBudget, StepCost, StepShape, WeightPrecision
from shoal.core.hardware import Provenance
from shoal.core.model_shape import ModelShape
from shoal.plan.candidates import Shape, crosses_nodes, engine_shape, refusal, shapes
from shoal.plan.event_loop import bubble
from shoal.plan.goal import Goal, Target
from shoal.plan.rejections import Ledger, where_time_goes
from shoal.plan.screen import Curve, Load, Traffic, traffic_of
from shoal.plan.setups import EngineChoice
from shoal.plan.units import show_bytes, show_duration

SLACK = 1.15
"""By how much a closed form may miss a target and still be looked at closely."""


FAR = 4
"""An engine of more than so many times the devices of a setup that does cannot be the smallest."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a search may choose from."""

    weights: tuple[WeightPrecision, ...] = ("bfloat16",)
    caches: tuple[CachePrecision, ...] = ("bfloat16",)
    profile: str = "shoal"
    chunks: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    """Token budgets of a step."""
    max_sequences: int = 512
    memory_share: float = 0.9
    attention_dp: bool = True
    """Look at groups that have attention of their own and experts in common, too."""
    pools: bool = True
    """Look at prefill and decode apart, too."""
    most_devices: int | None = None
    """Of a setup."""
    closer: int = 24
    """Setups at most whose latencies are worked out by the event loop on the way to the answer."""
    first: bool = False
    """The first setup that meets the goal will do, whatever others of its cost carry."""


class Engine:
    """One way to split and store a model, with a step's token budget."""

    def __init__(
        self,
        choice: EngineChoice,
        cost: CostModel,
        memory: MemoryBudget,
        traffic: Traffic,
        targets: tuple[Target, ...],
    ) -> None:
        self.choice, self.cost, self.memory = choice, cost, memory
        self.traffic, self._targets = traffic, targets

    @cached_property
    def curve(self) -> Curve:
        """As far as the targets are not missed by much."""
        return self.curve_for(self._targets)

    def curve_for(self, targets: tuple[Target, ...]) -> Curve:
        return Curve(
            self.cost.seconds,
            self.traffic,
            chunk=self.choice.max_batch_tokens * self.choice.shape.attention_dp,
            max_sequences=self.choice.max_sequences * self.choice.shape.attention_dp,
            cache_tokens=self.held_tokens,
            front_seconds=self.front_seconds,
            stages=self.choice.shape.pp,
            stage_seconds=self.cost.stage_seconds if self.choice.shape.pp > 1 else None,
            bubble=bubble(self.cost),
            targets=targets,
        )

    @cached_property
    def provenance(self) -> Provenance:
        return self.decode_step().provenance

    @cached_property
    def capacity(self) -> float:
        """Requests a second under the targets, in closed form."""
        load = self.curve.best(self._targets)
        return load.rate if load is not None else 0.0

    @property
    def front_seconds(self) -> float:
        """Of a request outside of steps."""
        profile = self.cost.profile
        own = profile.front_request_seconds + profile.front_token_seconds * self.traffic.input
        return profile.front_seconds + own

    @property
    def held_tokens(self) -> float:
        """Of all groups together, at most; sequences' own bytes count as tokens."""
        memory = self.memory
        if not memory.bytes_per_token:
            rows = memory.cache / max(1.0, memory.bytes_per_sequence)
            return rows * self.traffic.context * self.choice.shape.attention_dp
        per_row = memory.bytes_per_sequence / memory.bytes_per_token
        share = self.traffic.context / (self.traffic.context + per_row)
        return memory.cache_tokens * share * self.choice.shape.attention_dp

    def decode_step(self, batch: int = 1) -> StepCost:
        """Explained, at the workload's mean context."""
        context = int(batch * self.traffic.context)
        return self.cost.step(StepShape(decode_rows=batch, decode_context=context, sampled=batch))

    @property
    def precision(self) -> str:
        return self.choice.weights + ("" if self.choice.cache == "bfloat16" else f", {self.choice.cache} KV")


class Workshop:
    """Makes engines, and writes down why others were not made."""

    def __init__(
        self, model: ModelShape, goal: Goal, options: Options, calibration: Calibration | None, ledger: Ledger
    ) -> None:
        self.model, self.goal, self.options = model, goal, options
        self.calibration, self.ledger = calibration, ledger
        self.traffic = traffic_of(goal.demand)
        self._profile = profile(options.profile)
        self.looked_at = 0
        self.enough: int | None = None
        self.fitting: list[Engine] = []
        """Whatever memory holds, also if one request alone misses a target."""

    def engines(self) -> Iterator[list[Engine]]:
        """Of each split and precision, the smaller splits first: one for each chunk size that fits, all of which pass
        for one request alone. Once `enough` devices are known to do, engines of many times as many are only counted."""
        cluster, seen = self.goal.cluster, dict[tuple[object, ...], str]()
        ordered = sorted(shapes(self.model, cluster), key=lambda shape: shape.devices)
        for shape in ordered:
            if self.options.most_devices is not None and shape.devices > self.options.most_devices:
                break
            if shape.attention_dp > 1 and not self.options.attention_dp:
                continue
            why = refusal(shape, self.model)
            if why is not None:
                self.ledger.add("layout", shape, "any precision", shape.devices, _told(why))
                continue
            for weights in self.options.weights:
                for cache in self.options.caches:
                    if self.enough is not None and shape.devices > FAR * self.enough:
                        self._too_large(shape, weights, cache)
                        continue
                    made = self._of(shape, weights, cache)
                    if made and self._is_new(made[0], seen):
                        yield made

    def _is_new(self, engine: Engine, seen: dict[tuple[object, ...], str]) -> bool:
        """Splits of experts by tp or by ep may come to the same bytes and times: one of them is enough."""
        if not self.model.is_mixture:
            return True
        steps = (
            StepShape(decode_rows=1, decode_context=1000, sampled=1),
            StepShape(decode_rows=64, decode_context=9999),
        )
        prompt = StepShape(prefill_tokens=512, prefill_rows=1, prefill_pairs=131328.0, prefill_context=512)
        times = tuple(round(engine.cost.seconds(step) * 1e7) for step in (*steps, prompt))
        choice = engine.choice
        sign = (choice.shape.devices, choice.weights, choice.cache, choice.shape.attention_dp, choice.shape.pp)
        known = seen.setdefault((*sign, times, round(engine.memory.cache / 1e7)), str(choice.shape))
        return known == str(choice.shape)

    def _too_large(self, shape: Shape, weights: WeightPrecision, cache: CachePrecision) -> None:
        enough = self.enough

        def why() -> tuple[str, str]:
            cost = CostModel(self.engine_shape(shape, weights, cache, min(self.options.chunks)), self.calibration)
            goes = network_share(cost, self.traffic, shape)
            return f"one engine is {shape.devices} GPUs, {enough} do{goes}", ""

        self.ledger.add("larger", shape, weights, 1e6 + shape.devices, why)

    def _of(self, shape: Shape, weights: WeightPrecision, cache: CachePrecision) -> list[Engine]:
        made: list[Engine] = []
        for chunk in sorted(self.options.chunks):
            self.looked_at += 1
            engine = self.engine_shape(shape, weights, cache, chunk)
            memory = budget(engine, self._profile)
            if not self._fits(shape, memory, weights, cache):
                break
            choice = EngineChoice(
                shape=shape,
                weights=weights,
                cache=cache,
                max_batch_tokens=chunk,
                max_sequences=self.options.max_sequences,
            )
            cost = CostModel(engine, self.calibration)
            made.append(Engine(choice, cost, memory, self.traffic, self.goal.targets))
        self.fitting += made
        return [engine for engine in made if self._passes_alone(engine)]

    def engine_shape(
        self,
        shape: Shape,
        weights: WeightPrecision,
        cache: CachePrecision,
        chunk: int,
        max_sequences: int | None = None,
    ) -> EngineShape:
        return engine_shape(
            self.model,
            self.goal.cluster,
            shape,
            weights,
            cache,
            profile=self.options.profile,
            max_batch_tokens=chunk,
            max_sequences=max_sequences or self.options.max_sequences,
            memory_share=self.options.memory_share,
        )

    def _fits(self, shape: Shape, memory: MemoryBudget, weights: str, cache: str) -> bool:
        longest = self.goal.demand.longest
        needed = longest * memory.bytes_per_token + memory.bytes_per_sequence
        if memory.cache >= needed:
            return True
        precision = weights if cache == "bfloat16" else f"{weights}, {cache} KV"
        missing = needed - memory.cache
        if memory.cache > 0:
            self.ledger.add("cache", shape, precision, missing, lambda: self._no_room(shape, memory, needed))
        else:
            self.ledger.add("weights", shape, precision, missing, lambda: self._too_heavy(memory, missing))
        return False

    def _too_heavy(self, memory: MemoryBudget, missing: float) -> tuple[str, str]:
        rest = memory.activations + memory.workspace
        why = (
            f"does not fit: {show_bytes(memory.weights)} of weights and {show_bytes(rest)} beside them on a GPU, of"
            f" which {show_bytes(memory.total)} can be used"
        )
        return why, f"{show_bytes(missing)} more a GPU, or a smaller precision"

    def _no_room(self, shape: Shape, memory: MemoryBudget, needed: float) -> tuple[str, str]:
        longest = self.goal.demand.longest
        why = (
            f"no room for one sequence: {longest:,} tokens take {show_bytes(needed)} of KV a GPU, and the weights leave"
            f" {show_bytes(memory.cache)}"
        )
        return why, f"sequences of at most {memory.cache_tokens:,} tokens"

    def _passes_alone(self, engine: Engine) -> bool:
        idle = engine.curve.idle
        if idle is None:
            return False
        missed = [target for target in self.goal.targets if idle.value(target) > target.seconds * SLACK]
        if not missed:
            return True
        worst = max(missed, key=lambda target: idle.value(target) / target.seconds)
        distance = idle.value(worst) / worst.seconds
        self.ledger.add(
            worst.metric,
            engine.choice.shape,
            engine.precision,
            distance,
            lambda: floor_reason(engine, idle, worst),
        )
        return False


def network_share(cost: CostModel, traffic: Traffic, shape: Shape) -> str:
    """What of a decode step goes into a network, in words; empty where no rank of a layer is on another node."""
    cluster = cost.engine.cluster
    if not {"tp", "ep", "cp", "attention-dp"} & set(crosses_nodes(shape, cluster)):
        return ""
    step = cost.step(StepShape(decode_rows=1, decode_context=int(traffic.context), sampled=1))
    return f"; {where_time_goes(step, shape, cluster)}"


def _told(why: str) -> Callable[[], tuple[str, str]]:
    return lambda: (why, "")


def floor_reason(engine: Engine, idle: Load, target: Target) -> tuple[str, str]:
    """Why one request alone misses the target, and what it would meet."""
    best = show_duration(idle.value(target))
    shape, cluster = engine.choice.shape, engine.cost.engine.cluster
    if target.metric == "ttft":
        why = f"a prompt of {engine.traffic.long_input:,.0f} tokens alone takes {best}, the target is"
    else:
        goes = where_time_goes(engine.decode_step(), shape, cluster)
        why = f"{goes}; one sequence alone gets a token every {best}, the target is"
    return f"{why} {show_duration(target.seconds)}", f"{target.flag} {best.replace(' ', '')}"
