"""Attention without gradient, streamed: queries, absorbed queries, outputs and their projection exist for one chunk of
tokens at a time, written where they are needed.

Legend: B batch, S new tokens, T key slots, H attention heads, C latent width, R RoPE width, K selected keys.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from ...kernels.norm_rope_linear.absorbed_vector import absorb_queries, expand_values, takes_absorbed_vector
from ...kernels.norm_rope_linear.cache_slot import CacheSlot
from ...kernels.norm_rope_linear.rms_norm import latent_rows
from ...kernels.norm_rope_linear.rotary import rotate, rotate_into
from ...kernels.sparse_mla.merged_selection import MergedSelection
from ...kernels.sparse_mla.sparse_mla import merging_group, sparse_mla, takes_sparse_mla
from ...kernels.sparse_mla.sparse_mla_triton import queries_per_wave, selection_group
from ..cache.latent_cache import append_latents, latent_slot
from ..eligibility import say_slower, why_not_streamed, works_in_place
from ..layers.block_fp8_modules import is_plain_block_fp8
from ..layers.few_token_linears import is_plain_linear, is_plain_norm, linears
from ..parallel.module_hooks import is_own, is_watched, is_wrapped
from .attention_backends import TRITON_ATTENTION
from .attention_form import absorbed_is_cheaper
from .key_visibility import KeyVisibility, listed_width

# Largest temporary of attention in bytes: masks and scores, or absorbed queries. Queries are taken in chunks that fit.
ATTENTION_BLOCK_BYTES = 128 * 2**20
# The same of the sparse kernels' absorbed queries on a GPU, where longer chunks waste less at their ends.
SPARSE_BLOCK_BYTES = 320 * 2**20


def runs_streamed(module: Any, hidden_states: torch.Tensor) -> bool:
    """Whether `attend_streamed` serves this forward: no gradient, no eager attention, few tokens when compiled."""
    reason = why_not_streamed(module, hidden_states)
    if reason is not None:
        say_slower(module, hidden_states, "attention makes queries and outputs of all tokens at once", reason)
    return reason is None


def attend_streamed(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    visibility: KeyVisibility,
    past_key_values: Cache | None,
    topk_indices: torch.Tensor | MergedSelection | None,
    run_indexer: bool,
    return_all: bool = False,
    input_norm: nn.Module | None = None,
    residual: torch.Tensor | None = None,
    overwrite_residual: bool = False,
    merge_selection: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | MergedSelection | None]:
    """What `IndexCacheAttention.forward` computes, with its arguments: the output and the selection that was used.

    `return_all` lets the indexer list the selection even when it is everything.
    """
    config = module.config
    allow_triton = config._attn_implementation == TRITON_ATTENTION
    indexer = module.indexer if run_indexer else None
    # What a norm makes is memory of nobody else's, free as soon as everything that reads it is made. Where linear
    # layers alone read it, the norm is theirs.
    normed, q_norm = hidden_states, None
    if input_norm is not None and (indexer is not None or config.q_lora_rank is None):
        normed, input_norm = input_norm(hidden_states), None
    if config.q_lora_rank is None:
        queries_from, q_proj = normed, module.q_proj
        kv = module.kv_a_proj_with_mqa(normed)
    else:
        projections = module.q_a_proj, module.kv_a_proj_with_mqa
        queries_from, kv = linears(normed, projections, allow_triton, norm=input_norm)
        q_proj, q_norm = module.q_b_proj, module.q_a_layernorm
        if indexer is not None or not is_own(q_norm) or is_wrapped(q_norm) or is_watched(q_norm):
            queries_from, q_norm = q_norm(queries_from), None
    slot = latent_slot(past_key_values, module.layer_idx)
    latents = _latents(module, kv, position_embeddings, allow_triton, slot)
    del kv
    choose = None
    if indexer is not None and (return_all or not works_in_place(indexer, normed)):
        topk_indices = indexer(
            normed,
            queries_from,
            position_embeddings,
            visibility,
            past_key_values=past_key_values,
            return_all=return_all,
        )
    elif indexer is not None:
        index_keys = indexer.append_keys(normed, position_embeddings, past_key_values)
        topk_indices = None
        if not indexer.selects_all(index_keys):
            weights, slots = indexer.head_weights(normed), index_keys.shape[1]
            group = _merging_group(module, normed, slots) if merge_selection and allow_triton else 1
            choose = partial(indexer.choose, queries_from, weights, index_keys, position_embeddings, visibility, group)
    del normed
    if slot is None:
        latents = append_latents(past_key_values, latents, module.layer_idx)
    if choose is not None:
        topk_indices = choose()
    queries = _Queries(queries_from, q_norm, q_proj, position_embeddings)
    if topk_indices is None:
        out = _attend_to_all(module, queries, latents, visibility, allow_triton, residual, overwrite_residual)
        return out, None
    out = _attend_to_selected(module, queries, latents, topk_indices, allow_triton, residual, overwrite_residual)
    return out, topk_indices


def _merging_group(module: Any, like: torch.Tensor, slots: int) -> int:
    heads, rank = module.config.num_attention_heads, module.kv_lora_rank
    topk = module.config.index_topk
    return merging_group(like, heads, rank + module.rope_dim, rank, like.shape[1], topk, slots)


def _latents(
    module: Any,
    kv: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    allow_triton: bool,
    slot: CacheSlot | None,
) -> torch.Tensor:
    """The rows to cache, `[B, S, C + R]`, of the projected `kv`; written to the `slot` if given, then all rows."""
    norm = module.kv_a_layernorm
    interleaved = module.config.rope_interleave
    if not is_plain_norm(norm):
        # Offloaded, watched or another module: its weight may be elsewhere until it is called, or there is none.
        latent, k_rope = kv.split([module.kv_lora_rank, module.rope_dim], dim=-1)
        rows = torch.cat((norm(latent), rotate(k_rope, *position_embeddings, interleaved)), dim=-1)
        return rows if slot is None else slot.write(rows)
    return latent_rows(kv, norm.weight, norm.variance_epsilon, *position_embeddings, interleaved, allow_triton, slot)


class _Queries(NamedTuple):
    """What queries are made of: `proj(norm(x))` of `x [B, S, width]`, turned by `angles`, each `[B or 1, S, R]`."""

    x: torch.Tensor
    norm: nn.Module | None
    proj: nn.Module
    angles: tuple[torch.Tensor, torch.Tensor]

    def projected(self, first: int, last: int) -> torch.Tensor:
        """Queries `first` to `last`, before they are turned, `[B, last - first, H head_dim]`."""
        part = self.x[:, first:last]
        return self.proj(part if self.norm is None else self.norm(part))


def _attend_to_all(
    module: Any,
    queries: _Queries,
    latents: torch.Tensor,
    visibility: KeyVisibility,
    allow_triton: bool,
    residual: torch.Tensor | None,
    overwrite_residual: bool,
) -> torch.Tensor:
    """Dense attention, for sequences no longer than the selection: of few queries as to a selection of all keys."""
    batch, num_queries = queries.x.shape[:2]
    num_keys = latents.shape[1]
    if allow_triton and _lists_every_key(module, latents, num_queries):
        every_index = visibility.every_listed_index(num_queries, num_keys, batch)
        return _attend_to_selected(module, queries, latents, every_index, True, residual, overwrite_residual)
    q = queries.projected(0, num_queries).view(batch, num_queries, -1, module.head_dim)
    rotate_into(
        q[..., module.nope_dim :],
        q[..., module.nope_dim :],
        *queries.angles,
        module.config.rope_interleave,
        allow_triton,
    )
    q_nope, q_rope = q.split([module.nope_dim, module.rope_dim], dim=-1)
    attended, _ = module._attend_densely(q_nope, q_rope, latents, visibility, None, 0.0, False)
    out = module.o_proj(attended.flatten(2))
    if residual is None:
        return out
    return residual.add_(out) if overwrite_residual else residual + out


def _lists_every_key(module: Any, latents: torch.Tensor, num_queries: int) -> bool:
    """Whether the sparse kernels attend to all of `latents [B, T, C + R]` for less than expanding them costs."""
    heads, num_keys = module.config.num_attention_heads, latents.shape[1]
    return absorbed_is_cheaper(module, num_queries, num_keys) and takes_sparse_mla(
        latents, heads, module.kv_lora_rank, listed_width(num_keys)
    )


def _attend_to_selected(
    module: Any,
    queries: _Queries,
    latents: torch.Tensor,
    topk_indices: torch.Tensor | MergedSelection,
    allow_triton: bool,
    residual: torch.Tensor | None,
    overwrite_residual: bool,
) -> torch.Tensor:
    """Absorbed form on the selected latents, chunk by chunk of queries, added to `residual` if given."""
    to_latent, to_value = module._absorbed_weights(latents)
    batch, num_queries = queries.x.shape[:2]
    heads, rank = to_latent.shape[0], module.kv_lora_rank
    if allow_triton and takes_absorbed_vector(queries.x, to_latent, to_value):
        (q,) = linears(queries.x, (queries.proj,), allow_triton, norm=queries.norm)
        q = q.view(batch, num_queries, heads, module.head_dim)
        absorbed = absorb_queries(q, to_latent, *queries.angles, module.config.rope_interleave)
        few_out, _ = sparse_mla(absorbed, latents, topk_indices, scale=module.scaling, value_dim=rank)
        values = expand_values(few_out, to_value).flatten(2)
        return linears(values, (module.o_proj,), allow_triton, base=residual)[0]
    out = residual
    if out is None:
        out = queries.x.new_empty(batch, num_queries, module.config.hidden_size)
    elif not overwrite_residual:
        out = out.clone()
    for first, last in _sparse_chunks(heads, num_queries, latents, topk_indices, allow_triton):
        rows = batch * (last - first)
        q = queries.projected(first, last).view(rows, heads, module.head_dim)
        absorbed = q.new_empty(rows, heads, rank + module.rope_dim)
        torch.bmm(q[..., : module.nope_dim].transpose(0, 1), to_latent, out=absorbed[..., :rank].transpose(0, 1))
        rotate_into(
            absorbed.view(batch, -1, *absorbed.shape[1:])[..., rank:],
            q.view(batch, -1, *q.shape[1:])[..., module.nope_dim :],
            *(angles[:, first:last] for angles in queries.angles),
            module.config.rope_interleave,
            allow_triton,
        )
        del q
        latent_out, _ = sparse_mla(
            absorbed.view(batch, last - first, heads, -1),
            latents,
            _of_queries(topk_indices, first, last),
            scale=module.scaling,
            value_dim=rank,
            allow_triton=allow_triton,
        )
        del absorbed
        values = latent_out.new_empty(rows, heads, module.v_head_dim)
        latent_out = latent_out.view(rows, heads, rank).transpose(0, 1)
        torch.bmm(latent_out, to_value.transpose(1, 2), out=values.transpose(0, 1))
        _project(module.o_proj, values.view(batch, last - first, -1), out[:, first:last], residual is not None)
    return out


def _project(o_proj: nn.Module, values: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    """`out = o_proj(values)`, or `out += o_proj(values)`, of `values [B, S, H V]`."""
    weight: Any = o_proj.weight if is_plain_linear(o_proj) and o_proj.bias is None else None
    if weight is not None and out.shape[0] == 1 and out.dtype == weight.dtype:
        rows, into = values[0], out[0]
        torch.addmm(into, rows, weight.t(), beta=int(add), out=into)
    elif is_plain_block_fp8(o_proj) and o_proj.bias is None and out.shape[0] == 1 and out.dtype == values.dtype:
        o_proj.multiply_into(values[0], out[0], add)  # type: ignore[operator]
    elif add:
        out += o_proj(values)
    else:
        out.copy_(o_proj(values))


def _of_queries(topk_indices: torch.Tensor | MergedSelection, first: int, last: int) -> torch.Tensor | MergedSelection:
    if isinstance(topk_indices, MergedSelection):
        return topk_indices.of_queries(first, last)
    return topk_indices[:, first:last]


def _sparse_chunks(
    heads: int,
    num_queries: int,
    latents: torch.Tensor,
    topk_indices: torch.Tensor | MergedSelection,
    allow_triton: bool,
) -> list[tuple[int, int]]:
    """Ranges of queries whose absorbed form stays bounded; with the sparse kernels whole waves of their programs."""
    batch, slots, width = latents.shape
    row_bytes = batch * heads * width * latents.element_size()
    if isinstance(topk_indices, MergedSelection):
        group = topk_indices.group
    elif allow_triton and latents.is_cuda:
        group = selection_group(latents.device, heads, num_queries, topk_indices.shape[-1], slots)
    else:
        return chunks(num_queries, row_bytes)
    wave = queries_per_wave(latents.device, heads, group)
    # Merged lists begin at whole groups of queries.
    multiple = math.lcm(wave // math.gcd(wave, batch), group)
    return chunks(num_queries, row_bytes, multiple, group, SPARSE_BLOCK_BYTES)


def chunks(
    num_rows: int, row_bytes: int, multiple: int = 1, least: int = 1, block_bytes: int | None = None
) -> list[tuple[int, int]]:
    """Ranges of rows whose temporaries stay within `block_bytes` (`ATTENTION_BLOCK_BYTES`).

    Their sizes are multiples of `multiple`, or of `least` where so many rows do not fit. A compiled forward takes all
    rows at once: as many ranges as a length needs would be a graph for every length.
    """
    if torch.compiler.is_compiling():
        return [(0, num_rows)]
    step = (ATTENTION_BLOCK_BYTES if block_bytes is None else block_bytes) // max(1, row_bytes)
    unit = multiple if step >= multiple else least
    step = max(least, step - step % unit)
    return [(first, min(first + step, num_rows)) for first in range(0, num_rows, step)] or [(0, 0)]


def weight_chunks(num_rows: int, row_bytes: int, want_weights: bool) -> list[tuple[int, int]]:
    """As `chunks`; a single one where a gradient may be asked of the weights, which pieces put together are not."""
    return chunks(num_rows, 0 if want_weights and torch.is_grad_enabled() else row_bytes)


def joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """The parts in a row; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
