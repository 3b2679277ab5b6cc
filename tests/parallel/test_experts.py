"""What the experts of a running engine have computed, and copies of the busy ones: the same tokens, less imbalance."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from shoal.core.config import EngineConfig
from shoal.core.expert_load import BadExpertLoad, ExpertReport
from shoal.core.layout import Layout, LayoutError
from shoal.engine.executor import open_executor
from tests.checkpoints import VOCAB, make_checkpoint
from tests.parallel.engines import Counts, requests, run_layout

WORK = requests(VOCAB, count=6, max_tokens=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("checkpoint"))


def counts(places: int) -> Counts:
    return Counts(WORK, places, num_visits=3, num_layers=3)


def test_copies_of_the_busiest_experts_even_out_the_ranks(checkpoint: Path, tmp_path: Path) -> None:
    whole, alone, copied = counts(1), counts(4), counts(4)
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
