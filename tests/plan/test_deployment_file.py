"""What a plan writes is what `shoal serve --deployment` loads; what serve cannot run is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from shoal.config import load_config
from shoal.core import config
from shoal.core.config import EngineConfig
from shoal.plan.candidates import Shape
from shoal.plan.catalogue import cluster
from shoal.plan.deployment_file import CACHES, WEIGHTS, NotServable, as_yaml, check, deployment
from shoal.plan.setups import EngineChoice, Pool, Setup
from shoal.serve import deployment as serve


def setup(shape: Shape, replicas: int = 1, weights: str = "bfloat16", cache: str = "bfloat16") -> Setup:
    choice = EngineChoice(shape=shape, weights=weights, cache=cache, max_batch_tokens=512, max_sequences=64)  # type: ignore[arg-type]
    pool = Pool(engine=choice, replicas=replicas)
    return Setup(pools=(pool,), devices=pool.devices, dollars_per_hour=None)


@pytest.mark.parametrize(
    ("shape", "replicas", "weights"),
    [
        (Shape(tp=4), 2, "bfloat16"),
        (Shape(tp=2, pp=2), 1, "int8"),
        (Shape(), 1, "float32"),
        (Shape(tp=8, pp=2), 1, "bfloat16"),
    ],
)
def test_serve_loads_it_with_the_same_engines(tmp_path: Path, shape: Shape, replicas: int, weights: str) -> None:
    content = deployment(
        setup(shape, replicas, weights), cluster("2x8xH100:ndr"), name="m", model="org/m", max_len=4096
    )
    file = tmp_path / "deployment.yaml"
    file.write_text(as_yaml(content, "from a plan\nof two lines"), encoding="utf-8")
    loaded = load_config(serve.Deployment, file, {})
    serve.check(loaded)
    (model,) = loaded.models
    assert (model.name, model.model, model.max_len, model.dtype) == ("m", "org/m", 4096, weights)
    assert model.layout == shape.layout
    assert (model.max_sequences, model.max_batch_tokens) == (64, 512)
    engines = serve.engine_configs(model, "/models/m")
    assert len(engines) == replicas
    assert model.launch.launcher == ("ray" if shape.devices * replicas > 8 else "local")
    assert file.read_text(encoding="utf-8").startswith("# from a plan\n# of two lines\nmodels:\n")


def test_on_a_cpu_it_is_for_a_cpu() -> None:
    content = deployment(setup(Shape()), cluster("cpu"), name="m", model="m", max_len=100)
    assert content["models"][0]["device"] == "cpu"
    with pytest.raises(NotServable, match="keeps KV in float8 on GPUs alone; plan with --kv bfloat16"):
        deployment(setup(Shape(), cache="float8"), cluster("cpu"), name="m", model="m", max_len=100)


def test_a_cache_of_few_bits_is_kept() -> None:
    content = deployment(setup(Shape(), cache="float8"), cluster("8xH100"), name="m", model="m", max_len=100)
    assert content["models"][0]["kv_dtype"] == "float8"


def test_what_serve_can_store_is_what_its_configuration_says() -> None:
    assert set(WEIGHTS) == set(get_args(config.WeightPrecision))
    assert set(CACHES) | {"auto"} == set(get_args(get_type_hints(EngineConfig)["kv_dtype"]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (setup(Shape(), weights="float8"), "has float8; plan with --precision int8"),
        (setup(Shape(), weights="int4"), "has int4; plan with --precision bfloat16"),
        (setup(Shape(attention_dp=8)), "--no-attention-dp"),
    ],
)
def test_what_serve_cannot_run_is_refused_with_what_would_do(bad: Setup, message: str) -> None:
    with pytest.raises(NotServable) as refusal:
        check(bad)
    assert message in str(refusal.value)


def test_pools_are_refused() -> None:
    one = setup(Shape()).pools[0]
    apart = Setup(pools=(one, one), devices=2, dollars_per_hour=None)
    with pytest.raises(NotServable, match="--no-pools"):
        check(apart)
