"""The engines that are compared, and one of them as a process: loaded once, stopped while others are measured."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import shoal
from machine import ForeignLoad
from model_files import ModelPaths
from peer_builds import Peer

RUNNERS = Path(__file__).parent / "runners"
MAX_LEN = 2304
"""Context of every engine: the longest workload needs 2,064."""
KV_GIB = 2
"""KV cache of every engine that is told its size; workload (c) fills 1.1 GiB of it in float32."""
QUICK_START = 20.0
"""Seconds. An engine that starts faster is started anew each round, so that its start too has a median."""


class EngineFailed(Exception):
    """The engine did not do what it was asked; the message is for the table."""


@dataclass(frozen=True)
class EngineSpec:
    name: str
    precision: str
    runner: str
    options: dict[str, Any]
    peer: str | None = None
    """Whose interpreter runs it; None is the one of this benchmark."""
    environment: dict[str, str] = field(default_factory=dict)
    timeout: float = 3600.0
    """Seconds a command may take."""


def engine_specs(paths: ModelPaths, peers: dict[str, Peer], threads: int) -> list[EngineSpec]:
    """Every engine whose peer is there; shoal first."""
    model = str(paths.float32)
    shoal = {"model": model, "max_len": MAX_LEN, "kv_cache_bytes": KV_GIB << 30, "threads": threads}
    shoal |= {"prefix_caching": False}  # rounds repeat the same prompts
    specs = [
        EngineSpec(f"shoal {dtype}", dtype, "shoal_runner.py", shoal | {"dtype": dtype})
        for dtype in ("float32", "bfloat16", "int8")
    ]
    if "vllm" in peers:
        specs += [vllm_spec(model, dtype, peers["vllm"], threads) for dtype in ("float32", "bfloat16")]
    if "transformers" in peers:
        kv_tokens = (KV_GIB << 30) // paths.spec.kv_bytes_per_token(4)  # by default it takes 90% of all memory
        options = {"model": model, "dtype": "float32", "threads": threads, "kv_tokens": kv_tokens}
        specs += [
            EngineSpec(name, "float32", "transformers_runner.py", options | {"continuous": continuous}, "transformers")
            for name, continuous in (("transformers batching", True), ("transformers generate", False))
        ]
    if "llama.cpp" in peers:
        options = {"server": str(peers["llama.cpp"].executable), "model": str(paths.q8_0), "threads": threads}
        specs.append(EngineSpec("llama.cpp Q8_0", "int8", "llama_cpp_runner.py", options))
    return specs


def vllm_spec(model: str, dtype: str, peer: Peer, threads: int, ranks: int = 1) -> EngineSpec:
    """In process, compiled; torch's own OpenMP, which was faster here than Intel's and which vLLM picks by default.

    `ranks` split every layer among them, each with so many threads.
    """
    libgomp = next(peer.executable.parent.parent.glob("lib/python*/site-packages/torch/lib/libgomp*.so*"), None)
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(f"{r * threads}-{(r + 1) * threads - 1}" for r in range(ranks)),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    } | ({} if libgomp is None else {"LD_PRELOAD": str(libgomp)})
    options = {
        "model": model,
        "dtype": dtype,
        "max_model_len": MAX_LEN,
        "max_num_seqs": 64,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
    }
    if ranks > 1:
        options["tensor_parallel_size"] = ranks
    name = f"vLLM {dtype}" if ranks == 1 else f"vLLM {dtype}, tp{ranks}, {threads} thread each"
    return EngineSpec(name, dtype, "vllm_runner.py", options, "vllm", environment)


class EngineProcess:
    """A runner process, ready to run workloads, and stopped (SIGSTOP) whenever it is not asked for anything.

    It and its children form a process group. The kernel kills it when this process ends.
    """

    def __init__(self, spec: EngineSpec, python: Path, log: Path) -> None:
        """Start it and wait for its first token. Raises EngineFailed."""
        self.spec = spec
        self.foreign_load = 0.0
        """Cores that were busy with something else during the last call."""
        self._log = log
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | spec.environment
        if spec.peer is None:
            # The very shoal that this process imported, kernels built with it included.
            environment["PYTHONPATH"] = str(Path(shoal.__file__).parent.parent)
        began = time.monotonic()
        with log.open("a") as stderr:
            self._process = subprocess.Popen(
                [str(python), str(RUNNERS / spec.runner)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                start_new_session=True,
            )
        try:
            self.facts = self.call("load", options=spec.options)
        except EngineFailed:
            self.close()
            raise
        self.start_seconds: float = self.facts["first_token_at"] - began
        """From the start of the process to the first token of a one-token prompt."""

    def call(self, command: str, **arguments: Any) -> Any:
        """Wake it, have it do something, put it to sleep. Raises EngineFailed."""
        self._signal(signal.SIGCONT)
        foreign = ForeignLoad(self._process.pid)
        try:
            stdin = self._pipe(self._process.stdin)
            stdin.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
            stdin.flush()
            answer = json.loads(self._read_line(command))
        except (BrokenPipeError, ValueError):
            self.close()
            raise EngineFailed(f"{command}: the process ended; see {self._log}") from None
        self.foreign_load = foreign.cores()
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise EngineFailed(f"{command}: {answer['error']}; see {self._log}")
        return answer["result"]

    def _read_line(self, command: str) -> bytes:
        stdout = self._pipe(self._process.stdout)
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(self.spec.timeout):
                self.close()
                raise EngineFailed(f"{command}: no answer in {self.spec.timeout:.0f} s; see {self._log}")
        return stdout.readline()

    def close(self) -> None:
        """End it and what it started. May be called more than once."""
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return  # it ended by itself, which the next read finds out

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        if pipe is None:
            raise EngineFailed("the process has no pipe")
        return pipe


def interpreter(spec: EngineSpec, peers: dict[str, Peer]) -> Path:
    return Path(sys.executable) if spec.peer is None else peers[spec.peer].executable
