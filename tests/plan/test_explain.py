"""One configuration's budget adds up, and says where the limit is."""

from __future__ import annotations

import re

import pytest

from shoal.core.cost.model import CostModel
from shoal.core.cost.types import EngineShape
from shoal.core.layout import Layout
from shoal.plan.catalogue import cluster
from shoal.plan.explain import Explanation, explain, sections
from shoal.plan.models import model_shape
from shoal.plan.report import plain


def explained(model: str, on: str, layout: Layout, batch: int = 1, context: int = 2000, **more: object) -> Explanation:
    engine = EngineShape(model=model_shape(model), cluster=cluster(on), layout=layout, **more)  # type: ignore[arg-type]
    return explain(CostModel(engine), batch=batch, context=context, prompt=2000)


@pytest.mark.parametrize(
    ("model", "on", "layout"),
    [
        ("llama-3.1-70b", "8xH100", Layout(tp=4)),
        ("llama-3.1-405b", "2x8xH100:ndr", Layout(tp=8, pp=2)),
        ("mixtral-8x7b", "8xA100", Layout(tp=2, ep=2)),
    ],
)
def test_parts_add_up(model: str, on: str, layout: Layout) -> None:
    found = explained(model, on, layout, batch=16)
    memory = found.memory
    assert memory.weights + memory.activations + memory.workspace + memory.cache == memory.total
    for step in found.steps:
        assert sum(part.seconds for part in step.parts) == pytest.approx(step.seconds)
        assert step.low <= step.seconds <= step.high
    text = plain(sections(found))
    for part in ("weights", "KV cache", "linear", "Where the limit is"):
        assert part in text


def test_a_token_sends_what_all_reduces_carry() -> None:
    """70B: two reductions a layer of 8,192 numbers in 16 bits, of which a ring of 8 sends 2 x 7/8."""
    found = explained("llama-3.1-70b", "8xH100", Layout(tp=8))
    (sent,) = found.steps[0].bytes_per_token.values()
    assert sent == pytest.approx(2 * 80 * 8192 * 2 * 2 * 7 / 8, rel=0.02)


def test_the_limit_of_memory_is_a_number_of_sequences() -> None:
    found = explained("llama-3.1-70b", "8xH100", Layout(tp=4), batch=8, context=4000)
    tokens = found.memory.cache / found.memory.bytes_per_token
    assert found.held == pytest.approx(tokens / 4000, rel=0.01)
    assert any(line.startswith("memory: KV for ") for line in found.limits)
    short = explained("llama-3.1-70b", "8xH100", Layout(tp=4), batch=8, context=120_000)
    assert "8 were asked for" in short.limits[0]


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    found = explained("llama-3.1-70b", "8xH100", Layout())
    assert len(found.limits) == 1
    assert re.search(r"does not fit; \d+\.?\d* GB a GPU are missing", found.limits[0])


def test_the_speed_of_light_is_below_the_step() -> None:
    found = explained("llama-3.1-8b", "H100", Layout())
    (line,) = [line for line in found.limits if line.startswith("speed of light")]
    assert float(re.findall(r"the step takes ([\d.]+) times", line)[0]) >= 1
