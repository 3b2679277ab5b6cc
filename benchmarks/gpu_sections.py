"""What the GPU benchmark measures, a section for each engine that is started. Each yields rows as it has them.

A section is a process of its own on a card: memory is free when it begins, and a kernel that goes wrong takes no other
section with it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_ceilings import Ceilings, measure
from gpu_engine import Engine, NotAvailable, Run, config_of
from gpu_models import write_config
from gpu_report import Row
from shoal.core.config import EngineConfig
from shoal.core.cost.kernels import KernelWork, step_kernels
from shoal.core.cost.types import CachePrecision, EngineShape, StepShape, WeightPrecision
from shoal.core.hardware import Cluster, DeviceSpec, LinkSpec
from shoal.core.model_shape import shape_of
from shoal.core.model_spec import ModelSpec
from workloads import make_workloads

UNCOUNTED = 3
"""Steps of a batch size that build what is made on first use."""
SMALL, MIXTURE, LARGE = "llama-3.1-8b", "qwen3-30b-a3b", "llama-3.1-70b"


@dataclass(frozen=True)
class Scale:
    """How much is run. Tokens, sequences, steps."""

    context: int = 1024
    """Of the one sequence that decodes."""
    batch: int = 64
    batch_context: int = 2048
    chunk: int = 8192
    chunks: int = 6
    steps: int = 64
    long_batch: int = 8
    long_context: int = 32768
    requests: int = 256
    mixed_batch: int = 256
    repeats: int = 3
    """Of a decode run, whose steps count together."""


FULL = Scale()
QUICK = Scale(steps=32, chunks=4, long_batch=2, repeats=1)
TINY = Scale(
    context=48, batch=4, batch_context=64, chunk=96, chunks=3, steps=6, long_batch=2, long_context=160, requests=12
)


@dataclass(frozen=True)
class Setting:
    """Of a section."""

    device: str
    scale: Scale
    tiny: bool
    folder: Path
    """For configurations, and for the one checkpoint that is written."""
    ceilings: Ceilings | None
    depth: int
    seconds: float
    """That a part which can be ended early may take."""


Rows = Iterator[Row]


# --- limits -----------------------------------------------------------------------------------------------------------


def card(ceilings: Ceilings) -> DeviceSpec:
    """The card as it was measured in this run. What it has no rate of is computed as bfloat16."""
    widest = ceilings.rates["bfloat16"]
    return DeviceSpec(
        name="card",
        vendor="nvidia",
        memory_bytes=1,
        memory_bandwidth=ceilings.copy_bandwidth,
        rates={"bfloat16": widest, "float8": ceilings.rates.get("float8", widest), "float32": widest},
        provenance="measured",
    )


def kernels_of(
    spec: ModelSpec,
    shape: StepShape,
    device: DeviceSpec,
    weights: WeightPrecision = "bfloat16",
    cache: CachePrecision = "bfloat16",
) -> list[KernelWork]:
    """Work of a step, by core/cost."""
    nowhere = LinkSpec(name="none", kind="memory", bandwidth=1.0, latency=0.0)
    asked = EngineShape(
        model=shape_of(spec, "model"),
        cluster=Cluster(device=device, devices_per_node=1, num_nodes=1, scale_up=nowhere, network=None),
        weights=weights,
        cache=cache,
    )
    return step_kernels(asked, shape)


def bandwidth_seconds(kernels: list[KernelWork], device: DeviceSpec) -> float:
    """To read all weights and cached tokens once, at the bandwidth that a copy reaches. Activations are left out."""
    return sum(kernel.weight_bytes + kernel.cache_bytes for kernel in kernels) / device.memory_bandwidth


def compute_seconds(kernels: list[KernelWork], device: DeviceSpec) -> float:
    """All operations at the rates of large matrix products of their operands."""
    return sum(kernel.operations / device.rates[kernel.operands] for kernel in kernels)


def decoding(rows: int, context: int) -> StepShape:
    """`context` of all rows together."""
    return StepShape(decode_rows=rows, decode_context=context, sampled=rows)


def chunk_behind(tokens: int, behind: int) -> StepShape:
    return StepShape(
        prefill_tokens=tokens,
        prefill_rows=1,
        prefill_pairs=tokens * (behind + (tokens + 1) / 2),
        prefill_context=behind + tokens,
        sampled=1,
    )


# --- sections ---------------------------------------------------------------------------------------------------------


def ceilings_section(setting: Setting) -> Rows:
    found = measure(torch.device(setting.device), tiny=setting.tiny)
    yield from ceiling_rows(found)


def ceiling_rows(found: Ceilings) -> Rows:
    for what, name, value, unit, scale in (
        ("device copy, bytes read and written", "copy", found.copy_bandwidth, "GB/s", 1e9),
        ("device read", "read", found.read_bandwidth, "GB/s", 1e9),
        *((f"matrix products, {name}", name, rate, "TFLOP/s", 1e12) for name, rate in found.rates.items()),
    ):
        low, high = found.spread[name]
        yield Row("The card itself", what, value / scale, low / scale, high / scale, unit)
    for name, reason in found.missing.items():
        yield Row("The card itself", f"matrix products, {name}", note=reason)


def dense_section(setting: Setting) -> Rows:
    """Llama-3.1-8B in bfloat16: what the other sections are held against."""
    yield from _steps(setting, SMALL, "bfloat16", targets=(0.9, 0.8, 0.65))


def attention_section(setting: Setting) -> Rows:
    """The kernels alone, of a layer of the 8B, as the engine would choose them."""
    from gpu_attention import attention_rows

    with _engine(setting, SMALL, "bfloat16", 2, setting.scale.context) as engine:
        yield from attention_rows(engine, setting)


def dense_fp8_section(setting: Setting) -> Rows:
    yield from _steps(setting, SMALL, "fp8 weights", weights="float8")


def mixture_section(setting: Setting) -> Rows:
    yield from _steps(setting, MIXTURE, "bfloat16", repeats=1)


def large_section(setting: Setting) -> Rows:
    yield from _steps(setting, LARGE, "fp8 weights", weights="float8", repeats=1)


def long_section(setting: Setting) -> Rows:
    """Decode far behind, with the cache in bfloat16 and in FP8."""
    scale = setting.scale
    medians: dict[str, float] = {}
    caches: tuple[tuple[str, CachePrecision], ...] = (("bfloat16", "bfloat16"), ("fp8 cache", "float8"))
    for variant, cache in caches:
        section = f"{SMALL}, context of {scale.long_context:,}"
        what = f"decode, batch {scale.long_batch}, {variant}"
        try:
            longest = scale.long_context + _decoded(scale, scale.long_batch, scale.long_context)
            with _engine(setting, SMALL, variant, scale.long_batch, longest) as engine:
                row = _decode(setting, engine, section, what, scale.long_batch, scale.long_context, cache=cache)
        except NotAvailable as reason:
            yield Row(section, what, note=str(reason))
            continue
        medians[variant] = row.value or 0.0
        yield row
    if len(medians) == 2:
        yield Row(
            section, "FP8 cache beside bfloat16", medians["bfloat16"] / medians["fp8 cache"], unit="×", target=1.4
        )


def mixed_section(setting: Setting) -> Rows:
    """The request mix of the CPU benchmark, 16 times."""
    section = f"{SMALL}, mixed load of {setting.scale.requests} requests"
    longest = 512 + 256
    with _engine(setting, SMALL, "bfloat16", min(setting.scale.mixed_batch, setting.scale.requests), longest) as engine:
        prompts, counts = mix(setting.scale.requests, engine.info.spec.vocab_size)
        engine.run(prompts[:8], [8] * len(prompts[:8]))  # what is made on first use
        run = engine.run(prompts, counts)
        yield Row(section, "shoal", run.output_rate, unit="output tok/s", note=_latencies(run))
        if not engine.on_cpu:
            yield from _busy_rows(section, engine, prompts, counts)


def rival_section(setting: Setting) -> Rows:
    """transformers' continuous batching, on a model of the same configuration."""
    from gpu_rival import run_transformers

    section = f"{SMALL}, mixed load of {setting.scale.requests} requests"
    path = write_config(SMALL, setting.folder, tiny=setting.tiny)
    rate, note = run_transformers(
        path, setting.device, lambda vocab: mix(setting.scale.requests, vocab), setting.seconds
    )
    yield Row(section, "transformers, continuous batching", rate, unit="output tok/s", note=note)


