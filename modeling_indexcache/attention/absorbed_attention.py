"""Attention in the absorbed form of Multi-head Latent Attention, with gradient: to selected keys, or to all by a mask.

Legend: B batch, S new tokens, T key slots, H attention heads, C latent width, R RoPE width, K selected keys.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ...kernels.sparse_mla.sparse_mla import sparse_mla
from .attention_backends import TRITON_ATTENTION
from .inference_attention import chunks, joined, weight_chunks
from .key_visibility import KeyVisibility, selected_mask


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
    latents = share_latent_gradients(module, latents)
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
    return joined(outs, 1), joined(lses, 1)


def attend_absorbed_masked(
    module: Any,
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latents: torch.Tensor,
    visibility: KeyVisibility,
    topk_indices: torch.Tensor | None,
    dropout: float,
    want_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend to every visible key, or to the selected ones by a mask; cost S x T, for few queries.

    Scores and probabilities are fp32, or fp64 for fp64 inputs. Queries that see no key give zeros.

    Args:
        module: an `IndexCacheAttention`.
        q_nope: `[B, S, H, nope]`.
        q_rope: `[B, S, H, R]`, turned.
        latents: `[B, T, C + R]`.
        visibility: which keys each query may see.
        topk_indices: int32 `[B, S, K]`, or None.
        dropout: probability of dropping a weight.
        want_weights: return the weights.

    Returns:
        `[B, S, H, V]`, and the weights `[B, H, S, T]` that made it or None.
    """
    latents = share_latent_gradients(module, latents)
    to_latent, to_value = module._absorbed_weights(latents)
    batch, num_queries, heads, _ = q_nope.shape
    num_keys, rank = latents.shape[1], module.kv_lora_rank
    seen = visibility.for_keys(num_keys)
    keys = latents.to(torch.promote_types(latents.dtype, torch.float32))
    # Eager attention shows its weights as it uses them.
    weight_dtype = q_nope.dtype if module.config._attn_implementation == "eager" else keys.dtype
    outs, weights = [], []
    row_bytes = batch * heads * num_keys * keys.element_size()
    for first, last in weight_chunks(num_queries, row_bytes, want_weights):
        mask = seen.rows(first, last, num_keys)
        if topk_indices is not None:
            mask = mask & selected_mask(topk_indices[:, first:last], num_keys)
        q_latent = torch.einsum("bshn,hnc->bhsc", q_nope[:, first:last], to_latent)
        query = torch.cat((q_latent, q_rope[:, first:last].transpose(1, 2)), dim=-1).to(keys.dtype)
        # All heads share the keys: one product a row of the batch.
        scores = (query.flatten(1, 2) @ keys.transpose(1, 2)).unflatten(1, (heads, -1)) * module.scaling
        mask = mask.unsqueeze(1)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weight = F.softmax(scores, dim=-1).masked_fill(~mask, 0.0)
        weight = F.dropout(weight.to(weight_dtype), p=dropout, training=module.training)
        # What no query sees may be memory that nobody has written yet.
        values = keys[..., :rank].masked_fill(~mask.any(2).transpose(1, 2), 0.0)
        latent_out = (weight.flatten(1, 2).to(keys.dtype) @ values).unflatten(1, (heads, -1))
        outs.append(torch.einsum("bhsc,hvc->bshv", latent_out.to(q_nope.dtype), to_value))
        if want_weights:
            weights.append(weight)
    return joined(outs, 1), joined(weights, 2) if weights else None


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
