"""transformers' continuous batching under the same load, where transformers can be imported."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

Mix = tuple[list[list[int]], list[int]]


def run_transformers(path: Path, device: str, load: Callable[[int], Mix], seconds: float) -> tuple[float | None, str]:
    """Output tokens a second, and what is to be said of it; None where it cannot run.

    Random weights of the same configuration, made on the device. `seconds`: after which it is given up.
    """
    sys.path.insert(0, str(Path(__file__).parent / "runners"))
    try:
        import transformers
        from transformers_runner import PAGE_SIZE, TransformersEngine
    except ImportError as error:
        return None, f"transformers is not here: {error}"
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    loaded = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    engine = TransformersEngine()
    on_cpu = torch.device(device).type == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(loaded, dtype=dtype, attn_implementation="sdpa")
    prompts, counts = load(config["vocab_size"])
    items = [{"prompt": prompt, "max_tokens": count} for prompt, count in zip(prompts, counts, strict=True)]
    pages = sum(-(-(len(prompt) + count) // PAGE_SIZE) for prompt, count in zip(prompts, counts, strict=True))
    engine.adopt(model.eval(), pages)
    result: dict[str, float] = {}
    problem: list[str] = []

    def run() -> None:
        try:
            engine.run(items[:2])
            result.update(seconds=engine.run(items)["seconds"])
        except Exception as error:  # whatever it is, the row says it
            problem.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    name = f"transformers {transformers.__version__}, sdpa"
    if "seconds" in result:
        return sum(counts) / result["seconds"], name
    return None, f"{name}: {problem[0] if problem else f'not done after {seconds:.0f} s'}"
