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
from shoal.config import load_config
from shoal.core.config import EngineConfig
from shoal.serve.engine_group import Engine
from shoal.serve.server import ServeConfig, listen, serve


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
    name = config.served_model_name or files.name
    with StartBar(name, errors) as bar:

        def ready(url: str, engine: Engine) -> None:
            bar.close()
            _announce(console, name, url, engine)
            report.ready(engine.info.start, url, config.api_key)

        running = serve(
            config,
            files,
            listener,
            on_progress=bar.report,
            on_ready=ready,
            recording=None if recording is None else str(recording.resolve()),
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            status = runner.run(running)
    if status:
        errors.print("[red bold]error:[/] the engine process ended unexpectedly; what it said is above")
    return status


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


def _announce(console: Console, name: str, url: str, engine: Engine) -> None:
    info = engine.info
    console.print(f"[bold green]{escape(name)}[/] is served at [bold]{url}/v1[/]", soft_wrap=True)
    console.print(
        f"{info.dtype} weights ({format_bytes(info.weight_bytes)}) on {info.device} with {info.ops} kernels; "
        f"KV cache of {info.num_blocks * info.block_size:,} tokens ({format_bytes(info.kv_bytes)}); "
        f"sequences of up to {info.max_len:,} tokens; started in {info.start.total_seconds:.1f} s",
        style="dim",
        soft_wrap=True,
    )
    console.print("Stop with Ctrl-C.", style="dim")
    console.file.flush()
