"""Whole models on the kernels: logits as by the portable ops, and decode steps as a graph would replay them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.core.model_config import spec_from_config
from shoal.engine.attention.portable import PortableAttention
from shoal.engine.graphs import GraphedModel
from shoal.engine.kernels import is_interpreted, unavailable_reason
from shoal.engine.model import Decoder
from shoal.engine.ops import TorchOps
from shoal.engine.weights import open_weights
from tests.checkpoints import VOCAB, make_checkpoint
from tests.engine.paged import PagedRun
from tests.engine.test_graphs import FakeCapturer

CPU = torch.device("cpu")
if (reason := unavailable_reason(CPU)) is not None or not is_interpreted():
    pytest.skip(reason or "kernels are compiled here: these compare them on a CPU", allow_module_level=True)

from shoal.engine.attention.triton_backend import TritonAttention  # noqa: E402
from shoal.engine.attention.triton_latent import TritonLatentAttention  # noqa: E402
from shoal.engine.triton_ops import TritonOps  # noqa: E402


def load(path: Path, ops: Any, attention: Any) -> Decoder:
    spec = spec_from_config(json.loads((path / "config.json").read_text()))
    decoder = Decoder(spec, ops, attention, "float32", device=CPU)
    source = open_weights(path)
    decoder.load(source)
    source.close()
    return decoder


def prompts_of(*sizes: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCAB, (n,), generator=generator).tolist() for n in sizes]


# Norms around both halves, with weights minus one, and windows; norms of heads, and experts; latents, and groups.
@pytest.mark.parametrize(
    ("family", "attention"), [("gemma3_text", "triton"), ("qwen3_moe", "portable"), ("deepseek_v3", "portable")]
)
def test_logits_are_those_of_the_portable_ops(family: str, attention: str, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)
    ops = TritonOps(CPU, torch.float32)
    made = TritonAttention(processors=1) if attention == "triton" else PortableAttention()
    prompts = prompts_of(8, 5)
    runs = [
        PagedRun(load(path, TorchOps(CPU), PortableAttention()), 2),
        PagedRun(load(path, ops, made), 2),
    ]
    at = [0, 0]
    for sizes in [(6, 1), (1, 3), (1, 1)]:
        fed = {i: prompts[i][at[i] : at[i] + n] for i, n in enumerate(sizes)}
        expected, got = (run.extend(fed) for run in runs)
        for i, n in enumerate(sizes):
            at[i] += n
            torch.testing.assert_close(got[i], expected[i], atol=1e-4, rtol=1e-4)


def test_decodes_through_graphs_give_the_same_logits(tmp_path: Path) -> None:
    """Three sequences in a graph of four rows, which another step has used in between."""
    path = make_checkpoint("gemma3_text", tmp_path)
    decoder = load(path, TritonOps(CPU, torch.float32), TritonAttention(processors=1))
    prompts = prompts_of(4, 6, 5)
    plain, through = PagedRun(decoder, 3, num_blocks=12), PagedRun(decoder, 3, num_blocks=12)
    through.cache = decoder.new_cache(12 + 1, 16)
    through.decoder = GraphedModel(  # type: ignore[assignment]
        decoder, through.cache, FakeCapturer(), null_block=12, max_rows=4, max_context=64, limit_bytes=1000, device=CPU
    )
    through.decoder.device = CPU
    steps = [{i: prompt[:-3] for i, prompt in enumerate(prompts)}]
    steps += [{i: [prompt[-left]] for i, prompt in enumerate(prompts)} for left in (3, 2)]
    for step in steps:
        expected, got = plain.extend(step), through.extend(step)
        for i in step:
            torch.testing.assert_close(got[i], expected[i], atol=1e-5, rtol=1e-5)
    assert [size.rows for size in through.decoder.book.captured] == [4]  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["gemma3_text", "deepseek_v3"])
def test_chunks_through_graphs_give_the_same_logits(family: str, tmp_path: Path) -> None:
    """Chunks beside decodes in a graph of 12 tokens, whose padding is a chunk of none, of one and of several tokens."""
    path = make_checkpoint(family, tmp_path)
    spec = spec_from_config(json.loads((path / "config.json").read_text()))
    latents = None if spec.mla is None else spec.mla.kv_lora_rank
    attention = TritonAttention(processors=1) if latents is None else TritonLatentAttention(latents, processors=1)
    decoder = load(path, TritonOps(CPU, torch.float32), attention)
    prompts = prompts_of(9, 6, 12)
    plain, through = PagedRun(decoder, 3, num_blocks=12), PagedRun(decoder, 3, num_blocks=12)
    through.cache = decoder.new_cache(12 + 1, 16)
    capturer = FakeCapturer()
    book = GraphedModel(
        decoder,
        through.cache,
        capturer,
        null_block=12,
        max_rows=3,
        max_context=64,
        max_tokens=12,
        limit_bytes=1000,
        device=CPU,
    )
    through.decoder = book  # type: ignore[assignment]
    book.device = CPU  # type: ignore[attr-defined]
    at = [0, 0, 0]
    for sizes in [(7, 3, 0), (1, 1, 9), (1, 1, 3), (0, 1, 0)]:
        fed = {i: prompts[i][at[i] : at[i] + n] for i, n in enumerate(sizes) if n}
        expected, got = plain.extend(fed), through.extend(fed)
        for i, n in enumerate(sizes):
            at[i] += n
            if n:
                torch.testing.assert_close(got[i], expected[i], atol=1e-5, rtol=1e-5)
    assert {(size.rows, size.tokens) for size in book.book.captured} == {(3, 12), (1, None)}
    assert sum(graph.replays for graph in capturer.graphs) == 4
