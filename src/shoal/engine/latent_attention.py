"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): all heads' KV is one latent a token.

The latent, and beside it a rotated key that all heads share, is what the cache keeps. Keys and values are never
expanded: what would expand a head's keys is applied to its queries, what would expand its values to its output, which
is the same product in another order. What remains in between is attention with one key/value head, whose keys are the
cached rows and whose values are those rows again, less their rotated part. Portable attention computes it in torch, on
any device, and Triton attention on a GPU, so results are the same in every batch up to rounding, not bit for bit.

Shapes: T tokens, P of this rank's share of them, H hidden, N query heads of this rank, Q size of a head's part without
position, D of its rotated part, A = Q + D, V of a head's values, C of the latent, L = C + D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.core.model_spec import MLASpec, ModelSpec
from shoal.core.sharding import Shard
from shoal.engine.attention.base import AttentionBackend, AttentionBatch
from shoal.engine.attention.latent_cache import LatentCache
from shoal.engine.context_parallel import TokenShares
from shoal.engine.ops import PackedLinear
from shoal.engine.weight_reader import NamedRows, WeightReader

_NORM_EPS = 1e-6
"""Of the norms of both low ranks, whatever the model's is: the reference leaves them at their default."""


class LatentAttention:
    """One layer's. Heads of several ranks read the same latents, which each of them computes and keeps."""

    def __init__(
        self,
        reader: WeightReader,
        spec: ModelSpec,
        mla: MLASpec,
        number: int,
        shard: Shard,
        attention: AttentionBackend,
        cos_sin_PD: Tensor,
    ) -> None:
        """Read the weights of layer `number`. `cos_sin_PD` holds [cos | sin] of each position's D/2 angles."""
        self._ops = reader.ops
        self._attention = attention
        self._mla = mla
        self._scale = spec.scale
        self._cos_sin_PD = cos_sin_PD
        prefix, heads = f"model.layers.{number}.self_attn.", shard.heads.query

        def bias(name: str, wanted: bool) -> list[NamedRows]:
            return [(f"{prefix}{name}.bias", None)] if wanted else []

        queries = heads.times(mla.qk_head_dim)
        self._q_down: PackedLinear | None = None
        self._q_norm: Tensor | None = None
        if mla.q_lora_rank is not None:
            self._q_down = reader.linear([(prefix + "q_a_proj.weight", None)], bias("q_a_proj", spec.qkv_bias))
            self._q_norm = reader.norm(prefix + "q_a_layernorm.weight")
        self._q = reader.linear([(prefix + _query_name(mla), queries)])
        self._kv_down = reader.linear(
            [(prefix + "kv_a_proj_with_mqa.weight", None)], bias("kv_a_proj_with_mqa", spec.qkv_bias)
        )
        self._kv_norm_C = reader.norm(prefix + "kv_a_layernorm.weight")
        plain_dim = mla.qk_nope_head_dim
        expand = reader.matrix(prefix + "kv_b_proj.weight", heads.times(plain_dim + mla.v_head_dim))
        expand = expand.view(len(heads), -1, mla.kv_lora_rank)
        self._keys_NQC, self._values_NCV = expand[:, :plain_dim], expand[:, plain_dim:].transpose(1, 2)
        self._output = reader.linear(
            [(prefix + "o_proj.weight", None)],
            bias("o_proj", spec.output_bias and shard.adds_bias),
            columns=heads.times(mla.v_head_dim),
        )

    def forward(
        self,
        x_PH: Tensor,
        positions_P: Tensor,
        shares: TokenShares,
        batch: AttentionBatch,
        cache: LatentCache,
        layer: int,
    ) -> Tensor:
        """This rank's contribution to its share of the tokens, (P, H). `layer` is the cache's number of this layer."""
        ops, mla = self._ops, self._mla
        latent_dim, interleaved = mla.kv_lora_rank, mla.interleaved_rope
        cos_sin_P1D = self._cos_sin_PD[positions_P][:, None]
        down_PL = ops.linear(x_PH, self._kv_down)
        latent_PC = ops.rms_norm(down_PL[:, :latent_dim], self._kv_norm_C, _NORM_EPS)
        key_P1D = _rotated(down_PL[:, None, latent_dim:], cos_sin_P1D, interleaved)
        kv_P1L = torch.cat([latent_PC[:, None], key_P1D], dim=2)

        low = x_PH
        if self._q_norm is not None:
            low = ops.rms_norm(ops.linear(x_PH, self._q_down), self._q_norm, _NORM_EPS)
        heads_PNA = ops.linear(low, self._q).view(len(x_PH), -1, mla.qk_head_dim)
        absorbed_PNC = _by_head(heads_PNA[..., : mla.qk_nope_head_dim], self._keys_NQC)
        turned_PND = _rotated(heads_PNA[..., mla.qk_nope_head_dim :], cos_sin_P1D, interleaved)
        q_PNL = torch.cat([absorbed_PNC, turned_PND], dim=2)

        rows = shares.all(torch.cat([kv_P1L, q_PNL], dim=1))
        kept = rows[:, :1] if batch.kept_T is None else rows[batch.kept_T, :1]
        if len(kept):
            self._attention.write(cache, layer, kept, kept[..., :latent_dim], batch)
        out_TNL, lse_TN = self._attention.forward(cache, layer, rows[:, 1:], batch, scale=self._scale, need_lse=True)
        out_PNV = _by_head(shares.merge(out_TNL[..., :latent_dim], lse_TN), self._values_NCV)
        return ops.linear(out_PNV.flatten(1), self._output)


def _by_head(x_TNA: Tensor, weight_NAB: Tensor) -> Tensor:
    """Each head by its own matrix: (T, N, A) by (N, A, B) is (T, N, B)."""
    return torch.bmm(x_TNA.transpose(0, 1), weight_NAB).transpose(0, 1)


def _rotated(x_TND: Tensor, cos_sin_T1D: Tensor, interleaved: bool) -> Tensor:
    """Pairs turned by their angles, computed in float32: neighbours are a pair, or else one of each half.

    The result has first numbers of all pairs, then second ones: queries and keys agree, which is all that counts.
    """
    cos, sin = cos_sin_T1D.chunk(2, dim=-1)
    x = x_TND.float()
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_TND.dtype)


def _query_name(mla: MLASpec) -> str:
    return "q_proj.weight" if mla.q_lora_rank is None else "q_b_proj.weight"


def latent_shapes(spec: ModelSpec, mla: MLASpec, number: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of layer `number`'s attention in a checkpoint."""
    prefix, hidden, heads = f"model.layers.{number}.self_attn.", spec.hidden_size, spec.num_heads
    shapes: dict[str, tuple[int, ...]] = {
        _query_name(mla): (heads * mla.qk_head_dim, mla.q_lora_rank or hidden),
        "kv_a_proj_with_mqa.weight": (mla.latent_dim, hidden),
        "kv_a_layernorm.weight": (mla.kv_lora_rank,),
        "kv_b_proj.weight": (heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank),
        "o_proj.weight": (hidden, heads * mla.v_head_dim),
    }
    if mla.q_lora_rank is not None:
        shapes |= {"q_a_proj.weight": (mla.q_lora_rank, hidden), "q_a_layernorm.weight": (mla.q_lora_rank,)}
    if spec.qkv_bias:
        shapes["kv_a_proj_with_mqa.bias"] = (mla.latent_dim,)
        if mla.q_lora_rank is not None:
            shapes["q_a_proj.bias"] = (mla.q_lora_rank,)
    if spec.output_bias:
        shapes["o_proj.bias"] = (hidden,)
    return {prefix + name: shape for name, shape in shapes.items()}
