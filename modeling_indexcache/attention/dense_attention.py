"""Attention to every visible key, or to the selected ones by a mask, in the form that costs less: S x T either way.

All forms of attention are called alike, by `(module, q, latents, selection, plan)`: an `IndexCacheAttention`; queries
`[B, S, H, nope]` and `[B, S, H, R]`, after RoPE; latents `[B, T, C + R]`; which keys were selected; what the forward
decided. Every one returns `[B, S, H, V]`, and what it knows besides.

Legend: B batch, S new tokens, T key slots, H attention heads, C latent width, R RoPE width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..eligibility import is_plain_block_fp8, is_plain_linear
from ..forward_plan import ForwardPlan
from ..selection import Selection
from .absorbed_attention import share_latent_gradients
from .absorbed_weights import absorbed_weights
from .attention_backends import EAGER_ATTENTION, TRITON_ATTENTION, eager_attention_forward
from .query_chunks import Queries, chunks, joined

# Attention functions that may be replaced by one on latents; any other was registered by the user.
_OWN = (EAGER_ATTENTION, "sdpa", TRITON_ATTENTION)


def attend_densely(
    module: Any, q: Queries, latents: torch.Tensor, selection: Selection, plan: ForwardPlan
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Masked attention: `[B, S, H, V]`, and the weights `[B, H, S, T]` where the plan returns them, or None."""
    absorbed = absorbed_is_cheaper(module, q[0].shape[1], latents.shape[1])
    return (attend_absorbed_masked if absorbed else attend_expanded)(module, q, latents, selection, plan)


def absorbed_is_cheaper(module: Any, num_queries: int, num_keys: int) -> bool:
    """Whether `num_queries` attend to `num_keys` latents with fewer products in the absorbed form.

    Expanding every latent to keys and values of each head costs once what it costs to absorb so many queries; each
    pair of query and key costs more in the latent space. So many queries expand, and the few of a decoding step
    absorb. Slots that are empty or padded count.
    """
    # Equal in a forward without a cache, whose length may be a symbol: no guard on it then.
    if num_queries == num_keys or module.config._attn_implementation not in _OWN:
        return False
    rank, rope, of_head = module.kv_lora_rank, module.rope_dim, module.nope_dim + module.v_head_dim
    expanded = num_keys * rank * of_head + num_queries * num_keys * (of_head + rope)
    absorbed = num_queries * rank * of_head + num_queries * num_keys * (2 * rank + rope)
    if not (is_plain_linear(module.kv_b_proj) or is_plain_block_fp8(module.kv_b_proj)):
        absorbed += rank * rank * of_head  # its weight is what it makes of a unit matrix
    return absorbed < expanded


def attend_expanded(
    module: Any, q: Queries, latents: torch.Tensor, selection: Selection, plan: ForwardPlan
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """On expanded heads, by the attention function of the backend."""
    batch, num_queries, heads, _ = q[0].shape
    num_keys = latents.shape[1]
    latent, k_rope = latents.split([module.kv_lora_rank, module.rope_dim], dim=-1)
    expanded = module.kv_b_proj(latent).view(batch, num_keys, heads, -1).transpose(1, 2)
    k_nope, value = expanded.split([module.nope_dim, module.v_head_dim], dim=-1)
    key = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, heads, -1, -1)), dim=-1)
    query = torch.cat(q, dim=-1).transpose(1, 2)
    attend, options = module.attention_function(plan.backend), {"scaling": module.scaling, "dropout": plan.dropout}
    is_triangle = plan.visibility.for_keys(num_keys).is_triangle and selection.listed is None
    if is_triangle and attend is not eager_attention_forward:
        # Without a mask the fastest kernel runs, and nothing of S x T is made.
        return attend(module, query, key, value, None, **options)[0], None
    outs, weights = [], []
    for first, last in _chunks(num_queries, batch * heads * num_keys * 4, plan):
        mask = plan.mask(selection, first, last, num_keys).unsqueeze(1).expand(batch, -1, -1, -1)
        out, weight = attend(module, query[:, :, first:last], key, value, mask, **options)
        outs.append(out)
        if plan.returns_weights and weight is not None:
            weights.append(weight)
    return joined(outs, 1), joined(weights, 2) if weights else None


def attend_absorbed_masked(
    module: Any, q: Queries, latents: torch.Tensor, selection: Selection, plan: ForwardPlan
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """On latents, for few queries; scores and probabilities are fp32, or fp64 for fp64 inputs.

    Queries that see no key give zeros.
    """
    q_nope, q_rope = q
    latents = share_latent_gradients(module, latents)
    to_latent, to_value = absorbed_weights(module, latents)
    batch, num_queries, heads, _ = q_nope.shape
    num_keys, rank = latents.shape[1], module.kv_lora_rank
    keys = latents.to(torch.promote_types(latents.dtype, torch.float32))
    # Eager attention shows its weights as it uses them.
    weight_dtype = q_nope.dtype if plan.backend == EAGER_ATTENTION else keys.dtype
    outs, weights = [], []
    for first, last in _chunks(num_queries, batch * heads * num_keys * keys.element_size(), plan):
        mask = plan.mask(selection, first, last, num_keys).unsqueeze(1)
        q_latent = torch.einsum("bshn,hnc->bhsc", q_nope[:, first:last], to_latent)
        query = torch.cat((q_latent, q_rope[:, first:last].transpose(1, 2)), dim=-1).to(keys.dtype)
        # All heads share the keys: one product a row of the batch.
        scores = (query.flatten(1, 2) @ keys.transpose(1, 2)).unflatten(1, (heads, -1)) * module.scaling
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weight = F.softmax(scores, dim=-1).masked_fill(~mask, 0.0)
        weight = F.dropout(weight.to(weight_dtype), p=plan.dropout, training=module.training)
        # What no query sees may be memory that nobody has written yet.
        values = keys[..., :rank].masked_fill(~mask.any(2).transpose(1, 2), 0.0)
        latent_out = (weight.flatten(1, 2).to(keys.dtype) @ values).unflatten(1, (heads, -1))
        outs.append(torch.einsum("bhsc,hvc->bshv", latent_out.to(q_nope.dtype), to_value))
        if plan.returns_weights:
            weights.append(weight)
    return joined(outs, 1), joined(weights, 2) if weights else None


def _chunks(num_queries: int, row_bytes: int, plan: ForwardPlan) -> list[tuple[int, int]]:
    """A single one where a gradient may be asked of the weights, which pieces put together are not."""
    return chunks(num_queries, 0 if plan.returns_weights and torch.is_grad_enabled() else row_bytes)
