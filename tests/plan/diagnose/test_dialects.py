"""The table of names against where they are defined: shoal's own definitions, and what vLLM wrote."""

from __future__ import annotations

import pytest

from shoal.cli.app import ENGINE_FLAGS
from shoal.core import metrics
from shoal.plan.diagnose.dialects import DEVICE, ENGINES, QUANTITIES, SHOAL, VLLM, Dialect, dialects_of
from tests.plan.diagnose.expositions import recorded

DEFINED = {metric.name: metric for metric in vars(metrics).values() if isinstance(metric, metrics.Metric)}


@pytest.mark.parametrize("quantity", SHOAL.names)
def test_metrics_of_shoal_are_of_the_kind_that_they_are_read_as(quantity: str) -> None:
    for name in SHOAL.names[quantity]:
        metric = DEFINED[name.removesuffix("_total")]
        assert metric.kind == QUANTITIES[quantity].kind
        assert name.endswith("_total") == (metric.kind == "counter"), "as the exporter writes it"
    label, _ = SHOAL.only.get(quantity, ("", ""))
    assert not label or label in DEFINED[SHOAL.names[quantity][0]].labels


def test_replicas_of_shoal_have_their_label() -> None:
    replicas = SHOAL.replicas
    assert replicas is not None
    for name in (replicas.running, replicas.waiting, replicas.kv_usage):
        assert replicas.label in DEFINED[name].labels


def test_vllm_writes_a_name_of_every_quantity() -> None:
    exposition = recorded("light").exposition
    for quantity, names in VLLM.names.items():
        end = "_count" if QUANTITIES[quantity].kind == "histogram" else ""
        assert names[0] + end in exposition, quantity
    label, value = VLLM.only["deferred"]
    assert value in [sample.labels[label] for sample in exposition[VLLM.names["deferred"][0]]]


@pytest.mark.parametrize("dialect", [*ENGINES, DEVICE], ids=lambda one: one.name)
def test_tables_speak_of_known_quantities(dialect: Dialect) -> None:
    assert set(dialect.names) <= set(QUANTITIES)
    assert set(dialect.only) <= set(dialect.names)
    assert set(dialect.scale) <= {name for names in dialect.names.values() for name in names}


def test_every_engine_has_every_lever() -> None:
    for dialect in ENGINES:
        assert set(dialect.flags) - {"admission"} == set(SHOAL.flags), "only SGLang's admission can be set"


def test_flags_of_shoal_exist() -> None:
    known = {f"--{flag.replace('_', '-')}" for flag in ENGINE_FLAGS} | {"--deployment", "--port"}
    for text in SHOAL.flags.values():
        assert {word.strip(",") for word in text.split() if word.startswith("--")} <= known


def test_whose_metrics_they_are() -> None:
    assert dialects_of(list(recorded("light").exposition)) == (VLLM, False)
    assert dialects_of(["sglang:num_running_reqs"])[0] is ENGINES[2]
    assert dialects_of(["shoal:fleet_requests_running"])[0] is SHOAL
    assert dialects_of(["DCGM_FI_PROF_SM_ACTIVE"]) == (None, True)
    assert dialects_of(["node_load1"]) == (None, False)
