"""Worker: one rank of an engine. Loads the model, sizes the KV cache, runs step plans.

Each part is chosen here, once, and handed down: device, arithmetic, attention, where weights come from. Nothing below
asks what it runs on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec
import torch

from shoal.checkpoint.resolve import load_spec, resolve
from shoal.core.config import EngineConfig, WeightPrecision
from shoal.core.expert_load import HeldRows, placements
from shoal.core.layout import Axis, require_possible
from shoal.core.model_spec import ModelSpec
from shoal.core.quantization import QuantScheme, at_load, require_storable
from shoal.core.sharding import Shard, shard_of
from shoal.core.start_report import Laps, RankLoad, StartProgress
from shoal.core.types import Row, Sampling, SlotAssignment, StepPlan, StepResult, WorkerFailure
from shoal.engine.attention.base import AttentionBackend, HeadSharing, KVCache
from shoal.engine.attention.choice import Need, choose, make
from shoal.engine.attention.native import NativeAttention
from shoal.engine.comm.base import Comm
from shoal.engine.devices import DeviceMemory, device_memory, device_of_rank, make_current
from shoal.engine.executor import Progress, WorkerInfo
from shoal.engine.grammar import tokenizer_info
from shoal.engine.grammar_state import GrammarFactory
from shoal.engine.graphs import CudaCapturer, GraphBook, GraphedModel
from shoal.engine.graphs import unavailable_reason as graphs_unavailable_reason
from shoal.engine.kernels import unavailable_reason as triton_unavailable_reason
from shoal.engine.memory import available_memory, plan_blocks, room_on_host
from shoal.engine.model import Decoder
from shoal.engine.native import unavailable_reason
from shoal.engine.native_ops import NativeOps
from shoal.engine.ops import Ops, TorchOps
from shoal.engine.random_weights import RandomWeights
from shoal.engine.read_ahead import ReadFigures
from shoal.engine.runner import Model, Runner
from shoal.engine.sizing import WeightNeed, find_room, largest_step
from shoal.engine.step_log import StepLog
from shoal.engine.weights import WeightSource, open_weights

if TYPE_CHECKING:
    import xgrammar

_WARM_UP_TOKENS = 32
_KV_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
_REPORTED_FRACTION = 0.005
"""Of the weights, between two reports: for a model of thousands of tensors nobody needs one of each."""


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is among the ranks of its engine."""

    rank: int = 0
    local_rank: int = 0
    """Among the ranks on this host: which of its devices is this one's."""
    ranks_on_host: int = 1
    """They share its memory and its cores."""


class Loaded(msgspec.Struct, frozen=True):
    """What one rank could run with, before all agree."""

    num_blocks: int
    max_len: int


