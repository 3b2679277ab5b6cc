"""One decoder for the whole Llama-like family, by flags of ModelSpec; or the part of it that one rank holds.

Of a part the shapes are the same words for fewer: N and M are the rank's heads. Ranks of one stage hold parts of the
same layers and add up what each computed, once behind attention and once behind the MLP; stages hand on the residual
stream. Between attentions a rank has the tokens that are its own: all, or its share (`token_split`).

Shapes: T tokens of the batch, P of this rank's share of a context's, O own tokens of this rank, S rows that need
logits, H hidden, A fused query/key/value features, N query heads, M key/value heads, D head size, V vocabulary. Where
ranks split no context, P is T; where they split no tokens, O is P.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from shoal.core.config import WeightPrecision
from shoal.core.model_spec import ModelSpec
from shoal.core.quantization import QuantScheme
from shoal.core.sharding import ALIGNMENT, Shard, split_evenly, whole
from shoal.engine.attention.base import AttentionBackend, AttentionBatch, KVCache, ScaledKVCache, kv_bytes_per_token
from shoal.engine.attention.latent_cache import LatentCache, latent_bytes_per_token
from shoal.engine.checkpoint_shapes import check_shapes
from shoal.engine.comm.base import Comm, NullComm
from shoal.engine.context_parallel import TokenShares
from shoal.engine.latent_attention import LatentAttention
from shoal.engine.moe import MLP, Experts, MoEBlock, Summed, load_mlp
from shoal.engine.ops import Ops, PackedLinear
from shoal.engine.random_weights import RandomWeights
from shoal.engine.read_ahead import ReadAhead, ReadFigures
from shoal.engine.rope import cos_sin_table
from shoal.engine.token_split import token_split
from shoal.engine.weight_plan import WeightPlan
from shoal.engine.weight_reader import Fetch, WeightReader
from shoal.engine.weights import Part, TensorSource, WeightSource


class Layer:
    """Weights of one block. Norm weights are float32 with any `+ 1` folded in.

    With latent attention `latent` is all of it, and what other attention has is not set.
    """

    __slots__ = (
        "cos_sin_PD",
        "input_norm_H",
        "k_norm_D",
        "kv_scales",
        "latent",
        "mlp",
        "mlp_norm_H",
        "output",
        "post_attention_norm_H",
        "post_mlp_norm_H",
        "q_norm_D",
        "qkv",
        "window",
    )

    latent: LatentAttention | None
    qkv: PackedLinear
    output: PackedLinear
    mlp: MLP
    input_norm_H: Tensor
    mlp_norm_H: Tensor
    post_attention_norm_H: Tensor | None
    post_mlp_norm_H: Tensor | None
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    cos_sin_PD: Tensor
    window: int | None
    kv_scales: tuple[Tensor, Tensor] | None
    """Of an FP8 cache's keys and values, (M) each, where the checkpoint has them."""


