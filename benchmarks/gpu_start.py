"""From the start of a process to its first token, over a checkpoint of random weights that is written for it.

python benchmarks/gpu_start.py PATH DEVICE     the process that is timed: prints the second of its first token
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

SHARD_BYTES = 4 << 30


def start_seconds(path: Path, device: str, seconds: float) -> tuple[float | None, str]:
    """Writes the weights beside `path`/config.json; they are in the page cache then. `seconds`: to give up after."""
    written, took = write_checkpoint(path, device)
    began = time.monotonic()
    command = [sys.executable, __file__, str(path), device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return None, f"no token after {seconds:.0f} s"
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["it failed and said nothing"])[-1]
    answer = json.loads(done.stdout.splitlines()[-1])
    phases = ", ".join(f"{name} {value:.1f}" for name, value in answer["phases"])
    return answer["first_token_at"] - began, f"{written / 1e9:.1f} GB written in {took:.0f} s; {phases}"


def write_checkpoint(path: Path, device: str) -> tuple[int, float]:
    """Safetensors of the model's shapes in bfloat16: bytes, and seconds that it took."""
    import torch

    from shoal.checkpoint.resolve import load_spec
    from shoal.engine.random_weights import RandomWeights

    began = time.monotonic()
    source = RandomWeights(path, load_spec(path), torch.device(device), torch.bfloat16)
    shards: list[list[str]] = [[]]
    held = 0
    for name in source.names():
        size = 2 * torch.Size(source.shape(name)).numel()
        if held and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    total = 0
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header: dict[str, object] = {}
        offset = 0
        for name in names:
            shape = source.shape(name)
            size = 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
            files[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (path / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                tensor = source.tensor(name).to(torch.bfloat16).cpu().contiguous()
                tensor.view(torch.uint8).numpy().tofile(out)
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total, time.monotonic() - began


def main() -> None:
    from gpu_engine import Engine, config_of

    path, device = sys.argv[1:]
    config = config_of("bfloat16", model=path, device=device, max_len=256, max_sequences=8, prefix_caching=False)
    with Engine(config) as engine:
        engine.run([[17] * 16], [1])
        at = time.monotonic()
        phases = [(phase.name, phase.seconds) for phase in engine.info.start.phases]
        print(json.dumps({"first_token_at": at, "phases": phases}))


if __name__ == "__main__":
    main()
