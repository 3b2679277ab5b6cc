"""vLLM's offline `LLM` class with the engine in its own process: its fastest form on a CPU.

`LLM.generate` hands out results only when all are done, so the runner calls the same `step` in the same loop itself and
notes when each token comes.
"""

from __future__ import annotations

import time
from typing import Any

from protocol import Recorder, serve
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind


class VLLMEngine:
    def load(self, options: dict[str, Any]) -> dict[str, Any]:
        self._engine = LLM(**options).llm_engine
        self._num_requests = 0
        self.run([{"prompt": [100], "max_tokens": 1}])
        return {"first_token_at": time.monotonic()}

    def run(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        first = self._num_requests
        self._num_requests += len(items)
        recorder = Recorder(items)
        for index, item in enumerate(items):
            sampling = SamplingParams(
                temperature=0.0,
                max_tokens=item["max_tokens"],
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            self._engine.add_request(str(first + index), {"prompt_token_ids": item["prompt"]}, sampling)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                recorder.add(int(output.request_id) - first, list(output.outputs[0].token_ids))
        return recorder.result()

    def close(self) -> None:
        """The process ends, and everything with it."""


if __name__ == "__main__":
    serve(VLLMEngine())
