"""Slurm's lists of hosts and Ray's lists of nodes."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.plan.job_nodes import JobNode, expand_hosts, ray_job, ray_nodes, ray_session, slurm_job


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu1", ["gpu1"]),
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("r[1-2]n[08-10]", ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
        ("a-[099-101].example.org", ["a-099.example.org", "a-100.example.org", "a-101.example.org"]),
    ],
)
def test_hosts(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize(
    "text", ["", "gpu[3-1]", "gpu[a]", "gpu[1", "gpu]", "gpu[]", "gpu[1-9999999]", "g[1-999]h[1-999]"]
)
def test_what_is_no_list_of_hosts(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a|names more than"):
        expand_hosts(text)


@given(st.integers(0, 999), st.integers(0, 50), st.integers(1, 4))
def test_ranges(first: int, more: int, width: int) -> None:
    hosts = expand_hosts(f"n[{first:0{width}d}-{first + more}]")
    assert len(hosts) == more + 1 and hosts[-1] == f"n{str(first + more).zfill(max(width, len(str(first))))}"


def test_a_slurm_job() -> None:
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_GPUS_ON_NODE": "8"}
    job = slurm_job(environment, lambda command: None)
    assert job is not None and job.scheduler == "slurm" and job.name == "7"
    assert job.nodes == (JobNode("gpu1", 8), JobNode("gpu2", 8))
    asked: list[list[str]] = []

    def scontrol(command: list[str]) -> str:
        asked.append(command)
        return "one\ntwo\n"

    job = slurm_job(environment | {"SLURM_GPUS_ON_NODE": "h100:4"}, scontrol)
    assert job is not None and job.nodes == (JobNode("one", 4, "h100"), JobNode("two", 4, "h100"))
    assert asked == [["scontrol", "show", "hostnames", "gpu[1-2]"]]
    assert slurm_job({"HOME": "/"}, scontrol) is None
    job = slurm_job({"SLURM_NODELIST": "a"}, lambda command: None)
    assert job is not None and job.nodes == (JobNode("a"),)


def test_ray_nodes_become_nodes() -> None:
    said = [
        {
            "Alive": True,
            "NodeManagerHostname": "w2",
            "Resources": {"GPU": 8.0, "CPU": 96.0, "accelerator_type:H100": 1.0},
        },
        {"Alive": False, "NodeManagerHostname": "dead", "Resources": {"GPU": 8.0}},
        {"Alive": True, "NodeManagerHostname": "head", "Resources": {"CPU": 4.0}},
    ]
    job = ray_job(said, "auto")
    assert job.nodes == (JobNode("head", 0), JobNode("w2", 8, "H100")) and job.scheduler == "ray"


def test_a_ray_session_of_this_host(tmp_path: Path) -> None:
    assert ray_session(tmp_path) is None
    file = tmp_path / "tmp/ray/ray_current_cluster"
    file.parent.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        file.write_text(address)
        assert ray_session(tmp_path) == address
    assert ray_session(tmp_path) is None, "what was left behind by one that ended is no cluster"
    for text in ("", "nonsense", "127.0.0.1:x", "127.0.0.1:99999999"):
        file.write_text(text)
        assert ray_session(tmp_path) is None


def test_without_ray_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="the package ray is not installed"):
        ray_nodes("auto")


def test_a_ray_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ray:
        calls: list[str] = []

        @classmethod
        def is_initialized(cls) -> bool:
            return "init" in cls.calls and "shutdown" not in cls.calls

        @classmethod
        def init(cls, **settings: object) -> None:
            cls.calls.append("init")
            if settings["address"] != "auto":
                raise ConnectionError("no cluster there")

        @classmethod
        def nodes(cls) -> list[dict[str, object]]:
            return [{"Alive": True, "NodeManagerAddress": "10.0.0.1", "Resources": {}}]

        @classmethod
        def shutdown(cls) -> None:
            cls.calls.append("shutdown")

    monkeypatch.setitem(sys.modules, "ray", Ray)  # type: ignore[arg-type]
    assert ray_job(ray_nodes("auto"), "auto").nodes == (JobNode("10.0.0.1", 0),)
    assert Ray.calls == ["init", "shutdown"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"Ray at {address} does not answer: no cluster there"):
            ray_nodes(address)
    tried = len(Ray.calls)
    for silent in (address, "nonsense", "127.0.0.1:99999999"):
        with pytest.raises(ValueError, match=f"Ray at {silent} does not answer: write HOST:PORT"):
            ray_nodes(silent)
    assert len(Ray.calls) == tried, "Ray would try for minutes"
