"""A model ready to generate, loaded in an engine process, with its tokenizer. Server, batch and chat open one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec

from shoal.checkpoint.resolve import ModelFiles
from shoal.checkpoint.tokenizer import load_tokenizer
from shoal.core.config import EngineConfig
from shoal.serve.engine_client import Progress
from shoal.serve.engine_group import start_engine
from shoal.serve.generation import Generator
from shoal.serve.protocol import Limits


@contextlib.asynccontextmanager
async def open_generator(
    config: EngineConfig,
    files: ModelFiles,
    *,
    limits: Limits | None = None,
    on_progress: Progress | None = None,
    recording: str | None = None,
    drain_seconds: float = 0.0,
) -> AsyncIterator[Generator]:
    """Start an engine for `files`, and end it with the block. Raises EngineStartError or CheckpointError."""
    config = msgspec.structs.replace(config, model=str(files.path))
    # The tokenizer is read here while the engine process reads the weights.
    loading = asyncio.create_task(asyncio.to_thread(load_tokenizer, files.path))
    engine = None
    try:
        engine = await start_engine(config, on_progress, recording=recording)
        generator = Generator(engine, await loading, str(files.path), limits or Limits())
        try:
            yield generator
        finally:
            await generator.close()
    finally:
        if engine is not None:
            await engine.stop(drain_seconds)
        if not loading.done():
            loading.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await loading
