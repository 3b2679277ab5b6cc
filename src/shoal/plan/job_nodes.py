"""The other nodes of a Slurm job or a Ray cluster in which this process runs."""

from __future__ import annotations

import importlib
import os
import re
import socket
from collections.abc import Callable, Mapping
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import msgspec

MAX_HOSTS = 100_000
Run = Callable[[list[str]], str | None]
"""A command's output; None where there is no such command or it fails."""


class JobNode(msgspec.Struct, frozen=True):
    name: str
    devices: int | None = None
    """GPUs; None: nobody says."""
    device: str = ""
    """As the scheduler calls it: H100; empty: nobody says."""


class Job(msgspec.Struct, frozen=True):
    scheduler: str
    name: str
    nodes: tuple[JobNode, ...]


def slurm_job(environment: Mapping[str, str], run: Run) -> Job | None:
    """From SLURM_* variables; None outside a job. `scontrol` expands the list of hosts, else this does.

    Raises ValueError where the list makes no sense.
    """
    text = environment.get("SLURM_JOB_NODELIST") or environment.get("SLURM_NODELIST")
    if not text:
        return None
    listed = run(["scontrol", "show", "hostnames", text])
    names = listed.split() if listed else expand_hosts(text)
    counts = environment.get("SLURM_GPUS_ON_NODE") or environment.get("SLURM_GPUS_PER_NODE", "")
    match = re.fullmatch(r"(?:([A-Za-z][\w.-]*):)?(\d+)", counts)  # 8, h100:8
    devices, device = (int(match[2]), match[1] or "") if match else (None, "")
    job = environment.get("SLURM_JOB_ID", "")
    return Job("slurm", job, tuple(JobNode(name, devices, device) for name in names))


def expand_hosts(text: str) -> list[str]:
    """`gpu[01-03,7],login` as Slurm writes it: gpu01, gpu02, gpu03, gpu7, login. Raises ValueError."""
    hosts: list[str] = []
    item_pattern = r"(?:[^,\[\]]|\[[^\[\]]*\])+"
    if not re.fullmatch(f"{item_pattern}(?:,{item_pattern})*", text):
        raise ValueError(f"{text!r} is not a list of hosts, as gpu[01-03],login is")
    for item in re.findall(item_pattern, text):
        parts = re.split(r"\[([^\]]*)\]", item)
        # Every second part was within brackets.
        choices = [_range(part) if at % 2 else [part] for at, part in enumerate(parts)]
        if len(hosts) + prod(len(choice) for choice in choices) > MAX_HOSTS:
            raise ValueError(f"{text!r} names more than {MAX_HOSTS:,} hosts")
        hosts += ["".join(choice) for choice in product(*choices)]
    return hosts


def _range(text: str) -> list[str]:
    found: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(f"{part!r} is not a range of numbers, as 01-03 is")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first > MAX_HOSTS:
            raise ValueError(f"{part!r} is not a range of numbers, as 01-03 is")
        found += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return found


def ray_session(root: Path) -> str | None:
    """The address of a Ray cluster that was started on this host and still answers; None: there is none."""
    try:
        address = (root / "tmp/ray/ray_current_cluster").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return address if _answers(address, 0.5) else None


def _answers(address: str, seconds: float) -> bool:
    """HOST:PORT. Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=seconds).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


def ray_nodes(address: str) -> list[dict[str, Any]]:
    """What `ray.nodes()` says of a running cluster. Raises ValueError where there is none to be reached.

    A cluster that wants a token gets it from where Ray looks for it: RAY_AUTH_TOKEN and its like.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address != "auto" and "://" not in address and not _answers(address, 5.0):
        raise ValueError(f"Ray at {address} does not answer: write HOST:PORT of a running head, as 10.0.0.1:6379")
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ValueError("Ray's nodes are not looked for: the package ray is not installed") from None
    started = not ray.is_initialized()
    try:
        ray.init(address=address, ignore_reinit_error=True, logging_level="ERROR", log_to_driver=False)
        nodes: list[dict[str, Any]] = ray.nodes()
    except (ConnectionError, RuntimeError, OSError) as error:
        raise ValueError(f"Ray at {address} does not answer: {error}") from None
    finally:
        if started and ray.is_initialized():
            ray.shutdown()
    return nodes


def ray_job(nodes: list[dict[str, Any]], address: str) -> Job:
    """The nodes that are alive, with their GPUs and what Ray calls them."""
    found = []
    for node in nodes:
        if not node.get("Alive", node.get("alive", False)):
            continue
        resources = node.get("Resources", {})
        kinds = [key.partition(":")[2] for key in resources if key.startswith("accelerator_type:")]
        name = str(node.get("NodeManagerHostname") or node.get("NodeManagerAddress", ""))
        found.append(JobNode(name, int(resources.get("GPU", 0)), kinds[0] if kinds else ""))
    return Job("ray", address, tuple(sorted(found, key=lambda node: node.name)))
