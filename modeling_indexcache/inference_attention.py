"""Attention without gradient, streamed: queries, absorbed queries, outputs and their projection exist for one chunk of
tokens at a time, written where they are needed.

Legend: B batch, S new tokens, T key slots, H attention heads, C latent width, R RoPE width, K selected keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..kernels.absorbed_vector import absorb_queries, expand_values, takes_absorbed_vector
from ..kernels.rms_norm import latent_rows
from ..kernels.rotary import rotate, rotate_into
from ..kernels.sparse_mla import sparse_mla
from .attention_backends import TRITON_ATTENTION
from .few_token_linears import is_plain_linear, linears
from .key_visibility import KeyVisibility
from .latent_cache import append_latents

# Largest temporary of attention in bytes: masks and scores, or absorbed queries. Queries are taken in chunks that fit.
ATTENTION_BLOCK_BYTES = 128 * 2**20
# Chunks of more queries are multiples of this, which is what the sparse kernel launches at once.
CHUNK_MULTIPLE = 4096


def runs_streamed(module: Any, hidden_states: torch.Tensor, topk_indices: Any, run_indexer: bool) -> bool:
    """Whether `attend_streamed` serves this forward: no gradient, no eager attention, few tokens when compiled."""
    selects = (module.indexer is not None and run_indexer) or isinstance(topk_indices, torch.Tensor)
    dropout = module.config.attention_dropout if module.training else 0.0
    return (
        selects
        and not torch.is_grad_enabled()
        and (not torch.compiler.is_compiling() or _runs_vectors(module, hidden_states))
        and not torch.is_autocast_enabled(hidden_states.device.type)
        and module.config._attn_implementation != "eager"
        and not dropout
    )


def _runs_vectors(module: Any, hidden_states: torch.Tensor) -> bool:
    """Whether the kernels for one or two tokens serve, none of which writes into a view."""
    return (
        module.config._attn_implementation == TRITON_ATTENTION
        and is_plain_linear(module.kv_b_proj)
        and takes_absorbed_vector(hidden_states, module.kv_b_proj.weight)
    )


def attend_streamed(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    visibility: KeyVisibility,
    past_key_values: Cache | None,
    topk_indices: torch.Tensor | None,
    run_indexer: bool,
    return_all: bool,
    overwrite_input: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `IndexCacheAttention.forward` computes, with its arguments: the output and the selection that was used.

    `return_all` lets the indexer list the selection even when it is everything, `overwrite_input` lets the output
    take the memory of `hidden_states`.
    """
    config = module.config
    allow_triton = config._attn_implementation == TRITON_ATTENTION
    if config.q_lora_rank is None:
        queries_from, q_proj = hidden_states, module.q_proj
        kv = module.kv_a_proj_with_mqa(hidden_states)
    else:
        q_a, kv = linears(hidden_states, (module.q_a_proj, module.kv_a_proj_with_mqa), allow_triton)
        queries_from, q_proj = module.q_a_layernorm(q_a), module.q_b_proj
        del q_a
    latents = _latents(module, kv, position_embeddings, allow_triton)
    del kv
    if module.indexer is not None and run_indexer:
        topk_indices = module.indexer(
            hidden_states,
            queries_from,
            position_embeddings,
            visibility,
            past_key_values=past_key_values,
            return_all=return_all,
        )
    latents = append_latents(past_key_values, latents, module.layer_idx)
    if topk_indices is None:
        return _attend_to_all(module, queries_from, q_proj, position_embeddings, latents, visibility), None
    out = hidden_states if overwrite_input else None
    out = _attend_to_selected(
        module, queries_from, q_proj, position_embeddings, latents, topk_indices, allow_triton, out
    )
    return out, topk_indices


def _latents(
    module: Any, kv: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], allow_triton: bool
) -> torch.Tensor:
    """The rows to cache, `[B, S, C + R]`, of the projected `kv`."""
    norm = module.kv_a_layernorm
    interleaved = module.config.rope_interleave
    if "forward" in vars(norm) or norm._forward_hooks or norm._forward_pre_hooks:
        # Offloaded or watched: its weight may be elsewhere until it is called.
        latent, k_rope = kv.split([module.kv_lora_rank, module.rope_dim], dim=-1)
        return torch.cat((norm(latent), rotate(k_rope, *position_embeddings, interleaved)), dim=-1)
    return latent_rows(kv, norm.weight, norm.variance_epsilon, *position_embeddings, interleaved, allow_triton)


