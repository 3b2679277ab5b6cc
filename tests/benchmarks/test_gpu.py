"""The GPU benchmark: its code paths over tiny models on a CPU, and what it makes of its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu
from gpu_ceilings import Ceilings
from gpu_engine import Engine, NotAvailable, config_of
from gpu_models import CONFIGS, TINY, write_config
from gpu_profile import busy_and_pause
from gpu_report import Row, markdown, shown
from gpu_sections import ESTIMATES, SECTIONS, bandwidth_seconds, card, compute_seconds, decoding, kernels_of, mix
from shoal.core.model_config import spec_from_config
from shoal.core.model_shape import shape_of
from shoal.plan.models import model_shape

SCRIPT = Path(gpu.__file__)


@pytest.fixture(autouse=True)
def same_torch_threads() -> Iterator[None]:
    """A worker sets torch's threads for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    file = tmp_path / "figures.json"
    status = gpu.main(["--device", "cpu", "--tiny", "--json", str(file), *arguments])
    report = json.loads(file.read_text(encoding="utf-8"))
    return status, report["rows"], report


def test_the_same_code_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in SECTIONS if name not in ("rival", "start")]
    status, rows, report = run(tmp_path, "--sections", ",".join(names))
    assert status == 0
    assert not [note for note in report["notes"] if note.startswith("- ")], report["notes"]
    measured = {(row["section"], row["what"]) for row in rows if row["value"]}
    for section in ("llama-3.1-8b, bfloat16", "qwen3-30b-a3b, bfloat16"):
        assert len([what for where, what in measured if where == section]) == 3
    limited = [row for row in rows if row["section"] == "llama-3.1-8b, bfloat16"]
    assert all(row["limit"] and row["fraction"] and row["low"] <= row["value"] <= row["high"] for row in limited)
    for row in rows:  # what the engine cannot do is said, and is no figure
        assert row["value"] is not None or row["note"]
    assert {row["what"] for row in rows if row["section"].endswith("prefill, 96 tokens")} >= {"linear", "attention"}
    printed = capsys.readouterr().out
    assert "## The card itself" in printed and "| what | measured |" in printed


def test_a_section_in_a_process_of_its_own(tmp_path: Path) -> None:
    status, rows, report = run(tmp_path, "--sections", "attention", "--isolated")
    assert status == 0 and not [note for note in report["notes"] if note.startswith("- ")], report["notes"]
    assert {row["section"].split(":")[0] for row in rows} == {"The card itself", "Attention alone"}


def test_from_a_command_to_a_token(tmp_path: Path) -> None:
    _, rows, report = run(tmp_path, "--sections", "start")
    (row,) = [row for row in rows if row["what"] == "start to first token"]
    assert row["value"] is not None and 0.2 < row["value"] < 60, report["notes"]


