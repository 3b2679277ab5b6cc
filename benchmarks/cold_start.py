"""From a command to its first token, phase by phase, and how fast weights are read beside `dd`, as a Markdown report.

    python benchmarks/cold_start.py                 five rounds of everything
    python benchmarks/cold_start.py --rounds 1      a look

Two checkpoints: SmolLM2-135M in float32, and random weights in bfloat16, in four files, made below --scratch. Each
is served by `shoal serve` in each layout, with the weights' pages dropped from the page cache before (cold) or read by
`dd` just before (warm). `dd` reads the same files in the same state right before each start. "read GB/s" is bytes by
the time in which a rank's threads were reading; they share the cores with the rank that packs what has come. "reader
alone" is the same reader with nobody who packs. With several ranks the bytes are those of all, and the time is the
longest: on one host they read the same pages of what is cut by columns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

import machine
import model_files
import shoal
from report import spread
from shoal.core.config import EngineConfig
from shoal.core.layout import Layout
from shoal.core.start_report import StartReport
from shoal.core.types import Request, Sampling
from shoal.serve.engine_client import EngineClient

LAYOUTS = {"tp1": Layout(), "tp2": Layout(tp=2), "pp2": Layout(pp=2)}
FLAGS = {"tp": "--tensor-parallel-size", "pp": "--pipeline-parallel-size"}
KV_BYTES = 256 << 20
QUIET = 0.1
DD_BLOCK = "bs=4M"
NUM_FILES = 4


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    name: str
    path: Path
    dtype: str
    """That the engine keeps the weights in: the file's own."""

    @property
    def files(self) -> list[Path]:
        return sorted(self.path.glob("*.safetensors"))

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def small(scratch: Path, models: Path) -> Checkpoint:
    paths = model_files.prepare(models)
    path = scratch / "smollm2-135m"
    path.mkdir()
    for file in paths.float32.iterdir():
        (path / file.name).symlink_to(file)
    write_tokenizer(path)
    return Checkpoint("SmolLM2-135M, float32", path, "float32")