def _attend_to_all(
    module: Any,
    queries_from: torch.Tensor,
    q_proj: nn.Module,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    latents: torch.Tensor,
    visibility: KeyVisibility,
) -> torch.Tensor:
    """Dense attention, for sequences no longer than the selection."""
    batch, num_queries = queries_from.shape[:2]
    q = q_proj(queries_from).view(batch, num_queries, -1, module.head_dim)
    rotate_into(
        q[..., module.nope_dim :],
        q[..., module.nope_dim :],
        *position_embeddings,
        module.config.rope_interleave,
        module.config._attn_implementation == TRITON_ATTENTION,
    )
    q_nope, q_rope = q.split([module.nope_dim, module.rope_dim], dim=-1)
    out, _ = module._attend_expanded(q_nope, q_rope, latents, visibility, None, 0.0, False)
    return module.o_proj(out.flatten(2))


def _attend_to_selected(
    module: Any,
    queries_from: torch.Tensor,
    q_proj: nn.Module,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    latents: torch.Tensor,
    topk_indices: torch.Tensor,
    allow_triton: bool,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Absorbed form on the selected latents, chunk by chunk of queries, written to `out` if given."""
    to_latent, to_value = module._absorbed_weights()
    batch, num_queries = queries_from.shape[:2]
    heads, rank = to_latent.shape[0], module.kv_lora_rank
    if allow_triton and takes_absorbed_vector(queries_from, to_latent, to_value):
        (q,) = linears(queries_from, (q_proj,), allow_triton)
        q = q.view(batch, num_queries, heads, module.head_dim)
        absorbed = absorb_queries(q, to_latent, *position_embeddings, module.config.rope_interleave)
        few_out, _ = sparse_mla(absorbed, latents, topk_indices, scale=module.scaling, value_dim=rank)
        return linears(expand_values(few_out, to_value).flatten(2), (module.o_proj,), allow_triton)[0]
    row_bytes = batch * heads * latents.shape[-1] * latents.element_size()
    for first, last in chunks(num_queries, row_bytes):
        rows = batch * (last - first)
        q = q_proj(queries_from[:, first:last]).view(rows, heads, module.head_dim)
        absorbed = q.new_empty(rows, heads, rank + module.rope_dim)
        torch.bmm(q[..., : module.nope_dim].transpose(0, 1), to_latent, out=absorbed[..., :rank].transpose(0, 1))
        rotate_into(
            absorbed.view(batch, -1, *absorbed.shape[1:])[..., rank:],
            q.view(batch, -1, *q.shape[1:])[..., module.nope_dim :],
            *(angles[:, first:last] for angles in position_embeddings),
            module.config.rope_interleave,
            allow_triton,
        )
        latent_out, _ = sparse_mla(
            absorbed.view(batch, last - first, heads, -1),
            latents,
            topk_indices[:, first:last],
            scale=module.scaling,
            value_dim=rank,
            allow_triton=allow_triton,
        )
        values = q.new_empty(rows, heads, module.v_head_dim)
        latent_out = latent_out.view(rows, heads, rank).transpose(0, 1)
        torch.bmm(latent_out, to_value.transpose(1, 2), out=values.transpose(0, 1))
        projected = module.o_proj(values.view(batch, last - first, -1))
        if last - first == num_queries:
            return projected
        if out is None:
            out = projected.new_empty(batch, num_queries, projected.shape[-1])
        out[:, first:last] = projected
    assert out is not None
    return out


def chunks(num_rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """Ranges of rows whose temporaries stay within `ATTENTION_BLOCK_BYTES`."""
    step = max(1, ATTENTION_BLOCK_BYTES // max(1, row_bytes))
    if step > CHUNK_MULTIPLE:
        step -= step % CHUNK_MULTIPLE
    return [(first, min(first + step, num_rows)) for first in range(0, num_rows, step)] or [(0, 0)]