def start_section(setting: Setting) -> Rows:
    """From a command to its first token, weights in the page cache."""
    from gpu_start import start_seconds

    path = write_config(SMALL, setting.folder, tiny=setting.tiny)
    seconds, note = start_seconds(path, setting.device, setting.seconds)
    target = None if setting.tiny else 15.0
    yield Row(SMALL, "start to first token", seconds, unit="s", target=target, most=True, note=note)


def profile_section(setting: Setting) -> Rows:
    """Where the time of the 8B's steps goes, by `shoal profile`'s own means."""
    from gpu_profile import profile_rows

    path = write_config(SMALL, setting.folder, tiny=setting.tiny)
    yield from profile_rows(path, setting, SMALL)


SECTIONS: dict[str, Callable[[Setting], Rows]] = {
    "dense": dense_section,
    "dense-fp8": dense_fp8_section,
    "attention": attention_section,
    "mixed": mixed_section,
    "rival": rival_section,
    "mixture": mixture_section,
    "large": large_section,
    "long": long_section,
    "start": start_section,
    "profile": profile_section,
}
"""In the order of their worth: what time does not suffice for is at the end."""
ESTIMATES = {
    "dense": 50.0,
    "dense-fp8": 45.0,
    "attention": 25.0,
    "mixed": 45.0,
    "rival": 60.0,
    "mixture": 60.0,
    "large": 75.0,
    "long": 60.0,
    "start": 75.0,
    "profile": 45.0,
}
"""Seconds that a section is given at the least on a card; with less left it is left out."""


