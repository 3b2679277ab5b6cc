"""shoal: the loop of `shoal serve`'s engine process without the sockets around it. Ranks, if several, are processes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgspec
from protocol import Recorder, peak_rss_bytes, serve

from shoal.core.config import EngineConfig, SchedulerConfig
from shoal.core.engine_core import EngineCore
from shoal.core.types import Request, Sampling, WorkerFailure
from shoal.engine.executor import WorkerInfo, open_executor

FILL_EVERY = 8
"""Steps between two looks at the KV cache: looking costs time that would count as the engine's."""


class ShoalEngine:
    def load(self, options: dict[str, Any]) -> dict[str, Any]:
        self._config = msgspec.convert(options, EngineConfig)
        self._executor = open_executor(self._config)
        self._info: WorkerInfo = self._executor.start()
        self.run([{"prompt": [100], "max_tokens": 1}])
        info = self._info
        return {
            "first_token_at": time.monotonic(),
            "weight_bytes": info.weight_bytes,
            "rank_weight_bytes": info.rank_weight_bytes,
            "rank_peak_bytes": self._rank_peak_bytes(),
            "kv_bytes": info.kv_bytes,
            "kind": f"{info.ops} arithmetic, {info.attention} attention",
        }

    def run(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        config, info = self._config, self._info
        core = EngineCore(
            SchedulerConfig(
                num_blocks=info.num_blocks,
                max_len=info.max_len,
                vocab_size=info.spec.vocab_size,
                block_size=config.block_tokens,
                max_sequences=config.max_sequences,
                max_batch_tokens=config.max_batch_tokens,
                depth=max(config.depth, config.layout.pp),
                stages=config.layout.pp,
                prefix_caching=config.prefix_caching,
            )
        )
        live_tokens = allocated_tokens = peak_tokens = steps = 0
        recorder = Recorder(items)
        for index, item in enumerate(items):
            rejected = core.add(_request(index, item), time.monotonic())
            if rejected is not None:
                raise RuntimeError(f"request {index} was rejected: {rejected.reason}")
        pending: list[int] = []
        while core.has_work():
            while (plan := core.plan(time.monotonic())) is not None:
                self._executor.submit(plan)
                pending.append(plan.plan_id)
            if steps % FILL_EVERY == 0:
                load = core.load()
                allocated = (load.num_blocks - load.num_free_blocks) * config.block_tokens
                live_tokens += load.num_live_tokens
                allocated_tokens += allocated
                peak_tokens = max(peak_tokens, allocated)
            result = self._executor.poll()
            if isinstance(result, WorkerFailure):
                raise RuntimeError(f"the step failed: {result.message}")
            if result is None:
                raise RuntimeError("the engine has work but planned no step")
            for output in core.commit(pending.pop(0), result, time.monotonic()):
                recorder.add(int(output.request_id), output.token_ids)
            steps += 1
        return recorder.result(
            steps=steps,
            kv_fill=live_tokens / max(allocated_tokens, 1),
            kv_peak_bytes=info.kv_bytes * peak_tokens // (info.num_blocks * config.block_tokens),
        )

    def _rank_peak_bytes(self) -> list[int]:
        """Of every rank's process; one rank is in this one."""
        if self._config.layout.ranks == 1:
            return [peak_rss_bytes(os.getpid())]
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return [peak_rss_bytes(int(pid)) for pid in children]

    def close(self) -> None:
        self._executor.stop()


def _request(index: int, item: dict[str, Any]) -> Request:
    return Request(
        id=str(index), prompt=item["prompt"], max_tokens=item["max_tokens"], sampling=Sampling(temperature=0.0)
    )


if __name__ == "__main__":
    serve(ShoalEngine())
