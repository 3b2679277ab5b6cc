"""`shoal serve`: settings to a running server, and what people see of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.markup import escape

from shoal.cli.load_report import LoadReport
from shoal.cli.terminal import StartBar, error_console, format_bytes, resolve_with_progress
from shoal.config import ConfigError, load_config
from shoal.core.config import EngineConfig
from shoal.core.start_report import slowest
from shoal.serve.deployment import Deployment, DeploymentError, check, wanted_files
from shoal.serve.messages import EngineInfo
from shoal.serve.metrics import own_engines
from shoal.serve.server import ServeConfig, listen, serve
from shoal.serve.session import Session


def run_deployment(file: Path, flags: Mapping[str, Any]) -> int:
    """A fleet as a file describes it, until it is told to stop; returns the exit status."""
    errors, console = error_console(), Console(highlight=False)
    deployment = load_config(Deployment, file, flags)
    try:
        check(deployment)
    except DeploymentError as error:
        raise ConfigError(f"{file}: {error}") from None
    listener = listen(deployment)
    files = {
        name: resolve_with_progress(model, errors, weights=weights)
        for name, (model, weights) in wanted_files(deployment).items()
    }
    with StartBar(", ".join(files), errors) as bar:

        def ready(url: str, session: Session) -> None:
            bar.close()
            _announce_fleet(console, url, session)

        running = serve(deployment, files, listener, on_progress=bar.report, on_ready=ready)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(running)


def run_server(
    model: str,
    file: Path | None,
    flags: Mapping[str, Any],
    recording: Path | None,
    *,
    load_report: bool = False,
    load_report_json: Path | None = None,
) -> int:
    """Until it is told to stop; returns the exit status. `flags` are ServeConfig's keys, dotted."""
    errors, console = error_console(), Console(highlight=False)
    report = LoadReport(console if load_report else None, load_report_json, errors)
    config = load_config(ServeConfig, file, flags)
    if recording is not None:
        recording.open("wb").close()  # a path that cannot be written is the user's to know before the model loads
    if is_agent(config.engine):
        return run_agent(config.engine)
    listener = listen(config)
    files = resolve_with_progress(model, errors)
    report.end("resolve")
    deployment = config.deployment(files)
    name = deployment.models[0].name
    with StartBar(name, errors) as bar:

        def ready(url: str, session: Session) -> None:
            bar.close()
            infos = [engine.engine_info for engine in own_engines(session.fleet.pools[name])]
            _announce(console, name, url, infos)
            report.ready(slowest([info.start for info in infos]), url, config.api_key)

        running = serve(
            deployment,
            {name: files},
            listener,
            on_progress=bar.report,
            on_ready=ready,
            recording=None if recording is None else str(recording.resolve()),
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(running)


def is_agent(engine: EngineConfig) -> bool:
    """Whether this command was started as a rank other than the first: it serves an engine elsewhere, not clients."""
    if engine.launch.launcher != "env" or engine.layout.ranks == 1:
        return False
    from shoal.engine.launch.environment import read_environment

    return read_environment().rank != 0


def run_agent(engine: EngineConfig) -> int:
    """Keep this rank's process running until the engine is stopped; returns the exit status."""
    from shoal.engine.launch import shared_secret
    from shoal.engine.launch.environment import Agent

    return Agent(engine.launch, shared_secret(engine.launch)).run()


def _announce(console: Console, name: str, url: str, infos: list[EngineInfo]) -> None:
    info, several = infos[0], f"{len(infos)} engines of " if len(infos) > 1 else ""
    console.print(f"[bold green]{escape(name)}[/] is served at [bold]{url}/v1[/]", soft_wrap=True)
    console.print(
        f"{several}{info.dtype} weights ({format_bytes(info.weight_bytes)}) on {info.device} with {info.ops} kernels; "
        f"KV cache of {info.num_blocks * info.block_size:,} tokens ({format_bytes(info.kv_bytes)}); "
        f"sequences of up to {info.max_len:,} tokens; "
        f"started in {max(one.start.total_seconds for one in infos):.1f} s",
        style="dim",
        soft_wrap=True,
    )
    console.print("Stop with Ctrl-C.", style="dim")
    console.file.flush()


def _announce_fleet(console: Console, url: str, session: Session) -> None:
    console.print(f"The fleet is served at [bold]{url}/v1[/]", soft_wrap=True)
    for name, pool in session.fleet.pools.items():
        console.print(f"[bold green]{escape(name)}[/]", soft_wrap=True)
        for member in pool.members.values():
            reason = f" ({member.reason})" if member.reason else ""
            spare = ", a spare" if member.spare else ""
            line = f"  {member.name}: {member.state}{spare}, {member.endpoint.address}{reason}"
            console.print(line, style="dim", markup=False, soft_wrap=True)
    console.print(f"See `shoal fleet status --url {url}`. Stop with Ctrl-C.", style="dim", markup=False, soft_wrap=True)
    console.file.flush()
