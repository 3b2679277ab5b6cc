"""benchmarks/accuracy.py: how rows become questions, and (where there are rows) that answers stay near measurements."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import accuracy, accuracy_rows

ROW = {
    "row_id": "1",
    "source": "AIC silicon_sample.csv",
    "model": "meta-llama/Llama-3.1-70B",
    "gpu": "h200_sxm",
    "n_gpus": "8",
    "engine": "vllm",
    "mode": "agg",
    "weights": "fp8",
    "kv": "",
    "tp": "8",
    "pp": "1",
    "ep": "1",
    "attn_dp": "1",
    "prefill_cfg": "",
    "decode_cfg": "",
    "isl": "1024",
    "osl": "1024",
    "len_note": "uniform[0.8x,1.0x] per InferenceX RANDOM_RANGE_RATIO=0.8 (mean 0.9x)",
    "load_kind": "closed-loop",
    "concurrency": "16",
    "request_rate": "",
    "ttft_ms": "109",
    "tpot_ms": "9.7",
    "stat": "unstated (mean or median)",
    "out_tok_s": "",
    "note": "",
}


def row(**given: str) -> dict[str, str]:
    return {**ROW, **given}


def test_a_row_is_answered_near_its_measurement():
    found = accuracy_rows.answer(ROW)
    assert found.predicted["tpot"] == pytest.approx(9.7e-3, rel=0.2)
    assert found.predicted["ttft"] == pytest.approx(0.109, rel=0.3)
    assert found.low["tpot"] < found.predicted["tpot"] < found.high["tpot"]


def test_lengths_are_nine_tenths_of_nominal_in_the_mean():
    assert accuracy_rows.workload_of(ROW).inputs.mean == pytest.approx(0.9 * 1024, rel=0.01)
    assert accuracy_rows.workload_of(row(len_note="fixed")).inputs.mean == 1024


@pytest.mark.parametrize(
    ("given", "devices"),
    [
        ({"tp": "64", "ep": "8", "n_gpus": "64"}, 8),
        ({"tp": "16", "ep": "4", "n_gpus": "16"}, 4),
        ({"tp": "4", "ep": "4", "n_gpus": "4"}, 4),
        ({"tp": "1", "ep": "4", "attn_dp": "16", "n_gpus": "16"}, 4),
        ({"tp": "4", "ep": "16", "attn_dp": "4", "n_gpus": "16"}, 4),
    ],
)
def test_layouts_that_were_multiplied_on_the_way_into_the_sample(given, devices):
    read = row(model="deepseek-ai/DeepSeek-V3", gpu="b200_sxm", **given)
    shape = accuracy_rows.models.model_shape(read["model"])
    layout, groups = accuracy_rows.layout_of(read, shape, "B200")
    assert layout.ranks * groups == devices


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"gpu": "H1000"}, "unknown device"),
        ({"model": "no-such-model"}, "no-such-model"),
        ({"tp": "1", "n_gpus": "1", "gpu": "h100_sxm", "weights": "bf16"}, "memory: "),
        ({"mode": "disagg", "prefill_cfg": "workers= tp=4", "decode_cfg": "workers= tp=8"}, "how many workers"),
        ({"gpu": "MI300X (x32), MI325X (x16)"}, "two kinds of devices"),
    ],
)
def test_what_cannot_be_answered_says_why(given, reason):
    with pytest.raises(accuracy_rows.CannotAnswer, match=reason):
        accuracy_rows.answer(row(**given))


def test_pools_are_read_from_their_columns():
    read = row(
        mode="disagg",
        model="deepseek-ai/DeepSeek-V3",
        gpu="gb300",
        weights="fp4",
        engine="trtllm",
        prefill_cfg="workers=1 tp=1 pp=1 adp=2 ep=2 bs=1",
        decode_cfg="workers=4 tp=8 pp=1 adp=1 ep=8 bs=12",
        concurrency="48",
    )
    assert 4e-3 < accuracy_rows.answer(read).predicted["tpot"] < 16e-3


def test_errors_and_coverage():
    question = accuracy_rows.read(ROW)
    exact = accuracy_rows.Answer(predicted=question.measured, low=question.measured, high=question.measured)
    double = accuracy_rows.Answer(
        predicted={name: 2 * value for name, value in question.measured.items()},
        low={name: 1.5 * value for name, value in question.measured.items()},
        high={name: 3 * value for name, value in question.measured.items()},
    )
    found = accuracy.summary([(question, exact), (question, double)], 3, "tpot")
    assert found == {"rows": 3, "answered": 2, "median": 0.5, "p90": 1.0, "bias": 0.5, "coverage90": 0.5}


ROWS = accuracy.default_rows()


@pytest.mark.skipif(not ROWS.exists(), reason="the measured rows are not on this machine")
def test_a_sample_of_measured_rows(tmp_path: Path):
    lines = ROWS.read_text(encoding="utf-8").splitlines()
    sample = tmp_path / "rows.csv"
    few = [line for line in lines[1::61] if ",offline" not in line and "open-loop" not in line]
    sample.write_text("\n".join([lines[0], *few]), encoding="utf-8")
    out = tmp_path / "errors.json"
    command = [sys.executable, str(Path(accuracy.__file__)), "--rows", str(sample), "--json", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "rows answered" in ran.stdout
    found = json.loads(out.read_text(encoding="utf-8"))
    assert set(found) == {"tpot", "ttft", "throughput"}
    assert set(found["tpot"]) == {"rows", "answered", "median", "p90", "bias", "coverage90"}
    # Loose: a constant that is wrong by a factor shows, luck of the sample does not.
    assert found["tpot"]["median"] < 0.2
    assert found["ttft"]["median"] < 0.4