# --- how they measure -------------------------------------------------------------------------------------------------


def mix(requests: int, vocab_size: int) -> tuple[list[list[int]], list[int]]:
    """Lengths of the CPU benchmark's 16 requests again and again, each with a prompt of its own."""
    items = make_workloads(vocab_size)["b"].items
    draw = random.Random(7)
    chosen = [items[number % len(items)] for number in range(requests)]
    return [draw.choices(range(vocab_size), k=len(item.prompt)) for item in chosen], [
        item.max_tokens for item in chosen
    ]


def _engine(setting: Setting, model: str, variant: str, sequences: int, max_len: int) -> Engine:
    """Raises NotAvailable."""
    config: EngineConfig = config_of(
        variant,
        model=str(write_config(model, setting.folder, tiny=setting.tiny)),
        load_format="random",
        device=setting.device,
        max_len=max_len,
        max_sequences=sequences,
        max_batch_tokens=max(setting.scale.chunk, sequences),
        depth=setting.depth,
        prefix_caching=False,
    )
    return Engine(config)


def _steps(
    setting: Setting,
    model: str,
    variant: str,
    weights: WeightPrecision = "bfloat16",
    targets: tuple[float | None, float | None, float | None] = (None, None, None),
    repeats: int | None = None,
) -> Rows:
    """Decode of one and of many, and prefill. `targets`: of the limit, for each."""
    scale = setting.scale
    section = f"{model}, {variant}"
    decodes = ((1, scale.context, targets[0]), (scale.batch, scale.batch_context, targets[1]))
    longest = max(scale.chunk + 2, *(context + _decoded(scale, batch, context) for batch, context, _ in decodes))
    try:
        with _engine(setting, model, variant, scale.batch, longest) as engine:
            for batch, context, target in decodes:
                what = f"decode, batch {batch}, context {context:,}"
                yield _decode(
                    setting, engine, section, what, batch, context, weights=weights, target=target, repeats=repeats
                )
            yield _prefill(setting, engine, section, weights, targets[2])
    except NotAvailable as reason:
        yield Row(section, "decode and prefill", note=str(reason))


