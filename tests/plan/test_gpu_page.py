"""docs/gpu.md and docs/kernels.md against core/cost: every cell of their tables, and what the text draws from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shoal.core.cost.kernels import KernelWork, step_kernels
from shoal.core.cost.profiles import PROFILES
from shoal.core.cost.types import EngineShape, StepShape
from shoal.core.hardware import Cluster, LinkSpec
from shoal.core.layout import Layout
from shoal.plan import catalogue
from shoal.plan.models import model_shape

KERNELS = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
PAGE = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
H200 = catalogue.device("H200")
LINK = LinkSpec(name="none", kind="memory", bandwidth=1.0, latency=0.0)
ENGINE = EngineShape(
    model=model_shape("llama-3.1-8b"),
    cluster=Cluster(device=H200, devices_per_node=1, num_nodes=1, scale_up=LINK, network=None),
)
STEPS = (
    StepShape(decode_rows=1, decode_context=1024, sampled=1),
    StepShape(decode_rows=64, decode_context=64 * 2048, sampled=64),
    StepShape(prefill_tokens=8192, prefill_rows=1, prefill_pairs=8192 * 8193 / 2, prefill_context=8192, sampled=1),
)
COUNTED = [step_kernels(ENGINE, step) for step in STEPS]


def cells(name: str, part: str, kernels: list[list[KernelWork]]) -> list[str]:
    """Of one row: kernels of the three steps."""
    found = [name, part, f"{sum(kernel.launches for kernel in kernels[0]):,.0f}"]
    for number, of_step in enumerate(kernels):
        found.append(f"{sum(kernel.bytes for kernel in of_step) / 1e6:,.1f}")
        if number == 2:
            found.append(f"{sum(kernel.operations for kernel in of_step) / 1e9:,.1f}")
        found.append(f"{sum(kernel.limit_seconds(H200) for kernel in of_step) * 1e6:,.1f}")
    return found


def test_the_table_of_kernels() -> None:
    table = re.search(r"^\| kernel \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert table is not None
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table[1].splitlines()]
    wanted = [cells(each[0].name, each[0].part, [[kernel] for kernel in each]) for each in zip(*COUNTED, strict=True)]
    assert rows == [*wanted, cells("**a step**", "", COUNTED)]


def test_the_text_draws_on_the_table() -> None:
    one, many, prompt = COUNTED
    weights = sum(kernel.weight_bytes for kernel in one if kernel.part == "linear")
    head = sum(kernel.weight_bytes for kernel in one if kernel.part == "head")
    whole = sum(kernel.bytes for kernel in one)
    assert (
        f"{(weights + head) / whole:.0%} of a step's bytes are the weights of the projections, the MLP and the" in PAGE
    )
    cache = sum(kernel.cache_bytes for kernel in many)
    assert 0.5 < cache / sum(kernel.bytes for kernel in many) < 0.6
    seconds = {kernel.name: kernel.limit_seconds(H200) for kernel in prompt}
    total = sum(seconds.values())
    linear = sum(kernel.limit_seconds(H200) for kernel in prompt if kernel.part == "linear")
    assert (
        f"matrix products, {linear / total:.0%} of the time, and attention, {seconds['paged attention'] / total:.0%}"
        in PAGE
    )
    assert sum(kernel.launches for kernel in one) == pytest.approx(292, abs=10)


def of_chunk(tokens: int, tp: int) -> list[KernelWork]:
    cluster = Cluster(device=H200, devices_per_node=8, num_nodes=1, scale_up=LINK, network=None)
    engine = EngineShape(model=ENGINE.model, cluster=cluster, layout=Layout(tp=tp))
    pairs = tokens * (tokens + 1) / 2
    step = StepShape(prefill_tokens=tokens, prefill_rows=1, prefill_pairs=pairs, prefill_context=tokens, sampled=1)
    return step_kernels(engine, step)


def test_only_short_chunks_are_worth_a_graph() -> None:
    """The engine's bound: 512 tokens (`shoal.engine.graphs.CHUNK_TOKENS`)."""
    table = re.search(r"^\| tokens of the chunk \|.*\n\|[-|]+\n((?:\|.*\n)+)", KERNELS, re.MULTILINE)
    assert table is not None
    seconds = {}
    for line in table[1].splitlines():
        tokens, *cells = (float(cell) for cell in line.strip("|").split("|"))
        found = [sum(kernel.limit_seconds(H200) for kernel in of_chunk(int(tokens), tp)) for tp in (1, 8)]
        assert cells == [round(1e3 * value, 2) for value in found], line
        seconds[int(tokens)] = found
    launches = sum(kernel.launches for kernel in of_chunk(512, 1))
    fast, slow = (launches * PROFILES[name].eager_kernel_seconds for name in ("shoal", "vllm"))
    assert (f"{1e3 * fast:.1f} ms of the host" in KERNELS) and (f"{1e3 * slow:.1f} ms" in KERNELS)
    assert all(found > slow for tokens, two in seconds.items() if tokens > 512 for found in two)
    assert seconds[512][1] < fast, "of eight GPUs the host is the slower one, even at the lower figure"


def test_the_page_says_what_it_is_not() -> None:
    assert "**Not yet measured on a GPU.**" in PAGE
    assert (H200.memory_bandwidth, H200.rates["bfloat16"]) == (4.8e12, 989e12)
