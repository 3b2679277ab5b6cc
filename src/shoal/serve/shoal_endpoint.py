"""A shoal engine that the fleet starts itself, as an endpoint: one process, over its own wire."""

from __future__ import annotations

import time

import msgspec

from shoal.core.config import EngineConfig
from shoal.core.expert_load import ExpertLoad
from shoal.core.fleet_types import EndpointKind, EndpointReport
from shoal.core.types import EngineLoad
from shoal.serve.endpoint import Attempt, EndpointInfo, EndpointListener
from shoal.serve.engine_client import EngineClient, Progress
from shoal.serve.messages import EngineInfo, Step


class ShoalEndpoint:
    kind: EndpointKind = "shoal"

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        *,
        on_progress: Progress | None = None,
        recording: str | None = None,
    ) -> None:
        self.name = name
        self.config = config
        self.engine_info: EngineInfo
        """Of the last engine that was started; `info` is what the fleet needs of it."""
        self.info: EndpointInfo
        self._on_progress = on_progress
        self._recording = recording
        self._client: EngineClient | None = None
        self._listener: EndpointListener | None = None

    @property
    def address(self) -> str:
        return "not running" if self.pid is None else f"pid {self.pid}"

    @property
    def pid(self) -> int | None:
        return None if self._client is None or self._client.lost is not None else self._client.pid

    @property
    def load(self) -> EngineLoad | None:
        return None if self._client is None else self._client.load

    @property
    def experts(self) -> list[ExpertLoad]:
        return [] if self._client is None else self._client.experts

    @property
    def num_spares(self) -> int:
        return 0 if self._client is None else self._client.num_spares

    async def start(self, listener: EndpointListener) -> None:
        """Start the process and wait until the model is loaded; again after it was lost. Raises EngineStartError."""
        await self.stop()
        self._listener = listener
        client = await EngineClient.start(
            self.config, self._on_progress, on_step=self._reported, recording=self._recording
        )
        self._on_progress = None  # what is started anew is not waited for
        client.when_lost = lambda reason: listener.gone(self.name, reason)
        self._client = client
        self.engine_info = info = client.info
        # An engine that is started anew must be as long as requests were promised, however much memory is free by then.
        self.config = msgspec.structs.replace(self.config, max_len=info.max_len)
        self.info = EndpointInfo(
            max_len=info.max_len,
            vocab_size=info.spec.vocab_size,
            block_size=self.config.block_tokens,
            num_blocks=info.num_blocks,
            max_sequences=self.config.max_sequences,
            layout=f"{self.config.layout}",
            dtype=info.dtype,
            exact_resume=True,
        )

    def _reported(self, step: Step) -> None:
        if self._listener is None:
            return
        load = step.load
        self._listener.reported(
            self.name,
            EndpointReport(
                at=time.monotonic(),
                load=load,
                num_running=load.num_running,
                num_waiting=load.num_waiting,
                kv_usage=1 - load.num_free_blocks / load.num_blocks,
                steps=load.steps,
            ),
        )

    def submit(self, attempt: Attempt) -> None:
        if self._client is None:
            raise RuntimeError(f"{self.name} was not started")
        self._client.submit(attempt)

    def abort(self, request_id: str, index: int | None = None) -> None:
        if self._client is not None:
            self._client.abort(request_id, index)

    async def stop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.when_lost = lambda reason: None
            await client.stop()