class Decoder:
    def __init__(
        self,
        spec: ModelSpec,
        ops: Ops,
        attention: AttentionBackend,
        precision: WeightPrecision,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        max_len: int | None = None,
        shard: Shard | None = None,
        tensor: Comm | None = None,
        context: Comm | None = None,
        stages: Comm | None = None,
        quantize: QuantScheme | None = None,
    ) -> None:
        """`precision` is of the weights that are stored in floats and stay so, `quantize` what is made of the others.
        `dtype` is of activations, and of the KV cache unless `kv_dtype` is given.

        `max_len` bounds the positions that rotary tables are made for. `shard` is what this rank holds, None
        everything; `tensor` joins the ranks that hold parts of the same layers, `context` those that keep parts of the
        same sequences, `stages` those of a pipeline.
        """
        if spec.mla is not None and not attention.serves_latents:
            raise ValueError(f"latent attention is computed by portable or triton attention, not by {attention.name}")
        self.spec = spec
        self.ops = ops
        self.attention = attention
        self.precision = precision
        self.quantize = quantize
        self.device = device
        self.dtype = dtype
        self.kv_dtype = kv_dtype or dtype
        self.max_len = min(max_len or spec.max_len, spec.max_len)
        self.layers: list[Layer] = []
        self.experts: dict[int, Experts] = {}
        """Routed ones of this rank, by the number of the layer in the model."""
        self.num_weight_bytes = 0
        self.waited_seconds = 0.0
        """For the stage before this one, since the start."""
        self.shard = shard or whole(spec)
        self.tensor = tensor or NullComm()
        self.context = context or NullComm()
        self.stages = stages or NullComm()
        self.tokens = token_split(self.shard.expert_dispatch, self.tensor)

    # --- weights ----------------------------------------------------------------------------------------------------

    def load(
        self, source: WeightSource | RandomWeights, progress: Callable[[int, int], None] | None = None
    ) -> ReadFigures:
        """Read ahead, convert and pack, a layer at a time. `progress` is called with the bytes taken so far and all.

        Raises CheckpointError for a missing tensor, a wrong shape or a tensor that the model has no place for before
        anything is read.
        """
        check_shapes(source, self.spec)
        tables = self._angles()
        if isinstance(source, RandomWeights):  # made where they are wanted: there is nothing to read ahead
            made = self._reader(source, self.ops, self.device, None)
            self._build(made, tables)
            self.num_weight_bytes = made.num_bytes
            return ReadFigures(0, 0.0, 0.0)
        plan = WeightPlan(source)
        self._build(self._reader(source, cast("Ops", plan.ops), torch.device("meta"), plan.fetch), tables)
        extents = [[source.extent(part) for part in parts] for parts in plan.groups]
        with ReadAhead(extents, progress=progress) as ahead:
            planned = iter(plan.groups)

            def fetch(parts: list[Part]) -> list[Tensor]:
                if parts != next(planned):
                    raise RuntimeError(f"the model asks for other weights than it had planned: {parts}")
                return [source.decoded(part, data) for part, data in zip(parts, ahead.take(), strict=True)]

            reader = self._reader(source, self.ops, self.device, fetch)
            self._build(reader, tables)
            self.num_weight_bytes = reader.num_bytes
        return ahead.figures

    def _angles(self) -> dict[int | None, Tensor]:
        """Rotary tables by the window of the layers that use them; None is of all that have no table of their own."""
        spec = self.spec
        tables: dict[int | None, Tensor] = {None: cos_sin_table(spec.rope, spec.rope_dim, self.max_len).to(self.device)}
        if spec.rope_local is not None:
            tables[spec.window] = cos_sin_table(spec.rope_local, spec.rope_dim, self.max_len).to(self.device)
        return tables

    def _reader(self, source: TensorSource, ops: Ops, device: torch.device, fetch: Fetch | None) -> WeightReader:
        plus_one = self.spec.norm_plus_one
        return WeightReader(
            source,
            ops,
            self.precision,
            device=device,
            dtype=self.dtype,
            norm_plus_one=plus_one,
            fetch=fetch,
            stored=self.spec.quantization,
            quantize=self.quantize,
        )

    def _build(self, reader: WeightReader, tables: dict[int | None, Tensor]) -> None:
        """Everything that the reader's weights make. What it asks for, and in which order, does not depend on them."""
        spec = self.spec
        self.layers.clear()
        self.experts.clear()
        shard = self.shard
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        if shard.is_first or (shard.is_last and spec.tied_embeddings):
            self.embedding = reader.linear([(embedding, shard.vocab)])
        if shard.is_last:
            self.head = self.embedding if spec.tied_embeddings else reader.linear([(head, shard.vocab)])
            self.final_norm_H = reader.norm("model.norm.weight")
        for number in range(shard.layers.start, shard.layers.stop):
            window = spec.window if spec.is_windowed(number) else None
            layer = self._load_layer(reader, number, tables.get(window, tables[None]))
            layer.window = window
            self.layers.append(layer)

    def _load_layer(self, reader: WeightReader, number: int, cos_sin_PD: Tensor) -> Layer:
        spec, layer, prefix = self.spec, Layer(), f"model.layers.{number}."
        layer.cos_sin_PD = cos_sin_PD
        layer.latent = None
        if spec.mla is None:
            self._load_heads(reader, layer, prefix + "self_attn.")
        else:
            layer.latent = LatentAttention(reader, spec, spec.mla, number, self.shard, self.attention, cos_sin_PD)
        mlp = load_mlp(reader, spec, number, self.shard, self.tensor)
        layer.mlp = Summed(mlp, self.tokens) if mlp.contributes else mlp
        if isinstance(mlp, MoEBlock):
            self.experts[number] = mlp.experts
        layer.input_norm_H = reader.norm(prefix + "input_layernorm.weight")
        after_attention = reader.norm(prefix + "post_attention_layernorm.weight")
        if spec.sandwich_norms:
            # Gemma: the norm by this name comes after attention; the one before the MLP has a name of its own.
            layer.post_attention_norm_H = after_attention
            layer.mlp_norm_H = reader.norm(prefix + "pre_feedforward_layernorm.weight")
            layer.post_mlp_norm_H = reader.norm(prefix + "post_feedforward_layernorm.weight")
        else:
            layer.post_attention_norm_H = layer.post_mlp_norm_H = None
            layer.mlp_norm_H = after_attention
        return layer

    def _load_heads(self, reader: WeightReader, layer: Layer, attention: str) -> None:
        """Attention by heads, the rank's. `attention` is what its tensors' names begin with."""
        spec, d, shard = self.spec, self.spec.head_dim, self.shard
        query, kv = shard.heads.query.times(d), shard.heads.kv.times(d)
        projections = [(f"{attention}{name}_proj.", rows) for name, rows in (("q", query), ("k", kv), ("v", kv))]
        layer.qkv = reader.linear(
            [(name + "weight", rows) for name, rows in projections],
            [(name + "bias", rows) for name, rows in projections] if spec.qkv_bias else [],
        )
        has_bias = spec.output_bias and shard.adds_bias
        layer.output = reader.linear(
            [(attention + "o_proj.weight", None)],
            [(attention + "o_proj.bias", None)] if has_bias else [],
            columns=query,
        )
        layer.q_norm_D = reader.norm(attention + "q_norm.weight") if spec.qk_norm else None
        layer.k_norm_D = reader.norm(attention + "k_norm.weight") if spec.qk_norm else None
        layer.kv_scales = None
        if self.kv_dtype == torch.float8_e4m3fn:
            layer.kv_scales = reader.cache_scales(attention, shard.heads.kv, spec.num_kv_heads)

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache:
        spec, mla = self.spec, self.spec.mla
        if mla is not None:
            sizes = mla.kv_lora_rank, mla.qk_rope_head_dim
            return LatentCache(len(self.layers), num_blocks, block_size, *sizes, self.kv_dtype, self.device)
        cache = self.attention.allocate(
            len(self.layers),
            num_blocks,
            block_size,
            len(self.shard.heads.kv),
            spec.head_dim,
            self.kv_dtype,
            self.device,
        )
        for number, layer in enumerate(self.layers):
            if layer.kv_scales is not None:
                cast("ScaledKVCache", cache).set_scales(number, *layer.kv_scales)
        return cache

    def kv_bytes_per_token(self) -> int:
        """What this rank keeps of a token, in all its layers."""
        mla = self.spec.mla
        if mla is None:
            layer = kv_bytes_per_token(len(self.shard.heads.kv), self.spec.head_dim, self.kv_dtype)
        else:
            layer = latent_bytes_per_token(mla.kv_lora_rank, mla.qk_rope_head_dim, self.kv_dtype)
        return len(self.shard.layers) * layer

    # --- compute ----------------------------------------------------------------------------------------------------

    def forward(self, ids_T: Tensor, positions_T: Tensor, batch: AttentionBatch, cache: KVCache) -> Tensor | None:
        """Hidden states after the last norm, (T, H); None where a later stage has them.

        Ids and positions are int64 on the model's device.
        """
        spec, ops, layers = self.spec, self.ops, self.layers
        eps = spec.norm_eps
        shares = TokenShares(len(ids_T), self.context)
        positions_P, num_own = shares.own(positions_T), self.tokens.begin(shares.size)
        residual_OH = self._embed(shares.own(ids_T)) if self.shard.is_first else self._from_stage_before(num_own)
        x_OH = ops.rms_norm(residual_OH, layers[0].input_norm_H, eps)
        for number, layer in enumerate(layers):
            x_PH = self._attend(layer, number, self.tokens.gather(x_OH), positions_P, shares, batch, cache)
            x_OH = self.tokens.sum(x_PH)
            x_OH = ops.add_rms_norm_(x_OH, residual_OH, layer.mlp_norm_H, eps, layer.post_attention_norm_H)
            x_OH = layer.mlp.forward(x_OH)
            if number + 1 < len(layers):
                next_norm_H = layers[number + 1].input_norm_H
                x_OH = ops.add_rms_norm_(x_OH, residual_OH, next_norm_H, eps, layer.post_mlp_norm_H)
        last_norm_H = layers[-1].post_mlp_norm_H
        if self.shard.is_last:
            x_OH = ops.add_rms_norm_(x_OH, residual_OH, self.final_norm_H, eps, last_norm_H)
            return shares.all(self.tokens.gather(x_OH))
        if last_norm_H is not None:
            x_OH = ops.rms_norm(x_OH, last_norm_H, eps)
        self.stages.send(residual_OH.add_(x_OH), self.stages.rank + 1)
        return None

    def _embed(self, ids_T: Tensor) -> Tensor:
        """Of this rank's own tokens, (O, H)."""
        vocab = self.shard.vocab
        if len(vocab) == self.spec.vocab_size:
            x_TH = self.ops.embedding(ids_T, self.embedding)
        else:
            rows_T = ids_T - vocab.start
            foreign_T = (rows_T < 0) | (rows_T >= len(vocab))
            x_TH = self.ops.embedding(rows_T.masked_fill(foreign_T, 0), self.embedding)
            x_TH = self.tokens.sum(x_TH.masked_fill_(foreign_T[:, None], 0.0))
        return x_TH if self.spec.embedding_scale == 1.0 else x_TH.mul_(self.spec.embedding_scale)

    def _from_stage_before(self, num_own: int) -> Tensor:
        """The residual stream of this rank's own tokens: the ranks of both stages have the same ones."""
        residual_OH = torch.empty((num_own, self.spec.hidden_size), dtype=self.dtype, device=self.device)
        began = time.monotonic()
        self.stages.receive_(residual_OH, self.stages.rank - 1)
        self.waited_seconds += time.monotonic() - began
        return residual_OH

    def _attend(
        self,
        layer: Layer,
        number: int,
        x_PH: Tensor,
        positions_P: Tensor,
        shares: TokenShares,
        batch: AttentionBatch,
        cache: KVCache,
    ) -> Tensor:
        """This rank's contribution to its share, (P, H)."""
        if layer.latent is not None:
            latents = cast("LatentCache", cache)
            return layer.latent.forward(x_PH, positions_P, shares, batch, latents, number)
        spec, heads = self.spec, self.shard.heads
        n, m, d = len(heads.query), len(heads.kv), spec.head_dim
        qkv_PA = self.ops.linear(x_PH, layer.qkv)
        turn = positions_P, layer.cos_sin_PD, n, m, d, layer.q_norm_D, layer.k_norm_D, spec.norm_eps
        fused = self.ops.fused if self.context.size == 1 else None
        pages = None if fused is None else cache.paged(number)
        if fused is not None and pages is not None:
            fused.rope_write_(qkv_PA, *turn, pages, batch.slot_mapping_T)
            heads_TAD = qkv_PA.view(-1, n + 2 * m, d)
        else:
            self.ops.rope_(qkv_PA, *turn)
            heads_TAD = shares.all(qkv_PA).view(-1, n + 2 * m, d)
            self._write(heads_TAD[:, n : n + m], heads_TAD[:, n + m :], number, batch, cache)
        out_TND, lse_TN = self.attention.forward(
            cache,
            number,
            heads_TAD[:, :n],
            batch,
            scale=spec.scale,
            window=layer.window,
            need_lse=self.context.size > 1,
        )
        out_PND = shares.merge(out_TND, lse_TN)
        return self.ops.linear(out_PND.view(-1, n * d), layer.output)

    def _write(self, keys_TMD: Tensor, values_TMD: Tensor, number: int, batch: AttentionBatch, cache: KVCache) -> None:
        if batch.kept_T is not None:
            keys_TMD, values_TMD = keys_TMD[batch.kept_T], values_TMD[batch.kept_T]
        if len(keys_TMD):
            self.attention.write(cache, number, keys_TMD, values_TMD, batch)

    def logits(self, hidden_SH: Tensor) -> Tensor | None:
        """(S, V) in float32 on the first of the ranks that split the vocabulary, who draws; None on the others."""
        part_SV = self.ops.linear(hidden_SH, self.head).float()
        if self.tensor.size == 1:
            return part_SV
        if self.tensor.rank:
            self.tensor.send(part_SV, 0)
            return None
        parts = [part_SV]
        for rank, span in enumerate(split_evenly(self.spec.vocab_size, self.tensor.size, ALIGNMENT)[1:], 1):
            parts.append(self.tensor.receive_(part_SV.new_empty((len(hidden_SH), len(span))), rank))
        return torch.cat(parts, dim=1)
