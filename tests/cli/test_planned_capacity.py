"""What `shoal plan` says a setup carries, held against `shoal simulate` of the deployment that it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.cli import main

REQUESTS = 2500
SETUPS = [
    ("llama-3.1-8b", "H100", 1, {"ttft_p99": 0.5, "itl_p99": 0.05}),
    ("llama-3.1-70b", "4xH100", 1, {"ttft_p99": 1.0, "itl_p99": 0.08}),
    ("qwen3-30b-a3b", "H100", 1, {"ttft_p99": 1.0, "itl_p99": 0.06}),
    ("llama-3.1-8b", "2xH100", 30, {"ttft_p99": 0.5, "itl_p99": 0.05}),
]


@pytest.mark.parametrize(
    ("model", "on", "rate", "targets"), SETUPS, ids=["dense", "dense, of two ranks or more", "experts", "replicas"]
)
def test_the_capacity_of_a_plan_is_that_of_its_deployment(
    model: str,
    on: str,
    rate: int,
    targets: dict[str, float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = str(tmp_path / "deployment.yaml")
    flags = [f"--{name.replace('_', '-')}={seconds}s" for name, seconds in targets.items()]
    load = ["--input", "1000", "--output", "100"]

    def said(*command: str) -> Any:
        assert main([*command, "--on", on, *load, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    made = said("plan", model, "--rate", f"{rate}/s", *flags, "--no-pools", "--no-attention-dp", "--write", file)
    most = made["answer"]["capacity"]

    def excess(rate: float) -> float:
        sent = ["--rate", f"{rate}/s", "--spread", "0", "--requests", str(REQUESTS), "--seed", "0"]
        summary = said("simulate", file, *sent)["summary"]
        found = {"ttft_p99": summary["ttft"]["p99"], "itl_p99": summary["itl"]["p99"]}
        return max(found[name] / seconds for name, seconds in targets.items())

    assert most > rate
    assert excess(0.95 * most) <= 1.0
    assert excess(1.15 * most) > 1.0
