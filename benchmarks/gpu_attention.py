"""Attention alone: one layer of the model over a cache that is larger than any cache of the card.

Shapes: S sequences, T tokens, M key/value heads, N query heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gpu_ceilings import timed
from gpu_engine import Engine
from gpu_report import Row
from shoal.engine.attention.base import AttentionBatch

if TYPE_CHECKING:
    from gpu_sections import Setting


def attention_rows(engine: Engine, setting: Setting) -> Any:
    scale, decoder = setting.scale, engine.worker.decoder
    assert decoder is not None
    section = f"Attention alone: {decoder.attention.name}"
    cases = [
        (f"decode, batch {scale.batch}, context {scale.batch_context:,}", scale.batch, scale.batch_context, 1),
        (f"decode, batch {scale.long_batch}, context {scale.long_context:,}", scale.long_batch, scale.long_context, 1),
        (f"prefill, {scale.chunk:,} tokens", 1, scale.chunk, scale.chunk),
    ]
    for what, sequences, context, queries in cases:
        yield _row(engine, setting, section, what, sequences, context, queries)


def _row(engine: Engine, setting: Setting, section: str, what: str, sequences: int, context: int, queries: int) -> Row:
    decoder, spec = engine.worker.decoder, engine.info.spec
    assert decoder is not None
    device, block = decoder.device, engine.config.block_size
    per = -(-context // block)
    n, m, d = spec.num_heads, spec.num_kv_heads, spec.head_dim
    cache = decoder.attention.allocate(1, sequences * per, block, m, d, decoder.kv_dtype, device)
    tables_SB = _tables(sequences, per, device)
    with torch.inference_mode():
        for sequence in range(sequences):
            _fill(decoder, cache, tables_SB[sequence : sequence + 1], context, m, d)
        batch = _batch(tables_SB, context, queries, block)
        q_TND = torch.randn(sequences * queries, n, d, device=device, dtype=decoder.dtype)
        timing = timed(lambda: decoder.attention.forward(cache, 0, q_TND, batch, scale=spec.scale), device)
    row = Row(section, what, 1e6 * timing.median, 1e6 * timing.low, 1e6 * timing.high, "µs")
    if setting.ceilings is not None:
        if queries == 1:
            moved = sequences * context * 2 * m * d * decoder.kv_dtype.itemsize
            row.limit, row.target = 1e6 * moved / setting.ceilings.copy_bandwidth, 0.85
        else:
            pairs = queries * (context - queries + (queries + 1) / 2)
            row.limit, row.target = 1e6 * 4 * n * d * pairs / setting.ceilings.rates["bfloat16"], 0.6
        row.least, row.target = True, None if setting.tiny else row.target
    return row


def _tables(sequences: int, per: int, device: torch.device) -> torch.Tensor:
    """Blocks of no order, as in an engine that has run for long."""
    generator = torch.Generator().manual_seed(3)
    return torch.randperm(sequences * per, generator=generator).view(sequences, per).int().to(device)


def _batch(tables_SB: torch.Tensor, context: int, queries: int, block: int) -> AttentionBatch:
    device, sequences = tables_SB.device, len(tables_SB)
    starts_S1 = torch.arange(sequences + 1, device=device, dtype=torch.int32) * queries
    lens_S = torch.full((sequences,), context, device=device, dtype=torch.int32)
    positions_Q = torch.arange(context - queries, context, device=device)
    slots = tables_SB[:, positions_Q // block] * block + positions_Q % block
    return AttentionBatch.causal(starts_S1, lens_S, tables_SB, slots.flatten().int())


def _fill(decoder: Any, cache: Any, table_1B: torch.Tensor, context: int, m: int, d: int) -> None:
    batch = _batch(table_1B, context, context, cache.block_size)
    k_TMD, v_TMD = (torch.randn(context, m, d, device=decoder.device, dtype=decoder.dtype) for _ in range(2))
    decoder.attention.write(cache, 0, k_TMD, v_TMD, batch)