def test_transformers_under_the_same_load(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    _, rows, report = run(tmp_path, "--sections", "rival")
    (row,) = [row for row in rows if row["what"].startswith("transformers")]
    assert row["value"] is not None and row["value"] > 0, row["note"]


def test_without_a_card_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    done = subprocess.run([sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "there is no GPU here" in done.stderr and done.stdout == ""
    done = subprocess.run([sys.executable, str(SCRIPT), "--device", "cpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--tiny" in done.stderr


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--tiny", "--sections", "dense,sparse"]) == 2
    assert "there is no 'sparse'" in capsys.readouterr().err
    assert SECTIONS.keys() == ESTIMATES.keys()


def test_a_broken_section_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: Any) -> Iterator[Row]:
        yield Row("before", "one row", 1.0)
        raise ValueError("a kernel went wrong")

    monkeypatch.setitem(SECTIONS, "dense", broken)
    _, rows, report = run(tmp_path, "--sections", "dense,attention")
    assert "- dense: ValueError: a kernel went wrong" in report["notes"]
    assert {"before", "Attention alone: native"} <= {row["section"] for row in rows} | {"Attention alone: native"}
    assert any(row["section"].startswith("Attention alone") for row in rows)


# --- models and limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_models_are_the_published_ones(name: str) -> None:
    assert shape_of(spec_from_config(CONFIGS[name]), "same").layers == model_shape(name).layers
    assert spec_from_config(CONFIGS[name]).num_parameters() == model_shape(name).num_parameters()
    assert spec_from_config(TINY[name]).num_parameters() < 500_000


def test_limits_of_a_card_that_is_known() -> None:
    """Figures of a made-up card: 4 TB/s, 800 TFLOP/s."""
    device = card(Ceilings(4e12, 4e12, {"bfloat16": 800e12}))
    spec = spec_from_config(CONFIGS["llama-3.1-8b"])
    decode = kernels_of(spec, decoding(64, 64 * 2048), device)
    weights = 2 * (8_030_261_248 - 128_256 * 4096 - 65 * 4096 + 64 * 4096)
    cache = (64 * 2048 + 64) * 32 * 2 * 8 * 128 * 2  # read, and written for the new tokens
    assert bandwidth_seconds(decode, device) == pytest.approx((weights + cache) / 4e12)
    operations = 2 * 64 * (8_030_261_248 - 128_256 * 4096 - 65 * 4096) + 64 * 2048 * 32 * 4 * 32 * 128
    assert compute_seconds(decode, device) == pytest.approx(operations / 800e12)


def test_the_load_is_the_mix_of_the_other_benchmark() -> None:
    prompts, counts = mix(256, 128256)
    assert len(prompts) == len(counts) == 256 and counts[:16] == counts[16:32]
    assert all(32 <= len(prompt) <= 512 for prompt in prompts) and all(32 <= count <= 256 for count in counts)
    assert prompts[0] != prompts[16] and len(prompts[0]) == len(prompts[16])


def test_what_a_device_cannot_do_is_not_available(tmp_path: Path) -> None:
    path = str(write_config("llama-3.1-8b", tmp_path, tiny=True))
    settings = {"model": path, "load_format": "random", "device": "cpu", "max_len": 64, "max_sequences": 2}
    with Engine(config_of("bfloat16", **settings)) as engine:
        assert engine.info.num_blocks > 0
    with pytest.raises(NotAvailable, match="float8"), Engine(config_of("fp8 cache", **settings)):
        pass


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_against_limits_and_targets() -> None:
    time_ = Row("s", "decode", 5.0, 4.9, 5.2, "ms", limit=4.6, least=True, target=0.9)
    assert time_.fraction == pytest.approx(0.92) and time_.reached is True
    assert time_.cells() == ["decode", "5.00 (4.90–5.20)", "ms", "4.60", "92%", "≥ 90%", "yes", ""]
    rate = Row("s", "busy", 93.0, target=95.0)
    assert rate.reached is False and rate.cells()[5:7] == ["≥ 95", "**no**"]
    start = Row("s", "start", 12.0, target=15.0, most=True)
    assert start.reached is True and start.cells()[5] == "≤ 15"
    absent = Row("s", "fp8", target=1.6, note="no kernels")
    assert absent.reached is None and absent.cells()[1] == "not available"


def test_figures_have_three_digits() -> None:
    assert [shown(value) for value in (0.0, 0.01234, 1.234, 12.34, 123.4, 123456.0)] == [
        "0",
        "0.012",
        "1.23",
        "12.3",
        "123",
        "123,456",
    ]


def test_ratios_across_sections() -> None:
    rows = [
        Row("m, bfloat16", "decode, batch 1, context 1,024", 5.0),
        Row("m, fp8 weights", "decode, batch 1, context 1,024", 2.5),
        Row("m, bfloat16", "prefill, chunks of 8,192", 300.0),
        Row("m, fp8 weights", "prefill, chunks of 8,192"),
        Row("m, mixed load of 256 requests", "shoal", 9000.0),
        Row("m, mixed load of 256 requests", "transformers, continuous batching", 1500.0),
    ]
    found = gpu.comparisons(rows, has_targets=True)
    assert [(row.value, row.target, row.reached) for row in found] == [(2.0, 1.6, True), (6.0, 5.0, True)]
    assert all(row.target is None for row in gpu.comparisons(rows, has_targets=False))


def test_the_report_is_a_table_a_section() -> None:
    rows = [Row("one", "a|b", 1.0), Row("two", "c", note="why\nnot")]
    text = markdown(rows, {"card": "none"}, "python gpu.py", "today", ["- x: y"])
    assert text.count("## ") == 2 and "a\\|b" in text and "why not" in text and "- card: none" in text


def test_how_busy_a_card_was() -> None:
    """Four steps of 100 µs, the card idle for the last 10 of each but the last; two kernels overlap."""
    spans = [(100.0 * step, 100.0 * step + 60) for step in range(4)]
    spans += [(100.0 * step + 40, 100.0 * step + 90 + 10 * (step == 3)) for step in range(4)]
    busy, pause = busy_and_pause(sorted(spans), 4) or (0.0, 0.0)
    assert busy == pytest.approx(370 / 400) and pause == pytest.approx(10e-6)
    assert busy_and_pause([(0.0, 1.0)], 4) is None
