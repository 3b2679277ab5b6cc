"""Data parallelism: several engines of one model behind one front, each request on the one with the least to do."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator

import msgspec

from shoal.core.config import EngineConfig
from shoal.core.expert_load import ExpertLoad
from shoal.core.layout import Layout
from shoal.core.start_report import slowest
from shoal.core.types import EngineLoad, Output, Request
from shoal.serve.engine_client import EngineClient, EngineLost, EngineStartError, Progress
from shoal.serve.messages import EngineInfo, Step


class EngineGroup:
    """Looks like one EngineClient. An engine that is lost gets nothing more; the group is lost with its last engine."""

    def __init__(self) -> None:
        self._engines: list[EngineClient] = []
        self._unreported: list[int] = []
        """Requests sent to each engine since it last said what it has to do."""
        self._placed: dict[str, int] = {}

    @classmethod
    async def start(
        cls, config: EngineConfig, on_progress: Progress | None = None, *, recording: str | None = None
    ) -> EngineGroup:
        """All of them at once. Raises EngineStartError, with none left running."""
        group = cls()
        group._unreported = [0] * config.layout.dp
        starts = [
            asyncio.create_task(
                EngineClient.start(
                    _config_of(config, number),
                    on_progress if number == 0 else None,
                    on_step=group._reporter(number),
                    recording=recording if number == 0 or recording is None else f"{recording}.{number}",
                )
            )
            for number in range(config.layout.dp)
        ]
        try:
            group._engines = list(await asyncio.gather(*starts))
        except BaseException:
            await asyncio.gather(*(_abandon(start) for start in starts))
            raise
        return group

    def _reporter(self, number: int) -> _Reporter:
        return _Reporter(self._unreported, number)

    @property
    def info(self) -> EngineInfo:
        """Limits of one engine, the smallest of them; bytes and blocks of all."""
        infos = [engine.info for engine in self._engines]
        return msgspec.structs.replace(
            infos[0],
            num_blocks=sum(info.num_blocks for info in infos),
            max_len=min(info.max_len for info in infos),
            weight_bytes=sum(info.weight_bytes for info in infos),
            kv_bytes=sum(info.kv_bytes for info in infos),
            start=slowest([info.start for info in infos]),
        )

    @property
    def load(self) -> EngineLoad | None:
        """Every count summed over the engines."""
        loads = [engine.load for engine in self._engines if engine.load is not None]
        if not loads:
            return None
        names = EngineLoad.__struct_fields__
        return EngineLoad(**{name: sum(getattr(load, name) for load in loads) for name in names})

    @property
    def experts(self) -> list[ExpertLoad]:
        return [load for engine in self._engines for load in engine.experts]

    @property
    def lost(self) -> str | None:
        reasons = [engine.lost for engine in self._engines]
        return None if any(reason is None for reason in reasons) else reasons[0]

    @property
    def progress_at(self) -> float:
        """Of the busy engine that has gone longest without progress."""
        busy = [engine.progress_at for engine in self._engines if engine.num_streams and engine.lost is None]
        return min(busy, default=time.monotonic())

    @property
    def num_streams(self) -> int:
        return sum(engine.num_streams for engine in self._engines)

    @property
    def num_spares(self) -> int:
        return sum(engine.num_spares for engine in self._engines)

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """As EngineClient.generate, on the engine with the least to do."""
        number = self._least_loaded()
        self._unreported[number] += 1
        self._placed[request.id] = number
        outputs = self._engines[number].generate(request)
        try:
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]
            del self._placed[request.id]

    def abort(self, request_id: str, index: int | None = None) -> None:
        number = self._placed.get(request_id)
        if number is not None:
            self._engines[number].abort(request_id, index)

    async def stop(self, drain_seconds: float = 0.0) -> None:
        await asyncio.gather(*(engine.stop(drain_seconds) for engine in self._engines))

    def _least_loaded(self) -> int:
        """By sequences, then by prompt tokens that wait. Raises EngineLost if none is left."""

        def work(number: int) -> tuple[int, int, int]:
            load = self._engines[number].load
            sequences = 0 if load is None else load.num_running + load.num_waiting
            return sequences + self._unreported[number], 0 if load is None else load.num_waiting_tokens, number

        alive = [number for number, engine in enumerate(self._engines) if engine.lost is None]
        if not alive:
            raise EngineLost(self.lost or "every engine was lost")
        return min(alive, key=work)


class _Reporter:
    """Called with each step of one engine: what was sent to it is in its own report from then on."""

    def __init__(self, unreported: list[int], number: int) -> None:
        self._unreported = unreported
        self._number = number

    def __call__(self, step: Step) -> None:
        self._unreported[self._number] = 0


Engine = EngineClient | EngineGroup


async def start_engine(
    config: EngineConfig, on_progress: Progress | None = None, *, recording: str | None = None
) -> Engine:
    """As many engines as the layout's dp says. Raises EngineStartError."""
    if config.layout.dp == 1:
        return await EngineClient.start(config, on_progress, recording=recording)
    if config.launch.launcher == "env":
        raise EngineStartError("dp does not go with the env launcher: start one server a replica")
    return await EngineGroup.start(config, on_progress, recording=recording)


async def _abandon(start: asyncio.Task[EngineClient]) -> None:
    """Whether it came up or not, it shall not run."""
    start.cancel()
    result = (await asyncio.gather(start, return_exceptions=True))[0]
    if isinstance(result, EngineClient):
        await result.stop()


def _config_of(config: EngineConfig, number: int) -> EngineConfig:
    """One replica's share: its cores, or its devices."""
    layout, threads, device = config.layout, config.threads, config.device
    if threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // (layout.dp * layout.ranks))
    if device.startswith("cuda"):
        first = int(device.partition(":")[2] or 0)
        device = f"cuda:{first + number * layout.ranks}"
    alone = Layout(tp=layout.tp, pp=layout.pp, ep=layout.ep, cp=layout.cp)
    step_log = None if config.step_log is None else f"{config.step_log}/replica-{number}"
    return msgspec.structs.replace(config, layout=alone, threads=threads, device=device, step_log=step_log)
