"""Every split that the cluster has devices for, and why some cannot be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.layout import Layout
from shoal.plan.candidates import Shape, crosses_nodes, engines_that_fit, lost_engines, refusal, shapes, sizes_for
from shoal.plan.catalogue import cluster
from shoal.plan.models import model_shape

DENSE, MIXTURE = model_shape("llama-3.1-70b"), model_shape("mixtral-8x7b")


@pytest.mark.parametrize("on", ["H100", "8xH100", "3x8xH100:ndr", "8x8xH100:ndr"])
def test_every_split_has_its_devices_and_comes_once(on: str) -> None:
    found = list(shapes(DENSE, cluster(on)))
    assert len(found) == len(set(found))
    assert max(shape.devices for shape in found) == cluster(on).num_devices
    assert all(shape.ep == shape.attention_dp == 1 for shape in found)
    assert Shape() in found


def test_experts_have_axes_of_their_own() -> None:
    found = set(shapes(MIXTURE, cluster("8xH100")))
    assert {Shape(ep=8), Shape(attention_dp=8), Shape(tp=2, pp=2, attention_dp=2)} <= found


def test_what_divides_a_node_or_the_cluster_is_a_size() -> None:
    assert sizes_for(cluster("3x8xH100:ndr")) == [1, 2, 3, 4, 6, 8, 12, 16, 24]


@pytest.mark.parametrize(
    ("shape", "model", "message"),
    [
        (Shape(tp=128), DENSE, "128 attention heads, and the model has 64"),
        (Shape(pp=128), DENSE, "more stages than the model's 80 layers"),
        (Shape(ep=16), MIXTURE, "16 does not divide the model's 8 experts"),
        (Shape(ep=4, attention_dp=4), MIXTURE, "16 does not divide"),
    ],
)
def test_what_the_architecture_refuses(shape: Shape, model: object, message: str) -> None:
    assert message in (refusal(shape, model) or "")  # type: ignore[arg-type]


def test_what_it_does_not_refuse() -> None:
    assert refusal(Shape(tp=8, pp=2), DENSE) is None
    assert refusal(Shape(tp=2, ep=4), MIXTURE) is None


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        (Shape(tp=8), []),
        (Shape(tp=16), ["tp"]),
        (Shape(tp=8, pp=2), ["pp"]),
        (Shape(tp=4, pp=2), []),
        (Shape(tp=2, attention_dp=8), ["attention-dp"]),
        (Shape(tp=4, cp=4), ["cp"]),
    ],
)
def test_which_axes_are_on_several_nodes(shape: Shape, axes: list[str]) -> None:
    assert crosses_nodes(shape, cluster("2x8xH100:ndr")) == axes


@given(devices=st.integers(1, 32))
def test_engines_that_fit_have_their_devices(devices: int) -> None:
    nodes = cluster("4x8xH100:ndr")
    assert engines_that_fit(devices, nodes) * devices <= nodes.num_devices
    assert engines_that_fit(devices, nodes) >= 1


def test_a_shape_reads_as_it_is_written() -> None:
    assert str(Shape(tp=8, pp=2, attention_dp=4)) == "tp8 x pp2 x attention-dp4"
    assert str(Shape()) == "tp1"
    assert Shape(tp=8, pp=2).layout == Layout(tp=8, pp=2)


def test_slices_of_a_gpu_fail_together() -> None:
    sliced = cluster("14xH100:1g.10gb")
    assert sliced.slices == 7
    assert [lost_engines(14, devices, sliced, "gpu") for devices in (1, 2, 7)] == [7, 4, 1]
    assert lost_engines(3, 1, sliced, "gpu") == 3
    assert lost_engines(8, 1, cluster("8xH100"), "gpu") == 1
