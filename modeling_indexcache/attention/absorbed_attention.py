"""Attention to the selected latents alone, in the absorbed form of Multi-head Latent Attention, with gradient.

Legend: B batch, S new tokens, T key slots, H attention heads, C latent width, R RoPE width, K selected keys.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ...kernels.sparse_mla.sparse_mla import sparse_mla
from ..forward_plan import ForwardPlan
from ..selection import Selection
from .absorbed_weights import absorbed_weights
from .query_chunks import Queries, chunks, joined


def attend_absorbed(
    module: Any, q: Queries, latents: torch.Tensor, selection: Selection, plan: ForwardPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to what is listed; cost S x K. Called as the forms of `dense_attention.py`.

    Returns:
        `[B, S, H, V]` and lse `[B, S, H]`.

    Raises:
        TypeError: when the selection is merged (`MergedSelection`), which has no gradient.
    """
    q_nope, q_rope = q
    indices = selection.indices()
    latents = share_latent_gradients(module, latents)
    to_latent, to_value = absorbed_weights(module, latents)
    batch, num_queries, heads, _ = q_nope.shape
    row_bytes = batch * heads * latents.shape[-1] * latents.element_size()
    outs, lses = [], []
    for first, last in chunks(num_queries, row_bytes):
        q_latent = torch.einsum("bshn,hnc->bshc", q_nope[:, first:last], to_latent)
        q_absorbed = torch.cat((q_latent, q_rope[:, first:last]), dim=-1)
        out, lse = sparse_mla(
            q_absorbed,
            latents,
            indices[:, first:last],
            scale=module.scaling,
            value_dim=module.kv_lora_rank,
            allow_triton=plan.allow_triton,
        )
        outs.append(torch.einsum("bshc,hvc->bshv", out, to_value))
        lses.append(lse)
    return joined(outs, 1), joined(lses, 1)


def share_latent_gradients(module: Any, latents: torch.Tensor) -> torch.Tensor:
    """`latents [B, T, C + R]`, the gradient of whose first C entries is summed over processes that split the heads.

    Heads that read latents themselves leave a part of the gradient on each process. Where `kv_b_proj` expands latents
    it sums them, and of the last R entries transformers' plan for `kv_a_proj_with_mqa` does.
    """
    weight = getattr(module.kv_b_proj, "weight", None)
    if not (torch.is_grad_enabled() and latents.requires_grad and dist.is_available()):
        return latents
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not isinstance(weight, DTensor):
        return latents
    latent, k_rope = latents.split([module.kv_lora_rank, module.rope_dim], dim=-1)
    same = [Replicate()] * weight.device_mesh.ndim
    parts = [Partial() if placement.is_shard() else Replicate() for placement in weight.placements]
    whole = DTensor.from_local(latent, weight.device_mesh, same, run_check=False)
    return torch.cat((whole.to_local(grad_placements=parts), k_rope), dim=-1)
