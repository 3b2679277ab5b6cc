"""CostModel: time and memory of one engine's steps. One for planner, simulator and router.

What does not depend on a step is worked out once (coefficients.py), so that a step's time is some dozens of
multiplications. A step is of the whole engine: with attention_dp, each group computes its share of the rows.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.core.cost import memory
from shoal.core.cost.calibration import Calibration, weakest
from shoal.core.cost.coefficients import Coefficients, ExpertCoefficients, coefficients_of, context_bytes
from shoal.core.cost.collectives import all_reduce_sent, all_to_all_sent
from shoal.core.cost.operators import busiest, distinct_experts, roofline
from shoal.core.cost.profiles import EngineProfile, profile
from shoal.core.cost.residuals import UNCALIBRATED
from shoal.core.cost.types import EngineShape, MemoryBudget, Part, StepCost, StepShape

Bound = Literal["compute", "bandwidth", "latency", "link", "host"]


class CostModel:
    def __init__(self, engine: EngineShape, calibration: Calibration | None = None) -> None:
        self.engine = engine
        self.calibration = calibration or Calibration()
        self.engine, self.profile = calibrated(engine, profile(engine.profile), self.calibration)
        self._c: Coefficients = coefficients_of(self.engine, self.profile)
        self._factors = self.calibration.factors
        self._sharpness = 3.0 if self.calibration.sharpness is None else self.calibration.sharpness
        self._known: dict[tuple[int, int, int, int], tuple[float, ...]] = {}
        """What of a step's parts does not depend on its contexts, by its counts."""

    def seconds(self, shape: StepShape) -> float:
        """Of a step through all stages, from its plan to its tokens."""
        return sum(self._times(shape))

    def stage_seconds(self, shape: StepShape) -> float:
        """How long a step keeps the slowest stage: with `layout.pp` steps under way, one ends every so often."""
        times = self._times(shape)
        return sum(times) - times[6]

    def interval(self, metric: str) -> tuple[float, float]:
        """What a prediction of the metric (step, tpot, ttft, throughput) is multiplied by, for nine of ten cases to lie
        between: of the calibration's own residuals, or of those that come with shoal."""
        kind = "mixture" if self.engine.model.is_mixture else "dense"
        for source in (self.calibration, UNCALIBRATED):
            found = source.residual(metric, self.profile.name, kind)
            if found is not None:
                return found.low, found.high
        return 0.5, 2.0

    def memory(self) -> MemoryBudget:
        return memory.budget(self.engine, self.profile)

    def step(self, shape: StepShape) -> StepCost:
        """The same as `seconds`, explained."""
        c = self._c
        times = self._times(shape)
        tokens = self._tokens(shape)
        work = {
            "linear": (c.linear_bytes, 2 * c.linear_parameters * tokens),
            "experts": self._experts_work(shape),
            "attention": self._attention_work(shape),
            "collectives": (self._wire(shape), 0.0),
            "head": (c.head_bytes, 2 * c.head_parameters * shape.sampled),
        }
        parts = tuple(
            Part(
                name=name,
                seconds=seconds,
                bound=self._bound(name, shape),
                bytes=work.get(name, (0.0, 0.0))[0],
                operations=work.get(name, (0.0, 0.0))[1],
            )
            for name, seconds in zip(PARTS, times, strict=True)
        )
        total = sum(times)
        own = self.engine.cluster.device.provenance
        provenance = self.calibration.provenance if self.calibration.device else weakest(own, "datasheet")
        low, high = self.interval("step")
        return StepCost(
            seconds=total,
            parts=parts,
            low=total * low,
            high=total * high,
            provenance=provenance,
            link_bytes=self._link_bytes(shape),
        )

    # --- the parts, in the order of PARTS -----------------------------------------------------------------------------

    def _times(self, shape: StepShape) -> tuple[float, ...]:
        c, factors = self._c, self._factors
        key = (shape.prefill_tokens, shape.prefill_rows, shape.decode_rows, shape.sampled)
        known = self._known.get(key)
        if known is None:
            known = self._without_contexts(shape)
            if len(self._known) < MOST_KNOWN:
                self._known[key] = known
        tokens, linear, experts, collectives, kernels, head, host = known
        if tokens <= 0:
            return (0.0,) * len(PARTS)
        attention = self._attention(shape)
        if shape.prefill_tokens:
            # What the device does while the host is still launching costs nothing more.
            kernels += max(0.0, c.eager - linear - experts - attention - collectives - kernels)
        if factors:
            get = factors.get
            linear *= get("linear", 1.0)
            experts *= get("experts", 1.0)
            attention *= get("attention", 1.0)
            collectives *= get("collectives", 1.0)
            head *= get("head", 1.0)
            host *= get("host", 1.0)
        pipeline = 0.0
        if c.stages > 1:
            others = (linear + experts + attention + collectives + kernels) * (c.all_stages - 1)
            pipeline = others + c.send_latency + c.send_per_token * tokens
        return linear, experts, attention, collectives, head, kernels, pipeline, host

    def _without_contexts(self, shape: StepShape) -> tuple[float, ...]:
        """A device's tokens, and the seconds of linear layers, experts, collectives, kernels, head and host."""
        c, sharpness = self._c, self._sharpness
        tokens = self._tokens(shape)
        linear = sum(roofline(stream, compute * tokens, sharpness) for stream, compute in c.linear) + c.linear_launch
        experts = self._experts(shape) if c.experts else 0.0
        head = roofline(c.head_stream, c.head_compute * shape.sampled / c.groups, sharpness) if shape.sampled else 0.0
        host = c.step_seconds + c.row_seconds * shape.rows / c.groups + c.token_seconds * shape.tokens
        return tokens, linear, experts, c.collectives(tokens), c.kernels + c.elementwise * tokens, head, host

    def _tokens(self, shape: StepShape) -> float:
        """That one device computes the linear layers of: the one of the group that has most of them."""
        c = self._c
        if c.groups == 1:
            return shape.prefill_tokens / c.context_ranks + shape.decode_rows
        prompts = shape.prefill_tokens / (min(c.groups, shape.prefill_rows or 1) * c.context_ranks)
        return prompts + -(-shape.decode_rows // c.groups)

    def _experts(self, shape: StepShape) -> float:
        total = 0.0
        tokens = shape.tokens
        for kind in self._c.experts:
            total += kind.count * (self._expert_layer(kind, tokens) + kind.launch)
        return total

    def _expert_layer(self, kind: ExpertCoefficients, tokens: int) -> float:
        pairs = tokens * kind.chosen_share * kind.local
        touched = distinct_experts(kind.local, kind.chosen_share * kind.local, tokens, kind.skew)
        if kind.parts > 1:
            most = busiest(pairs, kind.parts)
            touched, pairs = min(kind.local, touched * most), pairs * most
        return roofline(touched * kind.stream, pairs * kind.compute)

    def _attention(self, shape: StepShape) -> float:
        total = 0.0
        c = self._c
        decode_groups, groups = min(c.groups, shape.decode_rows or 1), min(c.groups, shape.prefill_rows or 1)
        for kind in c.attention:
            prefill = decode = 0.0
            if shape.decode_rows:
                context = float(shape.decode_context)
                if kind.window:
                    context = min(context, float(shape.decode_rows * kind.window))
                context /= decode_groups
                decode = roofline(
                    context * kind.decode_stream
                    + shape.decode_context / decode_groups * kind.index_stream
                    + shape.decode_rows / decode_groups * kind.row_stream,
                    context * kind.decode_compute,
                )
                decode += kind.launch
            if shape.prefill_rows:
                pairs = shape.prefill_pairs
                context = float(shape.prefill_context)
                if kind.window:
                    pairs = min(pairs, float(shape.prefill_tokens) * kind.window)
                    context = min(context, shape.prefill_tokens + float(shape.prefill_rows * kind.window))
                prefill = roofline(
                    context / groups * kind.decode_stream + shape.prefill_rows / groups * kind.row_stream,
                    pairs / groups * kind.prefill_compute
                    + shape.prefill_pairs / groups * kind.index_compute
                    + shape.prefill_tokens / groups * kind.token_compute,
                )
                prefill += kind.launch
            total += kind.count * (prefill + decode)
        return total

    # --- what an explanation adds ------------------------------------------------------------------------------------

    def _experts_work(self, shape: StepShape) -> tuple[float, float]:
        moved = operations = 0.0
        for kind in self._c.experts:
            touched = distinct_experts(kind.local, kind.chosen_share * kind.local, shape.tokens, kind.skew)
            moved += kind.count * touched * kind.bytes
            operations += kind.count * 2 * kind.parameters * shape.tokens * kind.chosen_share * kind.local
        return moved, operations

    def _attention_work(self, shape: StepShape) -> tuple[float, float]:
        moved = operations = 0.0
        groups = self._c.groups
        for kind in self._c.attention:
            decode, prefill = float(shape.decode_context), float(shape.prefill_context)
            pairs = shape.prefill_pairs
            if kind.window:
                decode = min(decode, float(shape.decode_rows * kind.window))
                prefill = min(prefill, float(shape.prefill_rows * kind.window) + shape.prefill_tokens)
                pairs = min(pairs, float(shape.prefill_tokens) * kind.window)
            indexed = (shape.decode_context + shape.prefill_context) * kind.index_bytes
            moved += kind.count * ((decode + prefill) * kind.bytes + indexed + shape.rows * kind.row_bytes) / groups
            operations += kind.count * (pairs * kind.pair_operations + decode * kind.context_operations) / groups
        return moved, operations

    def _bound(self, name: str, shape: StepShape) -> Bound:
        c = self._c
        tokens = self._tokens(shape)
        if name == "linear":
            return "compute" if sum(x for _, x in c.linear) * tokens > sum(x for x, _ in c.linear) else "bandwidth"
        if name == "experts":
            busy = sum(
                kind.count * (shape.tokens * kind.chosen_share * kind.local * kind.compute) for kind in c.experts
            )
            read = sum(
                kind.count * distinct_experts(kind.local, kind.chosen_share * kind.local, shape.tokens) * kind.stream
                for kind in c.experts
            )
            return "compute" if busy > read else "bandwidth"
        if name == "attention":
            return "compute" if shape.prefill_tokens > shape.decode_rows else "bandwidth"
        if name == "collectives":
            return "latency" if c.collectives(tokens) < 2 * c.collectives(1e-9) else "link"
        others: dict[str, Bound] = {"head": "bandwidth", "kernels": "latency", "pipeline": "link", "host": "host"}
        return others[name]

    def _wire(self, shape: StepShape) -> float:
        return sum(self._link_bytes(shape).values())

    def _link_bytes(self, shape: StepShape) -> dict[str, float]:
        c, tokens, cluster, layout = self._c, self._tokens(shape), self.engine.cluster, self.engine.layout
        sent: dict[str, float] = {}

        def add(more: dict[str, float], times: float = 1.0) -> None:
            for name, size in more.items():
                if size * times:
                    sent[name] = sent.get(name, 0.0) + size * times

        add(all_reduce_sent(cluster, c.ranks, 1, tokens * c.hidden_bytes), c.reduces)
        if c.exchange_ranks > 1:
            add(all_to_all_sent(cluster, c.exchange_ranks * layout.tp, 1, tokens * c.exchange_bytes))
        if c.context_ranks > 1:
            link = cluster.link(c.context_ranks, c.ranks)
            for layer in self.engine.model.layers:
                gathered, parts = context_bytes(layer, tokens * c.context_ranks, c.ranks)
                others = (c.context_ranks - 1) / c.context_ranks
                add({link.name: gathered * others + parts * c.context_ranks * others}, layer.count / c.all_stages)
        add({link.name: tokens * c.hidden_bytes for link in c.sends})
        return sent


MOST_KNOWN = 65536
"""Steps by their counts whose times are kept."""
PARTS = ("linear", "experts", "attention", "collectives", "head", "kernels", "pipeline", "host")


def calibrated(engine: EngineShape, own: EngineProfile, calibration: Calibration) -> tuple[EngineShape, EngineProfile]:
    """Device, link and profile with what was measured in the place of what is printed."""
    cluster, device = engine.cluster, engine.cluster.device
    if calibration.fractions or calibration.kernel_seconds is not None:
        device = msgspec.structs.replace(
            device,
            fractions={**device.fractions, **calibration.fractions},
            kernel_seconds=device.kernel_seconds if calibration.kernel_seconds is None else calibration.kernel_seconds,
        )
    link = cluster.scale_up
    if calibration.link_latency is not None:
        link = msgspec.structs.replace(link, latency=calibration.link_latency, all_reduce={})
    if calibration.link_bandwidth is not None:
        link = msgspec.structs.replace(link, bandwidth=calibration.link_bandwidth, reached=1.0, all_reduce={})
    names = ("step_seconds", "row_seconds", "token_seconds", "layer_kernels", "front_seconds")
    given = {name: value for name in names if (value := getattr(calibration, name)) is not None}
    cluster = msgspec.structs.replace(cluster, device=device, scale_up=link)
    return msgspec.structs.replace(engine, cluster=cluster), msgspec.structs.replace(own, **given)