def _decoded(scale: Scale, batch: int, context: int) -> int:
    """Tokens of each sequence: the first decode while the last are still being read, and some steps are not counted."""
    return scale.steps + 2 * -(-batch * context // scale.chunk) + UNCOUNTED + 2


def _decode(
    setting: Setting,
    engine: Engine,
    section: str,
    what: str,
    batch: int,
    context: int,
    *,
    weights: WeightPrecision = "bfloat16",
    cache: CachePrecision = "bfloat16",
    target: float | None = None,
    repeats: int | None = None,
) -> Row:
    scale = setting.scale
    steps: list[tuple[float, int]] = []
    for repeat in range(repeats or scale.repeats):
        prompts = engine.prompts([context] * batch, seed=repeat)
        run = engine.run(prompts, [_decoded(scale, batch, context)] * batch)
        steps += run.periods(batch, batch)[UNCOUNTED : UNCOUNTED + scale.steps]
    if not steps:
        return Row(section, what, note="the batch never decoded all together")
    periods = [seconds for seconds, _ in steps]
    row = _milliseconds(section, what, periods)
    row.note = f"{batch / statistics.median(periods):,.0f} tok/s; {_kernels(engine)}"
    if setting.ceilings is not None:
        device, seen = card(setting.ceilings), round(statistics.mean(context for _, context in steps))
        kernels = kernels_of(engine.info.spec, decoding(batch, seen), device, weights, cache)
        row.limit, row.least = 1e3 * bandwidth_seconds(kernels, device), True
        row.target = None if setting.tiny else target
    return row


def _prefill(setting: Setting, engine: Engine, section: str, weights: WeightPrecision, target: float | None) -> Row:
    """A prompt of one chunk at a time, from the end of one such step to the end of the next."""
    chunk, count = setting.scale.chunk, setting.scale.chunks + 2
    run = engine.run(engine.prompts([chunk] * count, seed=9), [1] * count)
    periods = [seconds for seconds, _ in run.periods(1, chunk)[1:]]
    what = f"prefill, chunks of {chunk:,}"
    if not periods:
        return Row(section, what, note="no step was of one chunk alone")
    row = _milliseconds(section, what, periods)
    row.note = f"{chunk / statistics.median(periods):,.0f} tok/s"
    if setting.ceilings is not None:
        device = card(setting.ceilings)
        kernels = kernels_of(engine.info.spec, chunk_behind(chunk, 0), device, weights)
        row.limit, row.least = 1e3 * compute_seconds(kernels, device), True
        row.target = None if setting.tiny else target
    return row


def _milliseconds(section: str, what: str, seconds: list[float]) -> Row:
    """Median; the tenth and the ninetieth of a hundred are the spread."""
    ordered = sorted(1e3 * each for each in seconds)
    place = len(ordered) // 10
    return Row(section, what, statistics.median(ordered), ordered[place], ordered[-1 - place], "ms a step")


def _kernels(engine: Engine) -> str:
    return f"{engine.info.ops} arithmetic, {engine.info.attention} attention"


def _latencies(run: Run) -> str:
    first = sorted(run.first)
    return f"TTFT p50 {statistics.median(first):.2f} s, p99 {first[int(0.99 * (len(first) - 1))]:.2f} s, " + (
        f"TPOT p50 {1e3 * run.tpot():.1f} ms, {len(run.marks)} steps"
    )


def _busy_rows(section: str, engine: Engine, prompts: list[list[int]], counts: list[int]) -> Rows:
    """A window of the same load again, under the profiler: tracing slows the host, so the card is busier without."""
    from gpu_profile import Window

    window = Window(first=40, last=80)
    engine.run(prompts, counts, window.on_step)
    figures = window.figures()
    if figures is None:
        yield Row(section, "card busy", note="the load was too short for the window that is traced")
        return
    busy, gap = figures
    yield Row(section, "card busy", 100 * busy, unit="% of the steady state", target=95.0, note="while traced")
    yield Row(
        section, "longest idle between two kernels, median over steps", 1e6 * gap, unit="µs", target=50.0, most=True
    )


def wait_for_memory(device: str, seconds: float = 5.0) -> None:
    """Until what the section before held is free again: a process gives its memory back a moment after its end."""
    kind = torch.device(device)
    if kind.type == "cpu":
        return
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        free, total = torch.get_device_module(kind).mem_get_info(kind)
        if free > 0.9 * total:
            return
        time.sleep(0.5)