class Worker:
    def __init__(
        self,
        config: EngineConfig,
        seat: Seat | None = None,
        comms: Mapping[Axis, Comm] | None = None,
        expert_rows: dict[int, list[int]] | None = None,
        laps: Laps | None = None,
        memory: DeviceMemory | None = None,
    ) -> None:
        """`comms` are this rank's groups along the axes of the layout; an axis of one rank may be left out.

        `expert_rows` is what `config.expert_load` says, by layer, for each expert: the same on all ranks. `laps` holds
        what was done for this start before there was a worker. `memory` None: that of the device, if it has its own.
        """
        self._config = config
        self._expert_rows = expert_rows or {}
        self._seat = seat or Seat()
        self._comms = comms or {}
        self._decoder: Decoder | None = None
        self._path: Path | None = None
        self._runner: Runner | None = None
        self._ops: Ops | None = None
        self._failure: str | None = None
        self._memory = memory
        self._max_len = 0
        self._graphs_bytes = 0
        self.graphs: GraphBook | None = None
        """Which steps are captured, and why others are not. None where none are."""
        self._laps = laps or Laps(f"rank {self._seat.rank}", time.monotonic())
        self._figures = ReadFigures(0, 0.0, 0.0)
        self._step_log = None if config.step_log is None else StepLog(config.step_log, f"rank-{self._seat.rank}")

    def start(self, progress: Progress | None = None) -> WorkerInfo:
        """Load and warm up. Raises what the checkpoint reader raises, OutOfMemory, or ValueError for the config."""
        self.load(progress)
        return self.allocate(self.measure(progress), progress)

    def load(self, progress: Progress | None = None) -> None:
        """Read this rank's part of the weights."""
        laps, config, seat = self._laps, self._config, self._seat
        laps.resume(time.monotonic())
        report = progress or (lambda progress: None)
        report(StartProgress("reading the checkpoint", 0.0))
        self._path = resolve(config.model, download=False).path
        spec = load_spec(self._path)
        if config.load_format == "random" and spec.quantization is not None:
            raise ValueError(
                f"load_format is random, and {self._path} asks for quantised weights: take quantization_config out of "
                "config.json and set quantize (fp8, int8 or int4), which quantises what was made"
            )
        max_len = config.max_len or spec.max_len
        if max_len > spec.max_len:
            raise ValueError(f"max_len is {max_len}, and the model was made for {spec.max_len} tokens: lower it")
        require_possible(config.layout, spec)
        placed = placements(spec, config.layout.ep, self._expert_rows, config.redundant_experts)
        shard = shard_of(spec, config.layout, seat.rank, config.expert_dispatch, placed)
        device = device_of_rank(config.device, seat.local_rank)
        make_current(device)
        self._memory = self._memory or device_memory(device)
        quantized = require_storable(config.dtype, config.quantize, spec.quantization) is not None
        wide = device.type == "cpu" or (config.dtype == "float32" and not quantized)
        activations = torch.float32 if wide else torch.bfloat16
        kv_dtype = activations if config.dtype == "float32" else torch.bfloat16
        if config.kv_dtype != "auto":
            kv_dtype = _KV_DTYPES[config.kv_dtype]
        threads = max(1, _num_cores() // seat.ranks_on_host) if config.threads is None else config.threads
        ops, attention = _arithmetic(config, spec, shard, device, activations, kv_dtype, threads)
        self._ops = ops
        precision, quantize = _storage(config, spec, ops, device)
        self._decoder = decoder = Decoder(
            spec,
            ops,
            attention,
            precision,
            device=device,
            dtype=activations,
            kv_dtype=kv_dtype,
            max_len=max_len,
            shard=shard,
            tensor=self._comms.get("tensor"),
            context=self._comms.get("context"),
            stages=self._comms.get("pipeline"),
            quantize=quantize,
        )
        laps.end("open", time.monotonic())
        path, is_random = self._path, config.load_format == "random"
        if self._memory is None:
            self._figures = _load(decoder, path, is_random, report)
        else:
            scheme = decoder.quantize or spec.quantization
            need = WeightNeed(spec, config.layout, decoder.precision, None if scheme is None else scheme.weights)
            self._figures = need.load(self._memory, lambda: _load(decoder, path, is_random, report))
        laps.end_two("read", self._figures.waited_seconds, "convert", time.monotonic())
        self._max_len = max_len

    def measure(self, progress: Progress | None = None) -> Loaded:
        """How much KV there is room for. On a device all ranks run a step for it, together."""
        decoder, config, memory = self._decoder, self._config, self._memory
        if decoder is None:
            raise RuntimeError("measure comes after load")
        block_bytes = decoder.kv_bytes_per_token() * config.block_size
        if memory is None:
            room = room_on_host(available_memory(decoder.device) // self._seat.ranks_on_host)
        else:
            self._laps.resume(time.monotonic())
            if progress is not None:
                progress(StartProgress("measuring a step", 0.0))
            captured = self._is_captured(decoder)
            room, self._graphs_bytes = find_room(config, memory, lambda: self._run_largest(decoder), captured)
            self._laps.end("measure", time.monotonic())
        num_blocks = plan_blocks(config, block_bytes=block_bytes, max_len=self._max_len, room=room)
        return Loaded(num_blocks, min(self._max_len, num_blocks * config.block_tokens))

    def _run_largest(self, decoder: Decoder) -> None:
        plan = largest_step(self._config, self._max_len)
        grammars = GrammarFactory(_no_grammars)
        self._runner_of(decoder, decoder.new_cache(1, self._config.block_size), self._max_len, grammars).step(plan)

    def _is_captured(self, decoder: Decoder) -> bool:
        capturable = decoder.attention.capturable
        return graphs_unavailable_reason(self._config, decoder.device, capturable, decoder.tensor) is None

    def allocate(self, agreed: Loaded, progress: Progress | None = None) -> WorkerInfo:
        """Make the KV cache that all ranks agreed on, and warm up, all ranks together."""
        decoder, path, config = self._decoder, self._path, self._config
        if decoder is None or path is None:
            raise RuntimeError("allocate comes after load")
        laps = self._laps
        laps.resume(time.monotonic())  # between the two all ranks were waited for
        # What pads a graph's rows needs a block that is nobody's, behind those that the scheduler knows of.
        is_captured = self._is_captured(decoder)
        cache = decoder.new_cache(agreed.num_blocks + is_captured, config.block_size)
        grammars = GrammarFactory(lambda: _tokenizer_info(path, decoder.spec))
        model: Model = decoder
        if is_captured:
            model = graphed = GraphedModel(
                decoder,
                cache,
                CudaCapturer(decoder.device),
                null_block=agreed.num_blocks,
                max_rows=config.max_sequences,
                max_context=agreed.max_len,
                max_tokens=config.max_batch_tokens,
                limit_bytes=self._graphs_bytes,
                device=decoder.device,
                peers=decoder.tensor,
            )
            self.graphs = graphed.book
        self._runner = self._runner_of(decoder, cache, agreed.max_len, grammars, model)
        laps.end("allocate", time.monotonic())
        if progress is not None:
            progress(StartProgress("warming up", 0.0))
        self._warm_up(min(_WARM_UP_TOKENS, agreed.max_len - 1))
        if config.prepare_grammars and self.draws:
            # Not in a thread beside the weights: imports hold the interpreter's lock, which every tensor waits for.
            grammars.prepare()
        for experts in decoder.experts.values():
            experts.start_counting()
        laps.end("warm-up", time.monotonic())
        if progress is not None:
            progress(StartProgress("ready", 1.0))
        return WorkerInfo(
            spec=decoder.spec,
            num_blocks=agreed.num_blocks,
            max_len=agreed.max_len,
            weight_bytes=decoder.num_weight_bytes,
            rank_weight_bytes=decoder.num_weight_bytes,
            kv_bytes=cache.nbytes,
            rank_kv_bytes=cache.nbytes,
            device=str(decoder.device),
            ops=decoder.ops.name,
            attention=decoder.attention.name,
            dtype=self._stored_as(decoder),
            start=laps.report([self._rank_load()]),
        )

    def _runner_of(
        self, decoder: Decoder, cache: KVCache, max_len: int, grammars: GrammarFactory, model: Model | None = None
    ) -> Runner:
        return Runner(
            model or decoder,
            cache,
            num_slots=self._config.max_sequences,
            max_len=max_len,
            vocab_size=decoder.spec.vocab_size,
            device=decoder.device,
            ops=decoder.ops,
            grammars=grammars,
            peers=decoder.tensor,
            context=decoder.context,
            draws=self.draws,
        )

    def _stored_as(self, decoder: Decoder) -> str:
        """What most weights are kept in here."""
        scheme = decoder.quantize or decoder.spec.quantization
        if scheme is None or isinstance(decoder.ops, NativeOps):
            return decoder.precision
        return scheme.weights

    def _rank_load(self) -> RankLoad:
        figures = self._figures
        convert = sum(phase.seconds for phase in self._laps.phases if phase.name == "convert")
        return RankLoad(
            rank=self._seat.rank,
            bytes_read=figures.bytes_read,
            read_seconds=figures.waited_seconds,
            convert_seconds=convert,
            reading_seconds=figures.reading_seconds,
        )

    def step(self, plan: StepPlan) -> StepResult | WorkerFailure:
        """Run one step. Never raises: what goes wrong with the whole of it is the result."""
        if self._failure is None and self._runner is None:
            self._failure = "the worker is not running"
        if self._failure is not None or self._runner is None:
            return WorkerFailure(plan.plan_id, self._failure or "")
        began, waited = time.monotonic(), self._waited_seconds
        try:
            if self._decoder is not None:
                make_current(self._decoder.device)
            result = self._runner.step(plan)
        except Exception as error:
            # Slots and KV are now in an unknown state; every later step would compute from it.
            self._failure = f"{type(error).__name__}: {error}"
            return WorkerFailure(plan.plan_id, self._failure)
        if self._step_log is not None:
            self._step_log.rank_step(plan, began, time.monotonic(), self._waited_seconds - waited)
        return result

    @property
    def _waited_seconds(self) -> float:
        return 0.0 if self._decoder is None else self._decoder.waited_seconds

    @property
    def draws(self) -> bool:
        """Whether this rank's results are the engine's: it draws the tokens."""
        decoder = self._decoder
        return decoder is not None and decoder.shard.is_last and decoder.tensor.rank == decoder.context.rank == 0

    @property
    def decoder(self) -> Decoder | None:
        """For who looks at its parts, and not at its steps. None until it is loaded, and once it is closed."""
        return self._decoder

    @property
    def device(self) -> torch.device | None:
        return None if self._decoder is None else self._decoder.device

    def in_ranges(self) -> AbstractContextManager[None]:
        """While this lasts, what a profiler records of steps says which part of the step it is."""
        if self._decoder is None or self._runner is None:
            raise RuntimeError("a worker that does not run has nothing to profile")
        from shoal.engine.profile_ranges import ranges

        return ranges(self._decoder, self._runner)

    def expert_rows(self) -> list[HeldRows]:
        """Rows of this rank's experts since warm-up. Of the `tp` ranks with slices of them the first counts."""
        place = self._config.layout.place(self._seat.rank)
        if self._decoder is None or place.tp:
            return []
        layers = self._decoder.experts.items()
        return [HeldRows(layer, place.ep, experts.held, experts.rows()) for layer, experts in layers]

    def close(self) -> None:
        """Free model, cache and threads. May be called more than once."""
        self._runner = self._decoder = None
        ops, self._ops = self._ops, None
        if ops is not None:
            ops.close()
        if self._step_log is not None:
            self._step_log.close()

    def _warm_up(self, num_tokens: int) -> None:
        """A prompt and a decode, so that the first request does not pay for what is set up on first use.

        They write to the first blocks, which are blank.
        """
        if self._runner is None or num_tokens < 1:
            return
        blocks = list(range(-(-(num_tokens + 1) // self._config.block_tokens)))
        assignment = SlotAssignment(
            0, "warm-up", 0, [0] * num_tokens, num_tokens, blocks, Sampling(temperature=0.0), 0, []
        )
        self._runner.step(StepPlan(-2, [], [assignment], [Row(0, 0, num_tokens, True, [])]))
        self._runner.step(StepPlan(-1, [], [], [Row(0, num_tokens, 1, True, [])]))
        self._runner.step(StepPlan(0, [0], [], []))


def _arithmetic(
    config: EngineConfig,
    spec: ModelSpec,
    shard: Shard,
    device: torch.device,
    activations: torch.dtype,
    kv_dtype: torch.dtype,
    threads: int,
) -> tuple[Ops, AttentionBackend]:
    """Native kernels with the attention that goes with them where they can run this model, Triton's, or torch."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    reason = _native_unavailable(spec, device, config)
    if config.ops == "native" and reason is not None:
        raise ValueError(f"ops is native, but the native kernels are not available: {reason}")
    triton_reason = triton_unavailable_reason(device)
    if config.ops == "triton" and triton_reason is not None:
        raise ValueError(f"ops is triton, but the Triton kernels are not available: {triton_reason}")
    group, heads = spec.num_heads // spec.num_kv_heads, shard.heads
    sharing = None if spec.mla is not None else HeadSharing(group, heads.query.start - heads.kv.start * group)
    by_triton = config.ops == "triton" or (config.ops == "auto" and device.type == "cuda" and triton_reason is None)
    use_native = config.ops in ("auto", "native") and reason is None
    native = NativeOps(threads=threads) if use_native else None
    need = Need(
        device=device,
        kv_dtype=kv_dtype,
        block_size=config.block_size,
        head_dim=spec.head_dim if spec.mla is None else spec.mla.latent_dim,
        window=spec.window is not None,
        latents=spec.mla is not None,
        shared_context=config.layout.cp > 1,
        cut_groups=sharing is not None and bool(sharing.skipped or len(heads.query) != len(heads.kv) * group),
    )
    latent_dim = None if spec.mla is None else spec.mla.kv_lora_rank
    try:
        attention = make(choose(config.attention, need, native), device, native, sharing, latent_dim)
    except ValueError:
        if native is not None:
            native.close()
        raise
    # Torch is left with small operations beside native kernels. Its own threads would spin on the cores they need.
    torch.set_num_threads(threads if native is None else 1)
    # Ops take only the weights that they packed themselves, which a protocol cannot say: the cast.
    if by_triton:
        # Its kernels are defined as it is imported, which takes triton.
        from shoal.engine.triton_ops import TritonOps

        return cast("Ops", TritonOps(device, activations)), attention
    return cast("Ops", TorchOps(device, activations) if native is None else native), attention


def _storage(
    config: EngineConfig, spec: ModelSpec, ops: Ops, device: torch.device
) -> tuple[WeightPrecision, QuantScheme | None]:
    """The precision of weights that stay floats, and what is made of the other ones of a float checkpoint.

    Native kernels have int8 as a precision, embedding and head included.
    """
    wanted = require_storable(config.dtype, config.quantize, spec.quantization)
    if isinstance(ops, NativeOps):
        return ("int8" if config.quantize == "int8" else config.dtype), None
    if config.quantize is None and device.type == "cpu":
        return config.dtype, None
    plain: WeightPrecision = "float32" if config.dtype == "float32" and device.type == "cpu" else "bfloat16"
    if wanted is None:
        return config.dtype, None
    return plain, None if spec.quantization is not None else at_load(wanted)


def _native_unavailable(spec: ModelSpec, device: torch.device, config: EngineConfig) -> str | None:
    """Why the native kernels cannot run this model here; None if they can."""
    if device.type != "cpu":
        return f"they are for CPUs, and the device is {device}"
    if config.quantize not in (None, "int8"):
        return f"they store int8, not {config.quantize}: take quantize int8"
    reason = unavailable_reason()
    if reason is not None or spec.mla is not None:
        return reason
    return NativeAttention.unsupported_reason(spec.head_dim, config.block_size)


def _num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load(decoder: Decoder, path: Path, is_random: bool, report: Progress) -> ReadFigures:
    reported = -1.0

    def progress(done: int, total: int) -> None:
        nonlocal reported
        if done == total or done / total >= reported + _REPORTED_FRACTION:
            reported = done / total
            report(StartProgress("loading the weights", reported, done, total))

    source: WeightSource | RandomWeights = (
        RandomWeights(path, decoder.spec, decoder.device, decoder.dtype) if is_random else open_weights(path)
    )
    try:
        return decoder.load(source, progress)
    finally:
        source.close()


def _no_grammars() -> xgrammar.TokenizerInfo:
    raise RuntimeError("no sequence of a measured step has a grammar")


def _tokenizer_info(path: Path, spec: ModelSpec) -> xgrammar.TokenizerInfo:
    from shoal.checkpoint.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    return tokenizer_info(tokenizer, spec.vocab_size, tokenizer.eos_ids)
