"""Attention to selected keys in the absorbed form of Multi-head Latent Attention, with gradient.

Legend: B batch, S new tokens, T key slots, H attention heads, C latent width, R RoPE width, K selected keys.
"""

from __future__ import annotations

from typing import Any

import torch

from ..kernels.sparse_mla import sparse_mla
from .attention_backends import TRITON_ATTENTION
from .inference_attention import chunks


def attend_absorbed(
    module: Any, q_nope: torch.Tensor, q_rope: torch.Tensor, latents: torch.Tensor, topk_indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the selected latents alone; cost S x K.

    Args:
        module: an `IndexCacheAttention`.
        q_nope: `[B, S, H, nope]`.
        q_rope: `[B, S, H, R]`, turned.
        latents: `[B, T, C + R]`.
        topk_indices: int32 `[B, S, K]`.

    Returns:
        `[B, S, H, V]` and lse `[B, S, H]`.

    Raises:
        TypeError: when the selection is merged (`MergedSelection`), which has no gradient.
    """
    if not isinstance(topk_indices, torch.Tensor):
        raise TypeError(
            f"attention with gradient takes a selection as a tensor of indices, not {type(topk_indices).__name__}: "
            "pass merge_selection=False to the full layer that made it"
        )
    to_latent, to_value = module._absorbed_weights(latents)
    batch, num_queries, heads, _ = q_nope.shape
    row_bytes = batch * heads * latents.shape[-1] * latents.element_size()
    outs, lses = [], []
    for first, last in chunks(num_queries, row_bytes):
        q_latent = torch.einsum("bshn,hnc->bshc", q_nope[:, first:last], to_latent)
        q_absorbed = torch.cat((q_latent, q_rope[:, first:last]), dim=-1)
        out, lse = sparse_mla(
            q_absorbed,
            latents,
            topk_indices[:, first:last],
            scale=module.scaling,
            value_dim=module.kv_lora_rank,
            allow_triton=module.config._attn_implementation == TRITON_ATTENTION,
        )
        outs.append(torch.einsum("bshc,hvc->bshv", out, to_value))
        lses.append(lse)
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, dim=1), torch.cat(lses, dim=1))
