"""EngineProfile: whose host code and kernels a step runs. Few figures, each with a meaning and where it is from.

Those of vllm, sglang and tensorrt-llm were chosen by hand, in round numbers, so that steps of measured engines come out
right (benchmarks/accuracy.py); kernels' own constants are in operators.py and come from tables of operators.
"""

from __future__ import annotations

import msgspec

GIB = 1 << 30


class EngineProfile(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    step_seconds: float
    """Of the host, every step, which the device waits for: scheduling, inputs, sampling's outcome."""
    row_seconds: float = 8e-6
    """The same, for every sequence of the step."""
    token_seconds: float = 0.0
    layer_kernels: float = 6.0
    """Kernels of a layer besides matrix products and attention: norms, rotation, activation, writing the cache."""
    kernel_factor: float = 1.0
    """Of a device's kernel_seconds: one launched by itself from Python takes several times one of a graph."""
    eager_kernel_seconds: float = 5e-6
    """Of the host, to launch a kernel of a step with prompts, which no graph holds."""
    elementwise: float = 1.0
    """Traffic of norms and activations, relative to fused kernels'."""
    expert_compute: float = 1.0
    """Time of experts' products, where they are bound by computing, relative to the operators' law."""
    float8_attention: float = 1.0
    """Of the bandwidth that decode attention reaches over a float8 cache, relative to vLLM's."""
    reduce_seconds: float = 0.0
    """Of an all-reduce, more than the link's table has; less where it is fused with norms."""
    rank_seconds: float = 0.0
    """The same, for every rank beyond the first: rings that are not in a graph, ranks that wait for each other."""
    reserves_output: bool = False
    """A sequence begins only when the cache can hold its longest output; else it grows, and may be preempted."""
    mixes_prefill: bool = True
    """Chunks of prompts share steps with rows that decode; else they have steps of their own, first."""
    even_batches: bool = False
    """Those under way in a pipeline take as long as each other; else a longer one leaves stages idle."""
    front_seconds: float = 5e-3
    """Hidden in a measured TTFT: HTTP, the way to the engine and the first chunk's way back."""
    front_request_seconds: float = 0.3e-3
    """That a request keeps the one process of the front to itself: parsing, a template, the stream's set-up."""
    front_token_seconds: float = 1e-6
    """The same, for every token of the prompt: text to tokens, and through two sockets."""
    workspace_bytes: float = 0.27 * GIB
    """Beside the model on one device: the runtime, graphs. vLLM 0.19 on H100, by llm-d-planner's measurements."""
    workspace_bytes_ranks: float = 2.1 * GIB
    """The same where several devices communicate."""


PROFILES: dict[str, EngineProfile] = {
    profile.name: profile
    for profile in (
        EngineProfile(name="shoal", step_seconds=1e-3, row_seconds=10e-6, layer_kernels=7, workspace_bytes_ranks=GIB),
        EngineProfile(
            name="vllm",
            step_seconds=1.5e-3,
            eager_kernel_seconds=11e-6,
            expert_compute=1.5,
            front_seconds=25e-3,
            front_request_seconds=3e-3,
            front_token_seconds=3e-6,
        ),
        EngineProfile(
            name="sglang",
            step_seconds=0.8e-3,
            eager_kernel_seconds=25e-6,
            expert_compute=1.6,
            float8_attention=0.75,
            mixes_prefill=False,
            front_seconds=25e-3,
            front_request_seconds=3e-3,
            front_token_seconds=3e-6,
        ),
        EngineProfile(
            name="tensorrt-llm",
            step_seconds=0.5e-3,
            layer_kernels=3,
            eager_kernel_seconds=25e-6,
            expert_compute=1.2,
            float8_attention=1.1,
            reduce_seconds=-1e-6,
            reserves_output=True,
            even_batches=True,  # Its measured rows of pp2 to pp8 show no such idling.
            front_seconds=25e-3,
            front_request_seconds=3e-3,
            front_token_seconds=3e-6,
        ),
        # TensorRT-LLM's C++ executor with engines built for one workload, as MLPerf's submitters run it: the host is
        # hidden behind the device, there is no HTTP, and the experts' kernels are those that were fastest on it.
        EngineProfile(
            name="tensorrt-executor",
            step_seconds=0.2e-3,
            row_seconds=1e-6,
            layer_kernels=3,
            expert_compute=0.65,
            float8_attention=1.1,
            reduce_seconds=-1e-6,
            reserves_output=True,
            even_batches=True,
            front_seconds=5e-3,
            front_request_seconds=0.1e-3,
        ),
        # vLLM as it was in 2023: no graphs, NCCL launched from Python, Ray between the ranks, norms that are not fused.
        EngineProfile(
            name="vllm-2023",
            step_seconds=4e-3,
            row_seconds=100e-6,
            kernel_factor=3.0,
            eager_kernel_seconds=40e-6,
            elementwise=3.0,
            rank_seconds=9e-6,
            front_seconds=30e-3,
        ),
    )
}
ALIASES = {"trtllm": "tensorrt-llm", "trt-llm": "tensorrt-llm", "tensorrtllm": "tensorrt-llm", "nim": "tensorrt-llm"}


def profile(name: str) -> EngineProfile:
    """Raises ValueError naming the known ones."""
    known = ALIASES.get(name.lower(), name.lower())
    if known not in PROFILES:
        raise ValueError(f"no profile of an engine is called {name!r}; there are {', '.join(PROFILES)}")
    return PROFILES[known]
