"""A real `shoal serve`, loaded so that a sign must show, and diagnosed over HTTP as a user would."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal.cli import main
from shoal.plan.diagnose.dialects import QUANTITIES, SHOAL
from shoal.plan.diagnose.prometheus_text import parse
from tests.checkpoints import make_checkpoint
from tests.serve.running import RunningServer, running, wait_until

BLOCK_BYTES = 3 * 2 * 2 * 16 * 4 * 16
"""Layers, keys and values, heads, their size, bytes of a float32, tokens a block: of the tiny checkpoint."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=512)


@contextlib.contextmanager
def load(server: RunningServer, clients: int, tokens: int) -> Iterator[None]:
    """So many clients that ask again as soon as they are answered, until the block ends.

    Of three times as many as there are places one must wait, unless seven are kept from asking at once; and windows are
    longer than a machine stands still.
    """
    stop = threading.Event()

    def ask(seed: int) -> None:
        prompt = [3 + (seed * 7 + i) % 400 for i in range(16)]
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not stop.is_set():
                assert client.post("/v1/completions", json=body).status_code == 200

    threads = [threading.Thread(target=ask, args=(seed,), daemon=True) for seed in range(clients)]
    for thread in threads:
        thread.start()
    ended = 'shoal:request_success_total{finished_reason="length"}'
    before = server.metric(ended)
    try:
        wait_until(lambda: server.metric(ended) >= before + 2, "answers")
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)


def diagnosed(server: RunningServer, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["diagnose", "--metrics", server.url, "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def states(report: dict[str, Any]) -> dict[str, str]:
    return {finding["signal"]: finding["state"] for finding in report["targets"][0]["findings"]}


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[RunningServer]:
    """Four places in the batch, and KV blocks for four short sequences or for one long one and a half."""
    engine = {"max_len": 384, "kv_cache_bytes": 28 * BLOCK_BYTES, "max_sequences": 4}
    with running(checkpoint, engine=engine) as server:
        yield server


def test_every_name_of_the_table_is_written(server: RunningServer) -> None:
    exposition = parse(server.client.get("/metrics").text)
    for quantity, names in SHOAL.names.items():
        if quantity == "rank_imbalance":  # only of mixtures of experts
            continue
        end = "_count" if QUANTITIES[quantity].kind == "histogram" else ""
        assert names[0] + end in exposition


def test_an_idle_engine_is_healthy(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    report = diagnosed(server, capsys, "--watch", "1")
    assert report["verdict"] == "idle"
    assert set(states(report).values()) == {"absent"}


def test_few_places_in_the_batch_are_its_limit(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    with load(server, clients=12, tokens=24):
        report = diagnosed(server, capsys, "--watch", "2", "--max-num-seqs", "4")
        # The same, as people see it.
        assert main(["diagnose", "--metrics", server.url + "/metrics"]) == 0
        text = " ".join(capsys.readouterr().out.split())
    assert report["targets"][0]["basis"] == "window"
    assert states(report)["does_not_fit"] == "absent"
    assert states(report)["batching_limit"] == "present"
    finding = report["targets"][0]["findings"][2]
    assert "shoal:fleet_requests_waiting" in finding["evidence"][1]["metric"], "the gateway's queue counts"
    assert "3 batching has hit its limit: yes" in text
    assert "--data-parallel-size" in text


def test_too_few_kv_blocks_do_not_fit(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    with load(server, clients=8, tokens=300):
        report = diagnosed(server, capsys, "--watch", "5")
    assert report["verdict"] == "found"
    assert states(report)["does_not_fit"] == "present"
    assert states(report)["batching_limit"] == "absent"
    finding = report["targets"][0]["findings"][0]
    assert finding["certainty"] == "shown"
    assert any(one["metric"] == "shoal:num_preemptions_total" and one["value"] > 0 for one in finding["evidence"])
