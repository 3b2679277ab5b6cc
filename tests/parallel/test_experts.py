"""What the experts of a running engine have computed, and copies of the busy ones: the same tokens, less imbalance."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from shoal.core.config import EngineConfig
from shoal.core.expert_load import BadExpertLoad, ExpertLoad, ExpertReport, merged
from shoal.core.layout import Layout, LayoutError
from shoal.engine.executor import Executor, open_executor
from tests.checkpoints import VOCAB, make_checkpoint
from tests.parallel.engines import requests, run_layout

WORK = requests(VOCAB, count=6, max_tokens=32)
NUM_EXPERTS = 8
VISITS = 3 * sum(len(request.prompt) + 31 for request in WORK)
"""Rows of one layer: the last token of a sequence is never computed."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("checkpoint"))


class Counts:
    """Called at the end of a run: what its executor says once every rank has answered."""

    def __init__(self, places: int) -> None:
        self._places = places
        self.load: ExpertLoad

    def __call__(self, executor: Executor) -> None:
        deadline = time.monotonic() + 20
        while True:
            self.load = merged(executor.expert_rows(), NUM_EXPERTS, self._places)
            if [sum(layer.experts) for layer in self.load.layers] == [VISITS] * 3:
                return
            assert time.monotonic() < deadline and executor.failure() is None, self.load
            time.sleep(0.01)


def test_copies_of_the_busiest_experts_even_out_the_ranks(checkpoint: Path, tmp_path: Path) -> None:
    whole, alone, copied = Counts(1), Counts(4), Counts(4)
    expected = run_layout(checkpoint, Layout(), WORK, whole)
    assert whole.load.rank_imbalance == 1.0 < whole.load.expert_imbalance
    layout, report = Layout(ep=4), tmp_path / "load.json"
    report.write_bytes(msgspec.json.encode(ExpertReport(engines=[whole.load])))
    settings = {"expert_dispatch": "all_to_all", "threads": 1}
    assert run_layout(checkpoint, layout, WORK, alone, **settings) == expected
    settings |= {"redundant_experts": 1, "expert_load": str(report)}
    assert run_layout(checkpoint, layout, WORK, copied, **settings) == expected
    assert copied.load.expert_imbalance == alone.load.expert_imbalance == whole.load.expert_imbalance
    assert 1.0 <= copied.load.rank_imbalance < alone.load.rank_imbalance


def test_wrong_settings_are_refused_before_anything_starts(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="expert_dispatch is for experts on several ranks"):
        open_executor(EngineConfig(model=str(checkpoint), expert_dispatch="all_gather"))
    missing = str(tmp_path / "missing.json")
    with pytest.raises(BadExpertLoad, match=r"missing\.json: No such file"):
        open_executor(EngineConfig(model=str(checkpoint), layout=Layout(ep=2), expert_load=missing))
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(BadExpertLoad, match=r"wrong\.json: is not what GET /v1/experts answers"):
        wrong = str(tmp_path / "wrong.json")
        open_executor(EngineConfig(model=str(checkpoint), layout=Layout(ep=2), expert_load=wrong))
