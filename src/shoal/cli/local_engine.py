"""An engine for one command: `generate` and `chat` start one, use it, and leave nothing behind."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from rich.console import Console

from shoal.checkpoint.resolve import ModelFiles
from shoal.cli.terminal import StartBar
from shoal.core.config import EngineConfig
from shoal.serve.generation import Generator
from shoal.serve.session import open_generator

_TERMINATED = 128 + signal.SIGTERM


@asynccontextmanager
async def local_engine(config: EngineConfig, files: ModelFiles, console: Console) -> AsyncIterator[Generator]:
    """A started engine with its tokenizer, stopped at the end. Raises CheckpointError or EngineStartError."""
    async with AsyncExitStack() as stack:
        with StartBar(files.name, console) as bar:
            generator = await stack.enter_async_context(open_generator(config, files, on_progress=bar.report))
        yield generator


def exit_on_sigterm() -> None:
    """End as by `sys.exit`, so that what is open is closed and the engine stopped, instead of at once."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
