"""Ranks that torchrun, or a shell on each machine, starts: one command, and RANK says what it becomes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from shoal.bench.faults.deployment import free_port
from shoal.core.layout import Layout
from shoal.core.types import Request, Sampling
from tests.checkpoints import make_checkpoint
from tests.parallel.engines import run_layout
from tests.serve.running import wait_until

SECONDS = 60.0
PROMPT = [7, 8, 9, 30, 31, 7]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef0123456789abcdef\n")
    return file


def command(checkpoint: Path, secret: Path, port: int, launch_port: int, *flags: str) -> list[str]:
    options = {"--port": port, "--launch-port": launch_port, "--secret-file": secret, "--threads": 1}
    pairs = [text for name, value in options.items() for text in (name, str(value))]
    return ["shoal", "serve", str(checkpoint), "--launcher", "env", *pairs, "--served-model-name", "tiny", *flags]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", *arguments], env={**os.environ, "PYTHONPATH": "src", **environment})


def environment_of(rank: int, size: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def complete(port: int, *, may_fail: bool = False) -> str:
    body = {"model": "tiny", "prompt": [7, 8, 9], "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=SECONDS)
    if may_fail and answer.status_code == 500:
        return ""
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def wait_until_ready(port: int) -> None:
    def ready() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
        except httpx.TransportError:
            return False

    wait_until(ready, "the server to be ready")


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_two_ranks_started_by_hand_serve_survive_a_lost_rank_and_end_together(
    checkpoint: Path, secret: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    port, launch_port = free_port(), free_port()
    arguments = command(checkpoint, secret, port, launch_port, "--tensor-parallel-size", "2")
    for rank in (0, 1):
        processes.append(start(arguments, **environment_of(rank, 2)))
    wait_until_ready(port)
    text = complete(port)
    # The agent's rank process is lost; the engine is built anew, and the agent's next one joins it.
    agent = processes[1].pid
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGKILL)
    listed = Path(f"/proc/{agent}/task/{agent}/children")
    wait_until(lambda: listed.read_text().split() not in ([], children), "the next rank process")
    # What runs when a rank is lost ends with an error; what comes later does not.
    wait_until(lambda: complete(port, may_fail=True) == text, "the engine to be built anew")
    processes[0].send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in processes] == [0, 0]


@pytest.mark.parametrize(
    ("family", "count", "flags"),
    [
        ("llama", 4, ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "2"]),
        ("qwen3_moe", 2, ["--expert-parallel", "2"]),
    ],
    ids=str,
)
def test_torchrun_starts_ranks_that_give_the_tokens_of_one(
    tmp_path: Path,
    secret: Path,
    processes: list[subprocess.Popen[bytes]],
    family: str,
    count: int,
    flags: list[str],
) -> None:
    checkpoint = make_checkpoint(family, tmp_path / family)
    port, launch_port, master = free_port(), free_port(), free_port()
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(count), "--master-port", str(master), "-m"]
    processes.append(start([*torchrun, *command(checkpoint, secret, port, launch_port, *flags)]))
    wait_until_ready(port)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "return_token_ids": True}
    body["ignore_eos"] = True
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=SECONDS).json()
    processes[0].send_signal(signal.SIGTERM)
    processes[0].wait(20)  # after 30 s torchrun would kill ranks that do not end
    alone = Request(id="alone", prompt=PROMPT, max_tokens=24, sampling=Sampling(temperature=0.0))
    assert answer["choices"][0]["token_ids"] == run_layout(checkpoint, Layout(), [alone])["alone"]


def test_an_agent_whose_driver_never_comes_says_so(checkpoint: Path, tmp_path: Path, secret: Path) -> None:
    port = free_port()
    settings = tmp_path / "serve.yaml"
    settings.write_text("engine: {launch: {join_seconds: 0.5}}\n")
    arguments = command(checkpoint, secret, 0, port, "--tensor-parallel-size", "2", "--config", str(settings))
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "PYTHONPATH": "src", **environment_of(1, 2)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 1 and f"rank 1 cannot reach the driver at 127.0.0.1:{port}" in done.stderr


def test_a_rank_without_a_secret_is_told_how_to_make_one(checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shoal", "serve", str(checkpoint), "--launcher", "env", "--tensor-parallel-size", "2"],
        env={**os.environ, "PYTHONPATH": "src", **environment_of(1, 2)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode != 0 and "--secret-file" in done.stderr and "Traceback" not in done.stderr
