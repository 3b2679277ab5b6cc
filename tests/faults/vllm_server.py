"""`vllm serve` as a process of its own, on one core, with the weights and the tokenizer of a built-in model."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

START_SECONDS = 240


class VllmServer:
    """Its processes are a group, killed and stopped together."""

    def __init__(self, python: Path, checkpoint: Path, log: Path, *, core: int) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.started_at = time.monotonic()
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": str(core % (os.cpu_count() or 1)),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }
        options = {
            "--model": str(checkpoint),
            "--served-model-name": "smollm2-135m",
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--dtype": "float32",
            "--max-model-len": "2048",
            "--max-num-seqs": "64",
        }
        # What `vllm serve` runs; the command itself fails in vllm-cpu, which looks for itself under vLLM's name.
        # Eagerly: compiling takes minutes here and is not what is tested.
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
        command += ["--enable-prompt-tokens-details", *(word for pair in options.items() for word in pair)]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def states(self) -> list[str]:
        """Of its processes that have not ended, in the kernel's letters."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                state, _, group = stat.read_text().rsplit(")", 1)[1].split()[:3]
                if int(group) == self.process.pid and state != "Z":
                    found.append(state)
        return found

    def stop(self) -> None:
        for number in (signal.SIGCONT, signal.SIGKILL):
            try:
                self.signal(number)
            except ProcessLookupError:
                break
        self.process.wait()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def make_checkpoint(target: Path) -> Path:
    """smollm2-135m in float32 as a directory that vLLM loads, with a tokenizer, which structured outputs need."""
    benchmarks = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, benchmarks)
    try:
        import model_files
    finally:
        sys.path.remove(benchmarks)
    paths = model_files.prepare(Path.home() / ".cache" / "shoal" / "bench-models")
    return model_files.with_tokenizer(paths, target)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
