"""What an operator sees of experts: GET /v1/experts and the gauge of imbalance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.core.expert_load import rows_of
from shoal.core.model_config import spec_from_config
from tests.checkpoints import make_checkpoint
from tests.serve.running import RunningServer, running, wait_until


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("models") / "mixture")


@pytest.fixture(scope="module")
def mixture_server(mixture: Path) -> Iterator[RunningServer]:
    with running(mixture) as server:
        yield server


def test_rows_are_counted_from_the_first_request_on(mixture: Path, mixture_server: RunningServer) -> None:
    client = mixture_server.client

    def rows_by_layer() -> list[int]:
        engines = client.get("/v1/experts").json()["engines"]
        return [sum(layer["experts"]) for engine in engines for layer in engine["layers"]]

    wait_until(lambda: rows_by_layer() == [0] * 3, "a report in which warm-up is not counted")
    body = {"prompt": list(range(10, 30)), "max_tokens": 5, "ignore_eos": True, "temperature": 0}
    assert client.post("/v1/completions", json=body).status_code == 200
    wait_until(lambda: rows_by_layer() == [(20 + 4) * 3] * 3, "every row to be counted")

    (engine,) = client.get("/v1/experts").json()["engines"]
    assert [layer["layer"] for layer in engine["layers"]] == [0, 1, 2]
    assert all(len(layer["experts"]) == 8 and layer["ranks"] == [72] for layer in engine["layers"])
    busiest = sum(max(layer["experts"]) for layer in engine["layers"]) / (3 * 72 / 8)
    assert engine["expert_imbalance"] == pytest.approx(busiest) and busiest > 1
    gauge = 'shoal:expert_imbalance{engine="0",over="%s"}'
    assert mixture_server.metric(gauge % "experts") == pytest.approx(busiest)
    assert mixture_server.metric(gauge % "ranks") == 1.0


def test_the_answer_is_what_expert_load_takes(mixture: Path, mixture_server: RunningServer) -> None:
    spec = spec_from_config(json.loads((mixture / "config.json").read_text()))
    answer = mixture_server.client.get("/v1/experts")
    rows = rows_of(answer.content, spec)
    assert [rows[layer["layer"]] for layer in answer.json()["engines"][0]["layers"]] == [
        layer["experts"] for layer in answer.json()["engines"][0]["layers"]
    ]
    assert sorted(rows) == [0, 1, 2]