def large(scratch: Path, gigabytes: float) -> Checkpoint:
    """A Llama of as many layers as make the size; each random matrix is one block of numbers over and over."""
    import torch
    from safetensors.torch import save_file

    hidden, features, vocab, kv = 2048, 8192, 32000, 512
    per_layer = 2 * hidden * hidden + 2 * kv * hidden + 3 * features * hidden
    num_layers = max(NUM_FILES, round((gigabytes * 1e9 / 2 - 2 * vocab * hidden) / per_layer))
    path = scratch / "random"
    path.mkdir()
    numbers = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return numbers.repeat(-(-rows * columns // len(numbers)))[: rows * columns].view(rows, columns)

    weight_map = {}
    for number in range(NUM_FILES):
        tensors = {}
        if number == 0:
            tensors |= {"model.embed_tokens.weight": matrix(vocab, hidden), "lm_head.weight": matrix(vocab, hidden)}
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for layer in range(number * num_layers // NUM_FILES, (number + 1) * num_layers // NUM_FILES):
            prefix = f"model.layers.{layer}."
            for name, rows, columns in (
                ("self_attn.q_proj", hidden, hidden),
                ("self_attn.k_proj", kv, hidden),
                ("self_attn.v_proj", kv, hidden),
                ("self_attn.o_proj", hidden, hidden),
                ("mlp.gate_proj", features, hidden),
                ("mlp.up_proj", features, hidden),
                ("mlp.down_proj", hidden, features),
            ):
                tensors[f"{prefix}{name}.weight"] = matrix(rows, columns)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        file = f"model-{number + 1:05}-of-{NUM_FILES:05}.safetensors"
        save_file(tensors, path / file)
        weight_map |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    config |= {"hidden_size": hidden, "intermediate_size": features, "num_hidden_layers": num_layers}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": vocab}
    config |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    write_tokenizer(path)
    return Checkpoint(f"random, {num_layers} layers, bfloat16", path, "bfloat16")


def write_tokenizer(path: Path) -> None:
    """One token a byte: a server does not start without one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text("{}")


# --- files ----------------------------------------------------------------------------------------------------------


def evict(files: list[Path]) -> None:
    """Drop their pages from the page cache; they must be written back for that."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def dd_rate(files: list[Path]) -> float:
    """10^9 bytes a second, one file after the other."""
    began = time.monotonic()
    for file in files:
        command = ["dd", f"if={file}", "of=/dev/null", DD_BLOCK]
        subprocess.run(command, check=True, capture_output=True)
    return sum(file.stat().st_size for file in files) / (time.monotonic() - began) / 1e9


def reader_rate(checkpoint: Checkpoint) -> float:
    """Of the reader that ranks use, over all tensors in the order of the files, each dropped as soon as it is there."""
    from shoal.engine.read_ahead import ReadAhead
    from shoal.engine.weights import Part, open_weights

    source = open_weights(checkpoint.path)
    extents = sorted((source.extent(Part(name)) for name in source.names()), key=lambda e: (e.path, e.offset))
    began = time.monotonic()
    with ReadAhead([[extent] for extent in extents]) as ahead:
        for _ in extents:
            ahead.take()
    seconds = time.monotonic() - began
    source.close()
    return sum(extent.length for extent in extents) / seconds / 1e9


# --- starts ---------------------------------------------------------------------------------------------------------


@dataclass
class Starts:
    """Of one checkpoint in one layout and state of the page cache, one entry a round."""

    phases: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, report: StartReport, figures: dict[str, float]) -> None:
        seconds = {f"{phase.where.split()[0]}: {phase.name}": phase.seconds for phase in report.phases}
        for name, value in (seconds | {"other": report.other_seconds, "total": report.total_seconds}).items():
            self.phases.setdefault(name, []).append(value)
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)


def environment() -> dict[str, str]:
    """The very shoal that this process imported, kernels built with it included."""
    return os.environ | {"PYTHONPATH": str(Path(shoal.__file__).parent.parent)}


def start_once(checkpoint: Checkpoint, layout: str, log: Path) -> tuple[StartReport, dict[str, float]]:
    """Serve until the first token has come. Raises RuntimeError where that does not happen."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "report.json"
        command = [sys.executable, "-m", "shoal", "serve", str(checkpoint.path), "--port", "0"]
        command += ["--dtype", checkpoint.dtype, "--kv-cache-memory", str(KV_BYTES), "--load-report-json", str(file)]
        command += [word for axis, flag in FLAGS.items() for word in (flag, str(getattr(LAYOUTS[layout], axis)))]
        with log.open("a") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment())
        try:
            while not file.exists() or not file.read_bytes().endswith(b"}\n"):
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended with status {process.returncode}; see {log}")
                time.sleep(0.02)
            report = msgspec.json.decode(file.read_bytes(), type=StartReport)
            memory = [fields for pid in descendants(process.pid) if (fields := memory_of(pid))]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    peak, now = (sum(fields[name] for fields in memory) for name in ("VmHWM", "VmRSS"))
    return report, {"peak": peak, "passing": peak - now}


def descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children = (task / "children").read_text()
        except FileNotFoundError:
            continue  # a thread that has ended meanwhile
        for child in map(int, children.split()):
            yield child
            yield from descendants(child)


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of a process by the names of proc(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def measure_starts(checkpoint: Checkpoint, layout: str, cold: bool, log: Path) -> tuple[StartReport, dict[str, float]]:
    if cold:
        evict(checkpoint.files)
    else:
        dd_rate(checkpoint.files)
    dd = dd_rate(checkpoint.files)
    if cold:
        evict(checkpoint.files)
    alone = reader_rate(checkpoint)
    if cold:
        evict(checkpoint.files)
    machine.wait_until_quiet(QUIET, 60)
    report, figures = start_once(checkpoint, layout, log)
    rate = sum(rank.bytes_read for rank in report.ranks) / max(rank.reading_seconds for rank in report.ranks) / 1e9
    figures |= {"dd": dd, "read": rate, "read/dd": rate / dd, "alone": alone, "alone/dd": alone / dd}
    return report, figures | {"peak/weights": figures["peak"] / checkpoint.num_bytes}


# --- a killed rank --------------------------------------------------------------------------------------------------


def rank_pids(engine_pid: int) -> list[int]:
    pids = descendants(engine_pid)
    return sorted(pid for pid in pids if b"rank_process" in Path(f"/proc/{pid}/cmdline").read_bytes())


async def seconds_to_next_answer(checkpoint: Checkpoint, layout: str, num_spares: int) -> float:
    """From the end of a rank to the first token of a request sent at that moment, and again if it is lost."""
    config = EngineConfig(
        model=str(checkpoint.path),
        dtype=checkpoint.dtype,  # type: ignore[arg-type]
        layout=LAYOUTS[layout],
        kv_cache_bytes=KV_BYTES,
        warm_spares=num_spares,
    )
    client = await EngineClient.start(config)
    try:
        await answered(client, "before")
        while client.num_spares < num_spares:
            await asyncio.sleep(0.05)
        await asyncio.sleep(1.0)  # for what starts and loads to be over
        os.kill(rank_pids(client.pid)[1], signal.SIGKILL)
        began = time.monotonic()
        for attempt in range(100):
            if await answered(client, f"after {attempt}"):
                return time.monotonic() - began
        raise RuntimeError("no request was answered")
    finally:
        await client.stop()


async def answered(client: EngineClient, name: str) -> bool:
    request = Request(id=name, prompt=[5, 6, 7], max_tokens=1, sampling=Sampling(temperature=0.0))
    outputs = [output async for output in client.generate(request)]
    return outputs[-1].finish == "length"


# --- report ---------------------------------------------------------------------------------------------------------


def table(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


Key = tuple[str, str, str]
"""Checkpoint, layout, state of the page cache."""


def phase_table(results: dict[Key, Starts], checkpoint: str) -> str:
    chosen = {key[1:]: starts for key, starts in results.items() if key[0] == checkpoint}
    last = ["command: listen", "command: first token", "other", "total"]
    names = dict.fromkeys(name for starts in chosen.values() for name in starts.phases if name not in last)
    places = ["command", "engine", "rank"]
    rows = [["seconds", *(f"{layout}, {state}" for layout, state in chosen)]]
    for name in sorted(names, key=lambda name: places.index(name.split(":")[0])) + last:
        rows.append([name, *(spread(starts.phases.get(name, []), 2) for starts in chosen.values())])
    return table(rows)


def rate_table(results: dict[Key, Starts]) -> str:
    titles = ["dd GB/s", "read GB/s", "of dd", "reader alone GB/s", "of dd", "peak RSS / weights", "peak RSS - RSS, MB"]
    rows = [["checkpoint", *titles]]
    for (name, layout, state), starts in results.items():
        f = starts.figures
        cells = [spread(f[k], 2) for k in ("dd", "read", "read/dd", "alone", "alone/dd", "peak/weights")]
        rows.append([f"{name}, {layout}, {state}", *cells, spread(f["passing"], 0, 1e-6)])
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time to the first token goes, as Markdown.")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of random weights; default 4")
    parser.add_argument("--layouts", default="tp1,tp2,pp2", help="separated by commas; default tp1,tp2,pp2")
    parser.add_argument("--models", type=Path, default=Path("~/.cache/shoal/bench-models"), help="where weights are")
    parser.add_argument("--scratch", type=Path, help="where random weights are written; default: a temporary directory")
    arguments = parser.parse_args()
    layouts = arguments.layouts.split(",")
    if arguments.rounds < 1 or not set(layouts) <= set(LAYOUTS):
        parser.error(f"--rounds must be at least 1, --layouts of {', '.join(LAYOUTS)}")
    results: dict[Key, Starts] = {}
    answers: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        scratch = Path(directory)
        say("making the checkpoints")
        checkpoints = [small(scratch, arguments.models.expanduser()), large(scratch, arguments.gigabytes)]
        for number in range(arguments.rounds):
            for checkpoint in checkpoints:
                for layout in layouts if number % 2 == 0 else layouts[::-1]:
                    for state in ("cold", "warm"):
                        report, figures = measure_starts(checkpoint, layout, state == "cold", scratch / "log")
                        results.setdefault((checkpoint.name, layout, state), Starts()).add(report, figures)
                        say(f"round {number + 1}: {checkpoint.name}, {layout}, {state}: {report.total_seconds:.2f} s")
            for layout in [name for name in layouts if LAYOUTS[name].ranks > 1]:
                for num_spares in (0, 1):
                    machine.wait_until_quiet(QUIET, 60)
                    seconds = asyncio.run(seconds_to_next_answer(checkpoints[0], layout, num_spares))
                    answers.setdefault((layout, num_spares), []).append(seconds)
                    say(f"round {number + 1}: {layout}, {num_spares} spares: {seconds:.2f} s to the next answer")
    print_report(arguments, checkpoints, results, answers)


def print_report(
    arguments: Any,
    checkpoints: list[Checkpoint],
    results: dict[Key, Starts],
    answers: dict[tuple[str, int], list[float]],
) -> None:
    host = machine.describe()
    command = " ".join(["python benchmarks/cold_start.py", *sys.argv[1:]])
    print(f"`{command}`, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}\n")
    print(f"- {host['cpu']}, {host['cores']} cores, {host['system']}; Python {host['python']}, torch {host['torch']}")
    print(f"- rounds: {arguments.rounds}; medians, with the range over rounds in brackets\n")
    for checkpoint in checkpoints:
        print(f"## From start to first token: {checkpoint.name}\n\n{phase_table(results, checkpoint.name)}\n")
    print(f"## Reading\n\n{rate_table(results)}\n")
    rows = [["SmolLM2-135M", "seconds from a killed rank to the next answer"]]
    for (layout, num_spares), seconds in answers.items():
        rows.append([f"{layout}, {num_spares} warm spares", spread(seconds, 2)])
    print(f"## A rank is killed\n\n{table(rows)}")


if __name__ == "__main__":
    main()
