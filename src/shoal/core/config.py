"""What an engine is asked to be: plain typed data, read by the scheduler, the worker, the planner and the simulator."""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.core.layout import Layout
from shoal.core.quantization import Quantization

WeightPrecision = Literal["float32", "bfloat16", "int8"]
ExpertDispatchKind = Literal["replicate", "all_gather", "all_to_all"]


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    num_blocks: int
    """KV blocks of the engine."""
    max_len: int
    """Longest sequence in tokens, prompt and output."""
    vocab_size: int
    block_size: int = 16
    """Tokens a block: the unit of KV allocation and of prefix hashing."""
    max_sequences: int = 64
    """Slots: sequences that may run at once."""
    max_batch_tokens: int = 512
    """Token budget of one step."""
    depth: int = 1
    """Plans that may be outstanding: 1 is synchronous, 2 overlaps scheduling with compute."""
    stages: int = 1
    """Of a pipeline. With more than one, a step's tokens reach the first stage only once the step is committed, so the
    plans in flight are of different sequences: each takes its share of those that decode."""
    prefix_caching: bool = True
    max_waiting: int = 4096
    """Waiting sequences after which requests are rejected."""
    priority_aging: float = 10.0
    """A waiting request gains one priority level every so many seconds, so that none starves."""


class LaunchConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the ranks of an engine of more than one come to be, and how long they are waited for (seconds)."""

    launcher: Literal["local", "env", "ray"] = "local"
    """local starts them on this machine; env takes RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun, srun and
    LeaderWorkerSet set them: rank 0 drives, the others join it; ray has a Ray cluster place them."""
    host: str = "127.0.0.1"
    """Address of the interface that ranks and driver talk over."""
    port: int = 0
    """Of the driver; 0 is any free one."""
    secret_file: str | None = None
    """What every rank must know to join. Needed with env; the other launchers draw one and hand it out."""
    ray_address: str | None = None
    """Of the Ray cluster; None is RAY_ADDRESS, or the one that runs on this machine, or a new one of it alone."""
    join_seconds: float = 60.0
    """Until every rank has joined."""
    silence_seconds: float = 2.0
    """A rank that has not been heard of for so long is taken for dead. Ranks say four times in it that they live."""
    collective_seconds: float = 10.0
    """A rank that waits so long for another in a collective gives up."""
    comm: Literal["auto", "shared_memory", "gloo", "nccl"] = "auto"
    """auto: nccl on GPUs, shared memory among CPU ranks of one host, else gloo."""
    one_shot_bytes: int | None = None
    """Sums of up to so many bytes between GPUs of one host go through memory that all of them map, where they can, and
    not through NCCL; 0: none do; None is 512 KiB among up to 4 ranks, 256 KiB among up to 8."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine: a model on a device. Sizes are in the units that the name says; None means derived at start."""

    model: str
    """Path of a checkpoint directory or a .gguf file."""
    dtype: WeightPrecision = "float32"
    """Precision of the stored weights. Activations are float32 on a CPU, bfloat16 on a GPU unless dtype is float32 and
    nothing is quantised. int8 is quantize int8, by another name."""
    quantize: Quantization | None = None
    """What the matrices of a float checkpoint are made at load: fp8, int8 or int4. dtype is then of the others."""
    kv_dtype: Literal["auto", "float32", "bfloat16", "float8", "int8"] = "auto"
    """Precision of the KV cache; auto is float32 on a CPU with float32 weights, else bfloat16. float8 (e4m3) and int8
    are for GPUs, by Triton attention; of latents they are for any device."""
    load_format: Literal["auto", "random"] = "auto"
    """Where weights come from. auto: the checkpoint's files; random: nowhere, for benchmarks and profiles: of the
    checkpoint only config.json is read."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    max_len: int | None = None
    """None is the model's own limit, or what the KV cache holds if that is less."""
    kv_cache_bytes: int | None = None
    """None is derived from free memory."""
    block_size: int = 16
    max_sequences: int = 64
    max_batch_tokens: int = 512
    depth: int = 1
    prefix_caching: bool = True
    threads: int | None = None
    """CPU threads that compute; None is one for each core this process may use."""
    layout: Layout = Layout()
    """Ranks along each parallel axis."""
    launch: LaunchConfig = LaunchConfig()
    expert_dispatch: ExpertDispatchKind = "replicate"
    """How tokens reach experts on other ranks. replicate: every rank has all tokens all the time; all_gather: each has
    its share between attentions, and all of them for the experts; all_to_all: each sends the rows of its share to the
    ranks of their experts."""
    expert_load: str | None = None
    """File with what GET /v1/experts answered, on the machine of the driver: experts are placed to spread that load."""
    redundant_experts: int = 0
    """Further experts of every layer that a rank has room for, copies of those with the most rows in `expert_load`."""
    warm_spares: int = 0
    """Further sets of ranks that are kept loaded, to take over when a rank fails. Each takes as much memory again."""
    prepare_grammars: bool = False
    """Be ready for grammars before the engine is. Else the first one makes the sequences beside it wait for a second;
    an engine of several always is, for requests of others may come to it at any time."""
    ops: Literal["auto", "native", "triton", "torch"] = "auto"
    """Arithmetic: native CPU kernels where they are built, Triton ones on a GPU where triton is, or torch."""
    attention: Literal["auto", "native", "triton", "varlen", "flashinfer", "portable"] = "auto"
    """Attention backend: auto is the first of native, triton and portable that serves the model on the device."""
    step_log: str | None = None
    """Directory in which every rank writes down when it ran each step (engine/step_log.py)."""
    check: bool = False
    """Verify the scheduler's invariants after every step (slow; for tests and bug hunts)."""

    @property
    def block_tokens(self) -> int:
        """Tokens in a block of the scheduler: `block_size` on each rank that keeps a part of the context."""
        return self.block_size * self.layout.cp
