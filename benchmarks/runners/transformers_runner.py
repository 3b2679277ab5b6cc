"""transformers: `generate` on one padded batch, or its continuous batching. Also the reference for greedy tokens.

Shapes: B sequences, L tokens of the longest prompt, G generated tokens, V vocabulary.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from protocol import Recorder, serve
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

PAGE_SIZE = 256
"""Tokens; transformers' own default."""
TIE = 1e-4
"""Two logits this close may come out in either order: both are right."""


class StepClock(StoppingCriteria):
    """Never stops anything: notes when each step of `generate` is done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.monotonic())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class TransformersEngine:
    def load(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options: `model` (directory), `dtype`, `continuous` (bool), `threads`, `kv_tokens` (of the cache)."""
        torch.set_num_threads(options["threads"])
        self._continuous = options["continuous"]
        self._num_pages = options["kv_tokens"] // PAGE_SIZE
        dtype = getattr(torch, options["dtype"])
        self._model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype, attn_implementation="sdpa")
        self._model.eval()
        self.run([{"prompt": [100], "max_tokens": 1}])
        return {"first_token_at": time.monotonic()}

    def adopt(self, model: Any, num_pages: int) -> None:
        """Run a model that is there already, by continuous batching, with so many pages of cache."""
        self._model, self._continuous, self._num_pages = model, True, num_pages

    def run(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return self._run_continuous(items) if self._continuous else self._run_padded(items)

    def _run_padded(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """One batch, padded on the left, that runs until the longest output is done."""
        longest = max(len(item["prompt"]) for item in items)
        ids_BL = torch.zeros(len(items), longest, dtype=torch.long)
        mask_BL = torch.zeros_like(ids_BL)
        for row, item in enumerate(items):
            ids_BL[row, longest - len(item["prompt"]) :] = torch.tensor(item["prompt"])
            mask_BL[row, longest - len(item["prompt"]) :] = 1
        config = GenerationConfig(
            max_new_tokens=max(item["max_tokens"] for item in items), do_sample=False, eos_token_id=None, pad_token_id=0
        )
        clock = StepClock()
        recorder = Recorder(items)
        out_BG = self._model.generate(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([clock]),
        )[:, longest:]
        for row, item in enumerate(items):
            for token, at in zip(out_BG[row, : item["max_tokens"]].tolist(), clock.times, strict=False):
                recorder.add(row, [token], at)
        return recorder.result()

    def _run_continuous(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        context = self._model.continuous_batching_context_manager(
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_SIZE, num_blocks=self._num_pages, allow_block_sharing=False
            ),
            timeout=30,
        )
        with context as manager:
            recorder = Recorder(items)
            for index, item in enumerate(items):
                manager.add_request(
                    item["prompt"], str(index), max_new_tokens=item["max_tokens"], record_timestamps=True
                )
            num_left = len(items)
            while num_left:
                output = manager.get_result(timeout=1)
                if output is None:
                    if not manager.is_running():
                        raise RuntimeError("the continuous batching thread ended")
                    continue
                if output.error is not None:
                    raise RuntimeError(output.error)
                if output.is_finished():
                    # perf_counter, which it stamps tokens with, is the monotonic clock on Linux.
                    for token, at in zip(output.generated_tokens, output.timestamps, strict=True):
                        recorder.add(int(output.request_id), [token], at)
                    num_left -= 1
        return recorder.result()

    def verify(self, sequences: list[dict[str, Any]]) -> list[dict[str, int]]:
        """How many tokens of each `output` are greedy after `prompt` and the output before them, in one forward pass.

        Teacher-forced, so a token that differs does not make all later ones differ. `ties`: not the reference's best,
        but within 1e-4 of it.
        """
        return [self._verify(sequence["prompt"], sequence["output"]) for sequence in sequences]

    def _verify(self, prompt: list[int], output: list[int]) -> dict[str, int]:
        with torch.inference_mode():
            ids_BL = torch.tensor([prompt + output[:-1]])
            logits_GV = self._model(ids_BL, use_cache=False, logits_to_keep=len(output)).logits[0].float()
        best_G = logits_GV.max(dim=1).values
        chosen_G = logits_GV.gather(1, torch.tensor(output)[:, None])[:, 0]
        gap_G = best_G - chosen_G
        equal, close = int((gap_G == 0).sum()), int(((gap_G > 0) & (gap_G <= TIE)).sum())
        return {"equal": equal, "ties": close, "different": len(output) - equal - close}

    def close(self) -> None:
        """The process ends, and everything with it."""


if __name__ == "__main__":
    serve(TransformersEngine())
