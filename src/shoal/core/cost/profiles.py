"""EngineProfile: whose host code and kernels a step runs. Few figures, each with a meaning and where it is from."""

from __future__ import annotations

import msgspec


class EngineProfile(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    step_seconds: float
    """Of the host, every step, which the device waits for: scheduling, inputs, sampling's outcome."""
    row_seconds: float
    """The same, for every sequence of the step."""
    token_seconds: float = 0.0
    layer_kernels: float
    """Kernels of a layer besides matrix products and attention: norms, rotation, activation, writing the cache,
    quantising activations."""
    kernel_factor: float = 1.0
    """Of a device's kernel_seconds: one launched by itself from Python takes several times one of a graph."""
    front_seconds: float
    """Hidden in a measured TTFT: HTTP, tokenising, the way to the engine and the first chunk's way back."""
    prompt_token_seconds: float = 0.0
    """The same, for every token of the prompt."""
    float8_attention: float = 1.0
    """Of the bandwidth that decode attention reaches over a float8 cache, relative to the best engine's."""
    all_reduce: float = 1.0
    """Time of an all-reduce relative to the link's table."""
    expert_factor: float = 1.0
    """Time of experts relative to the operators' law."""
    reserves_output: bool = False
    """A sequence begins only when the cache can hold its longest output; else it grows, and may be preempted."""
    mixes_prefill: bool = True
    """Chunks of prompts share steps with rows that decode; else they have steps of their own, first."""
    workspace_bytes: float = 0.3e9
    """Beside the model on one device: the runtime, graphs."""
    workspace_bytes_ranks: float = 2.1e9
    """The same where several devices communicate."""


GIB = 1 << 30

PROFILES: dict[str, EngineProfile] = {
    profile.name: profile
    for profile in (
        EngineProfile(
            name="shoal",
            step_seconds=1.0e-3,
            row_seconds=10e-6,
            layer_kernels=7,
            front_seconds=5e-3,
            workspace_bytes=0.27 * GIB,
            workspace_bytes_ranks=1.0 * GIB,
        ),
        EngineProfile(
            name="vllm",
            step_seconds=1.8e-3,
            row_seconds=8e-6,
            layer_kernels=7,
            front_seconds=30e-3,
            float8_attention=0.8,
            workspace_bytes=0.27 * GIB,
            workspace_bytes_ranks=2.1 * GIB,
        ),
        EngineProfile(
            name="sglang",
            step_seconds=1.5e-3,
            row_seconds=8e-6,
            layer_kernels=7,
            front_seconds=40e-3,
            float8_attention=0.65,
            mixes_prefill=False,
            workspace_bytes=0.27 * GIB,
            workspace_bytes_ranks=2.1 * GIB,
        ),
        EngineProfile(
            name="tensorrt-llm",
            reserves_output=True,
            step_seconds=1.5e-3,
            row_seconds=8e-6,
            layer_kernels=7,
            front_seconds=30e-3,
            workspace_bytes=0.27 * GIB,
            workspace_bytes_ranks=2.1 * GIB,
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
