"""Several hosts: ranks in network namespaces of their own, which reach each other over one link and nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from hosts import HOSTS, Hosts
from tests.checkpoints import make_checkpoint
from tests.serve.running import wait_until

SECONDS = 60.0


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    try:
        reason = made.make()
        if reason is not None:
            pytest.skip(f"network namespaces cannot be made here: {reason}")
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("checkpoint"))


ASK = """
import sys, time, httpx
until, body = time.monotonic() + 60, {"model": "tiny", "prompt": [7, 8, 9], "max_tokens": 24, "temperature": 0}
while True:
    try:
        if httpx.get("http://127.0.0.1:8000/ready").status_code == 200:
            break
    except httpx.TransportError:
        pass
    if time.monotonic() > until:
        sys.exit("the server is not ready")
    time.sleep(0.1)
answer = httpx.post("http://127.0.0.1:8000/v1/completions", json=body, timeout=60)
print(answer.json()["choices"][0]["text"].encode().hex())
"""


@pytest.mark.parametrize("flags", [["--tensor-parallel-size", "2"], ["--pipeline-parallel-size", "2"]], ids=str)
def test_ranks_on_two_hosts_answer_as_one_rank(
    hosts: Hosts, checkpoint: Path, tmp_path: Path, flags: list[str]
) -> None:
    secret, settings = tmp_path / "secret", tmp_path / "serve.yaml"
    secret.write_text("0123456789abcdef0123456789abcdef\n")
    # Both namespaces are one machine, with one /dev/shm: say that the link is to be used.
    settings.write_text("engine: {threads: 1, launch: {comm: gloo, silence_seconds: 30}}\n")
    serve = ["-m", "shoal", "serve", str(checkpoint), "--served-model-name", "tiny"]
    several = ["--config", str(settings), "--launcher", "env", "--launch-host", hosts.addresses[0]]
    several += ["--secret-file", str(secret), *flags]
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": "29500"}
    processes = [hosts.run(host, [*serve, *several], RANK=str(host), **environment) for host in range(HOSTS)]
    try:
        answer = ask(hosts)
        assert hosts.received_bytes(1) > 10_000, "the control: it went over the link"
        processes[0].send_signal(signal.SIGTERM)
        assert [process.wait(60) for process in processes] == [0, 0]
        processes.append(hosts.run(0, [*serve, "--threads", "1"]))
        assert ask(hosts) == answer
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(60)


def test_a_ray_cluster_over_two_hosts_places_a_stage_on_each(
    hosts: Hosts, checkpoint: Path, tmp_path: Path, short_folder: str
) -> None:
    pytest.importorskip("ray", reason="Ray is an extra")
    settings = tmp_path / "serve.yaml"
    settings.write_text("engine: {threads: 1, launch: {comm: gloo, silence_seconds: 30}}\n")
    cluster = f"{hosts.addresses[0]}:6399"
    node = ["-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--num-gpus=0", "--disable-usage-stats"]
    node += [f"--object-store-memory={80 << 20}"]
    head = ["--head", "--port=6399", "--include-dashboard=false", f"--temp-dir={short_folder}"]
    serve = ["-m", "shoal", "serve", str(checkpoint), "--served-model-name", "tiny"]
    several = ["--config", str(settings), "--launcher", "ray", "--ray-address", cluster]
    several += ["--launch-host", hosts.addresses[0], "--pipeline-parallel-size", "2"]
    # Rays of late ask for a token by default; who joins has to know it.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "RAY_USAGE_STATS_ENABLED": "0"}
    processes = [hosts.run(0, [*node, *head, f"--node-ip-address={hosts.addresses[0]}"], **token)]
    try:
        wait_until(lambda: "True" in probe(hosts, cluster), "the first node of the cluster")
        joining = [f"--address={cluster}", f"--node-ip-address={hosts.addresses[1]}"]
        processes.append(hosts.run(1, [*node, *joining], **token))
        processes.append(hosts.run(0, [*serve, *several], **token))
        answer = ask(hosts)
        assert [rank_processes(hosts, host) for host in range(HOSTS)] == [1, 1], "the control: one on each host"
        end(processes[-1:])
        processes.append(hosts.run(0, [*serve, "--threads", "1"]))
        assert ask(hosts) == answer
    finally:
        end(processes[::-1])


def rank_processes(hosts: Hosts, host: int) -> int:
    """How many of them are in a host's namespace."""
    code = "import os; print(os.readlink('/proc/self/ns/net'))"
    namespace = hosts.run(host, ["-c", code]).communicate(timeout=SECONDS)[0].strip()
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_rank = b"shoal.engine.rank_process" in (process / "cmdline").read_bytes()
            count += is_rank and os.readlink(process / "ns/net") == namespace
    return count


def end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait(60)


def probe(hosts: Hosts, address: str) -> str:
    """Whether something listens there, as the first host sees it."""
    host, port = address.split(":")
    code = f"import socket; print(socket.socket().connect_ex(('{host}', {port})) == 0)"
    return hosts.run(0, ["-c", code]).communicate(timeout=SECONDS)[0]


@pytest.fixture
def short_folder() -> Iterator[str]:
    """For Ray, whose sockets' paths would be too long in a test's own folder."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield folder


def ask(hosts: Hosts) -> str:
    """On the first host, where the server listens on loopback."""
    began = time.monotonic()
    asking = hosts.run(0, ["-c", ASK])
    text, _ = asking.communicate(timeout=2 * SECONDS)
    assert asking.returncode == 0 and text.strip(), f"no answer after {time.monotonic() - began:.0f} s"
    return text
