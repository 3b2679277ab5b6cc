"""The cache of multi-head latent attention: one row a token, keys and values of all heads at once.

A row is a latent and a rotated key. float8 (e4m3) and int8 are of the latent alone, with a scale for each token, found
as it is written; rotated keys, in which position is, stay bfloat16, as in DeepSeek's own form of it.

Shapes: K blocks of the cache, P tokens a block, S sequences, B blocks of a table, C of the latent, E of its rotated
key, L = C + E, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shoal.engine.attention.base import PagedKV

TOPS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The largest number of a precision that has scales."""
LEAST_SCALE = 1e-20
"""Of zeros alone too there is a scale that can be divided by."""


class LatentPages(NamedTuple):
    """One layer's: stored * scale is the latent."""

    latents_KPC: Tensor
    rotated_KPE: Tensor
    scales_KP: Tensor | None
    """float32; None where latents are not quantised."""


class LatentCache:
    """What portable and Triton attention to latents read, and portable attention writes."""

    num_kv_heads = 1

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        latent_dim: int,
        rotated_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`latent_dim` is C, `rotated_dim` E."""
        self.num_blocks, self.block_size = num_blocks, block_size
        self.row_dim = latent_dim + rotated_dim
        self.nbytes = num_layers * num_blocks * block_size * latent_bytes_per_token(latent_dim, rotated_dim, dtype)

        def zeros(*sizes: int, of: torch.dtype) -> Tensor:
            # Not empty, for the reason that portable attention gives.
            return torch.zeros((num_blocks, block_size, *sizes), dtype=of, device=device)

        is_scaled = dtype in TOPS

        def pages() -> LatentPages:
            rotated = zeros(rotated_dim, of=torch.bfloat16 if is_scaled else dtype)
            return LatentPages(zeros(latent_dim, of=dtype), rotated, zeros(of=torch.float32) if is_scaled else None)

        self.pages = [pages() for _ in range(num_layers)]

    def paged(self, layer: int) -> PagedKV | None:
        """No kernel but those of attention to latents writes here."""
        return None

    def store(self, layer: int, rows_T1L: Tensor, values_T1C: Tensor, slots_T: Tensor) -> None:
        """Rows of one step at `slots_T`, int64. Their values are part of them."""
        latents, rotated, scales = self.pages[layer]
        stored_TC, rotated_TE = rows_T1L[:, 0].tensor_split([latents.shape[2]], dim=1)
        if scales is not None:
            stored_TC, scales_T = quantized_latents(stored_TC, latents.dtype)
            scales.flatten()[slots_T] = scales_T
        _bits(latents).flatten(0, 1)[slots_T] = _bits(stored_TC.to(latents.dtype))
        rotated.flatten(0, 1)[slots_T] = rotated_TE.to(rotated.dtype)

    def gather(self, layer: int, tables_SB: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (S, B, P, 1, L) of whole blocks: the same rows, in float32 where they have scales."""
        latents, rotated, scales = self.pages[layer]
        found, keys = _bits(latents)[tables_SB].view(latents.dtype), rotated[tables_SB]
        if scales is not None:
            found, keys = found.float() * scales[tables_SB][..., None], keys.float()
        rows = torch.cat([found, keys], dim=-1)[..., None, :]
        return rows, rows


def quantized_latents(latent_TC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers of `dtype` (T, C) and their scales (T) in float32. Halves are rounded up, as the kernel rounds them."""
    top = TOPS[dtype]
    scales_T = (latent_TC.float().abs().amax(dim=1) / top).clamp(min=LEAST_SCALE)
    scaled = latent_TC.float() / scales_T[:, None]
    return ((scaled + 0.5).floor() if dtype == torch.int8 else scaled.clamp(-top, top)).to(dtype), scales_T


def latent_bytes_per_token(latent_dim: int, rotated_dim: int, dtype: torch.dtype) -> int:
    """Of one layer."""
    if dtype not in TOPS:
        return (latent_dim + rotated_dim) * dtype.itemsize
    return latent_dim * dtype.itemsize + rotated_dim * torch.bfloat16.itemsize + torch.float32.itemsize


def _bits(x: Tensor) -> Tensor:
    """torch does not index FP8."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
