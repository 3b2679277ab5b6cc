"""UNCALIBRATED: how far predictions from data sheets were off, over rows that others measured. Intervals rest on it."""

from __future__ import annotations

from shoal.core.cost.calibration import Calibration, Residual

UNCALIBRATED = Calibration(
    provenance="datasheet",
    residuals={
        "step": Residual(0.81, 1.01, 1.45, 1606),
        "throughput": Residual(0.79, 0.99, 1.36, 423),
        "throughput/tensorrt-executor": Residual(0.92, 1.01, 1.4, 103),
        "throughput/tensorrt-llm": Residual(0.77, 0.98, 1.36, 151),
        "throughput/vllm-2023": Residual(0.79, 0.99, 1.07, 140),
        "tpot": Residual(0.81, 1.01, 1.45, 1606),
        "tpot/sglang": Residual(0.79, 1.03, 1.38, 433),
        "tpot/tensorrt-executor": Residual(0.85, 1.22, 1.97, 61),
        "tpot/tensorrt-llm": Residual(0.82, 1.04, 1.47, 416),
        "tpot/vllm": Residual(0.8, 0.97, 1.25, 525),
        "tpot/vllm-2023": Residual(0.96, 0.99, 1.22, 171),
        "ttft": Residual(0.58, 1.11, 5.18, 1608),
        "ttft/sglang": Residual(0.58, 1.21, 8.33, 433),
        "ttft/tensorrt-executor": Residual(0.43, 0.76, 4.83, 61),
        "ttft/tensorrt-llm": Residual(0.51, 1.09, 6.92, 418),
        "ttft/vllm": Residual(0.81, 1.09, 3.42, 525),
        "ttft/vllm-2023": Residual(1.02, 1.15, 1.93, 171),
    },
    made={
        "date": "2026-11-21",
        "command": "python benchmarks/accuracy.py --rows e2e_measured.csv --residuals",
        "rows": "1,812 of 1,986 end-to-end rows: InferenceX and NVIDIA's own sweep (AIConfigurator 0.12, Apache-2.0), "
        "TensorRT-LLM's performance pages, MLPerf inference v5.1, Splitwise, LLMServingSim",
        "how": "the 4th, 50th and 96th of a hundred of measured / predicted, by metric and engine; step as tpot. "
        "Leaving out one GPU (one model), 87 to 91 (86 to 89) of a hundred of its rows lie between. MLPerf's servers, "
        "which run at their limit, are those of tensorrt-executor.",
    },
)
"""A prediction of an engine that is not named, shoal's own among them, has the interval of all."""
