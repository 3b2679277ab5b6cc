"""`shoal topology`: what this host and its job are, or what a name or a file means, as a table, JSON or a file."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import typer
import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shoal.cli.errors import CommandError, UsageError
from shoal.cli.fleet_table import fleet_console
from shoal.cli.terminal import printable
from shoal.core.hardware import Cluster, LinkSpec
from shoal.plan.catalogue import load
from shoal.plan.detect import Detected, Topology, detect, topology
from shoal.plan.hardware_file import source_of
from shoal.plan.job_nodes import Job, ray_job, ray_nodes, ray_session, slurm_job
from shoal.plan.nvml import NoNvml, load_nvml
from shoal.plan.topology import parse_cluster

LEGEND = "NV# NVLinks · PIX one PCIe switch · PXB several · PHB one host bridge · NODE one NUMA node · SYS between them"


def show_cluster(text: str, hardware: Sequence[Path], *, as_json: bool, write: Path | None) -> None:
    """What a name or a topology file means to the planner."""
    if write is not None:
        raise UsageError("--write is for what was detected: leave out the topology")
    cluster = parse_cluster(text, load(tuple(hardware)))
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(cluster)).decode())
        return
    fleet_console().print(cluster_table(cluster))


def show_detected(hardware: Sequence[Path], ray: str | None, *, as_json: bool, write: Path | None) -> None:
    catalogue = load(tuple(hardware))
    nvml: Any
    try:
        nvml = load_nvml()
    except NoNvml as reason:
        nvml = reason
    found = detect(Path("/"), nvml, _job(ray))
    result = topology(found, catalogue)
    if write is not None:
        write.write_text(file_text(result), encoding="utf-8")
        typer.echo(f"wrote {write}", err=True)
    if as_json:
        body = {"detected": found, "topology": result.tree, "notes": result.notes}
        typer.echo(msgspec.json.format(msgspec.json.encode(body)).decode())
        return
    if write is None:
        fleet_console().print(detected_table(found))
    for note in result.notes:
        typer.secho("note: ", fg=typer.colors.YELLOW, err=True, nl=False)
        typer.echo(note, err=True)


def file_text(result: Topology) -> str:
    """The topology file, with what could not be seen on top."""
    notes = "".join(f"# {note}\n" for note in result.notes)
    return notes + yaml.safe_dump(result.tree, sort_keys=False, width=118, allow_unicode=True)


def _job(ray: str | None) -> Job | None:
    """The Ray cluster that is named; else the Slurm job of this process; else a Ray cluster that this host began."""
    try:
        address = ray or os.environ.get("RAY_ADDRESS")
        if not address and (job := slurm_job(os.environ, _run)):
            return job
        address = address or ray_session(Path("/"))
        return ray_job(ray_nodes(address), address) if address else None
    except ValueError as error:
        raise CommandError(str(error)) from None


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


# --- what people see --------------------------------------------------------------------------------------------------


def detected_table(found: Detected) -> RenderableType:
    cpu = found.cpu
    gibibytes = cpu.memory_bytes / 2**30
    parts: list[RenderableType] = [
        Text(
            printable(f"{found.host}  {cpu.model}: {cpu.sockets} socket(s), {cpu.cores} cores, {cpu.threads} threads, ")
            + f"{gibibytes:.1f} GiB, {len(found.numa) or 1} NUMA node(s)",
            style="bold",
        )
    ]
    if found.gpus is not None:
        parts += [_gpu_table(found), _matrix(found), Text(LEGEND, style="dim")]
    if found.ports:
        parts.append(_port_table(found))
    if found.job is not None:
        names = ", ".join(printable(node.name) for node in found.job.nodes[:16])
        more = f" and {len(found.job.nodes) - 16} more" if len(found.job.nodes) > 16 else ""
        parts.append(Text(f"{found.job.scheduler} job {found.job.name}: {len(found.job.nodes)} node(s): {names}{more}"))
    return Group(*parts)


def _clean(text: str) -> Text:
    """Names come from drivers and files: no markup of ours, and nothing that steers the terminal."""
    return Text(printable(text))


def _plain(*columns: str | Text, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for at, column in enumerate(columns):
        table.add_column(column, justify="left" if at < left else "right", no_wrap=True)
    return table


def _gpu_table(found: Detected) -> Table:
    assert found.gpus is not None
    table = _plain("GPU", "device", "memory", "PCIe", "NVLinks", "NUMA", "MIG", left=2)
    for gpu, numa in zip(found.gpus.gpus, found.gpu_numa, strict=True):
        profiles = " ".join(one.profile for one in gpu.slices) or ("on" if gpu.mig else "–")
        links = f"{gpu.nvlinks} ({gpu.nvlink_bandwidth / 1e9:g} GB/s)" if gpu.nvlinks else "–"
        bus = f"gen{gpu.pcie_generation} x{gpu.pcie_lanes}"
        memory = f"{gpu.memory_bytes / 2**30:.1f} GiB"
        table.add_row(str(gpu.index), _clean(gpu.name), memory, bus, links, _numa(numa), _clean(profiles))
    return table


def _matrix(found: Detected) -> Table:
    """Each device with each, and with each port for RDMA, in the words of nvidia-smi topo -m."""
    assert found.gpus is not None
    gpus = found.gpus.gpus
    paths = {(pair.a, pair.b): pair.path for pair in found.gpus.pairs}
    table = _plain("", *(f"GPU{gpu.index}" for gpu in gpus), *(_clean(port.name) for port in found.rdma))
    for gpu, distances in zip(gpus, found.gpu_port, strict=True):
        row = []
        for other in gpus:
            a, b = sorted((gpu.index, other.index))
            row.append("X" if a == b else paths[a, b])
        table.add_row(f"GPU{gpu.index}", *row, *distances)
    return table


def _port_table(found: Detected) -> Table:
    table = _plain("port", "protocol", "Gbit/s", "state", "NUMA", left=2)
    for port in found.ports:
        speed = f"{port.bits_per_second / 1e9:g}" if port.bits_per_second else "?"
        state = "active" if port.active else "down"
        protocol = f"{port.protocol} {port.generation}".strip()
        table.add_row(_clean(port.name), _clean(protocol), speed, state, _numa(port.numa))
    return table


def _numa(number: int) -> str:
    return str(number) if number >= 0 else "–"


def cluster_table(cluster: Cluster) -> RenderableType:
    device = cluster.device
    title = f"{cluster.name}: {cluster.num_nodes} node(s) of {cluster.devices_per_node} x {device.name}"
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(style="dim", overflow="fold")

    def add(name: str, value: str, source: str) -> None:
        table.add_row(name, _clean(value), _clean(source))

    add("memory", f"{device.memory_bytes / 2**30:.1f} GiB", source_of(device, "memory_bytes"))
    add("bandwidth", f"{device.memory_bandwidth / 1e12:.4g} TB/s", source_of(device, "memory_bandwidth"))
    for dtype, rate in device.rates.items():
        add(dtype, f"{rate / 1e12:.5g} T operations/s", source_of(device, f"rates.{dtype}"))
    for name, link in (("within a node", cluster.scale_up), ("between nodes", cluster.network), ("host", cluster.host)):
        if link is not None:
            add(name, _link(link), source_of(link, "bandwidth"))
    if cluster.dollars_per_device_hour is not None:
        add("price", f"${cluster.dollars_per_device_hour:.2f} a device and hour", cluster.price_source)
    return Group(Text(printable(title), style="bold"), table)


def _link(link: LinkSpec) -> str:
    measured = f", measured for {', '.join(map(str, link.all_reduce))} ranks" if link.all_reduce else ""
    return f"{link.name}: {link.bandwidth / 1e9:.4g} GB/s x {link.reached:g}, {link.latency * 1e6:.3g} us{measured}"
