"""The report: ratios within rounds, verdicts, and what is said of peers that are missing."""

import pytest

import report

MACHINE = {
    "cpu": "a CPU",
    "cores": 2,
    "simd": ["avx2"],
    "memory_gib": 8.0,
    "system": "Linux",
    "python": "3.11",
    "torch": "2.13",
}


def engine(name, rates, **extra):
    """`rates`: output tokens a second at (c), by round."""
    figures = {
        number: {"output_rate": rate, "ttft_p50": 1.0, "ttft_p99": 2.0, "tpot_p50": 0.1, "foreign_load": 0.0} | extra
        for number, rate in rates.items()
    }
    return report.EngineResults(name, "float32", "1", rounds={"c": figures})


def rendered(*engines, missing=None):
    rates = {0: {"gemm_gflops": 100.0, "read_gbps": 10.0}}
    return report.render(report.Report(MACHINE, rates, list(engines), missing or {}, "python x", "today"))


def row_of(text, start):
    return next([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if start in line)


def test_ratios_are_taken_within_rounds_before_the_median():
    # Medians are 30 and 20, a ratio of 1.5; round by round it is 1, 3, 1.5 and, where the peer failed, nothing.
    text = rendered(
        engine("shoal float32", {0: 10, 1: 30, 2: 60, 3: 999}), engine("vLLM float32", {0: 10, 1: 10, 2: 40})
    )
    what, target, measured, reached = row_of(text, "shoal float32 / vLLM float32, (c)")
    assert (target, measured, reached) == ("≥ 1.2×", "1.50 (1.00–3.00)×", "yes")


def test_the_faster_form_of_transformers_counts():
    text = rendered(
        engine("shoal float32", {0: 100}),
        engine("transformers batching", {0: 20}),
        engine("transformers generate", {0: 50}),
    )
    assert row_of(text, "transformers, its faster form, (c)")[2:] == ["2.00×", "**no**"]


def test_what_was_not_measured_is_not_judged():
    text = rendered(engine("shoal float32", {0: 100}), missing={"vllm": "pip found no wheel"})
    assert row_of(text, "shoal float32 / vLLM float32, (c)")[2:] == ["not measured", "–"]
    assert "- vllm: pip found no wheel" in text


def test_fractions_of_the_machine_are_judged():
    text = rendered(engine("shoal float32", {0: 100}, gemm_fraction=0.777, kv_fill=0.96))
    assert row_of(text, "GEMM rate that shoal")[2:] == ["77.7%", "**no**"]
    assert row_of(text, "allocated KV")[2:] == ["96.0%", "yes"]


@pytest.mark.parametrize(("values", "expected"), [([], "–"), ([2.0], "2.0"), ([3.0, 1.0, 2.0], "2.0 (1.0–3.0)")])
def test_spread(values, expected):
    assert report.spread(values, 1) == expected
