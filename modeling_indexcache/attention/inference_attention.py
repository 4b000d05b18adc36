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

from ...kernels.norm_rope_linear.absorbed_vector import absorb_queries, expand_values, takes_absorbed_vector
from ...kernels.norm_rope_linear.cache_slot import CacheSlot
from ...kernels.norm_rope_linear.rms_norm import latent_rows
from ...kernels.norm_rope_linear.rotary import rotate, rotate_into
from ...kernels.sparse_mla.merged_selection import MergedSelection
from ...kernels.sparse_mla.sparse_mla import (
    merging_group,
    queries_per_wave,
    selection_group,
    sparse_mla,
    takes_sparse_mla,
)
from ..cache.latent_cache import append_latents, latent_slot
from ..eligibility import is_plain_block_fp8, is_plain_linear, is_plain_norm, why_noticed
from ..forward_plan import ForwardPlan
from ..layers.few_token_linears import linears
from ..selection import EVERY_KEY, Selection
from .absorbed_weights import absorbed_weights
from .dense_attention import absorbed_is_cheaper, attend_densely
from .key_visibility import listed_width
from .output_gate import gated, query_inputs, split_gate
from .query_chunks import chunks

# Largest temporary of the sparse kernels' absorbed queries on a GPU, where longer chunks waste less at their ends.
SPARSE_BLOCK_BYTES = 320 * 2**20


def attend_streamed(
    module: Any, hidden_states: torch.Tensor, selection: Selection, plan: ForwardPlan, norm: nn.Module | None = None
) -> tuple[torch.Tensor, Selection]:
    """What `IndexCacheAttention.forward` computes, with its arguments: the output and the selection that was used.

    With a `norm`, of `norm(hidden_states)`, and added to `hidden_states`: in place where the plan overwrites them.
    """
    config, allow_triton = module.config, plan.allow_triton
    residual = None if norm is None else hidden_states
    indexer = module.indexer if plan.is_full(module.layer_idx) else None
    # What a norm makes is memory of nobody else's, free as soon as everything that reads it is made. Where linear
    # layers alone read it, the norm is theirs.
    normed, q_norm = hidden_states, None
    if norm is not None and (indexer is not None or config.q_lora_rank is None):
        normed, norm = norm(hidden_states), None
    if config.q_lora_rank is None:
        queries_from = q_resid = normed
        q_proj = module.q_proj
        kv = module.kv_a_proj_with_mqa(normed)
    else:
        projections = module.q_a_proj, module.kv_a_proj_with_mqa
        q_a, kv = linears(normed, projections, allow_triton, norm=norm)
        q_resid, q_proj, q_norm = q_a, module.q_b_proj, module.q_a_layernorm
        if indexer is not None or config.attention_output_gate or why_noticed(q_norm):
            q_resid, q_norm = q_norm(q_a), None
        queries_from = query_inputs(config, q_resid, q_a)
        del q_a
    slot = latent_slot(plan.cache, module.layer_idx)
    latents = _latents(module, kv, plan, slot)
    del kv
    choose = None
    if indexer is not None and (plan.lists_selection or not plan.may_fuse(indexer, normed.device)):
        selection = Selection(indexer(normed, q_resid, plan))
    elif indexer is not None:
        index_keys = indexer.append_keys(normed, plan)
        selection = EVERY_KEY
        if not indexer.selects_all(index_keys):
            group, rank = 1, module.kv_lora_rank
            if plan.merge_selections:
                sizes = config.num_attention_heads, rank + module.rope_dim, rank, normed.shape[1]
                group = merging_group(normed, *sizes, config.index_topk, index_keys.shape[1])
            weights = indexer.head_weights(normed)
            choose = partial(indexer.choose, q_resid, weights, index_keys, plan, group)
    del normed, q_resid
    if slot is None:
        latents = append_latents(plan.cache, latents, module.layer_idx)
    if choose is not None:
        selection = Selection(choose())
    queries = _Queries(queries_from, q_norm, q_proj, residual)
    attend = _attend_to_all if selection.listed is None else _attend_to_selected
    return attend(module, queries, latents, selection, plan), selection


def _latents(module: Any, kv: torch.Tensor, plan: ForwardPlan, slot: CacheSlot | None) -> torch.Tensor:
    """The rows to cache, `[B, S, C + R]`, of the projected `kv`; written to the `slot` if given, then all rows."""
    norm = module.kv_a_layernorm
    rope = (*plan.angles, module.config.rope_interleave)
    if not is_plain_norm(norm):
        # Offloaded, watched or another module: its weight may be elsewhere until it is called, or there is none.
        latent, k_rope = kv.split([module.kv_lora_rank, module.rope_dim], dim=-1)
        rows = torch.cat((norm(latent), rotate(k_rope, *rope)), dim=-1)
        return rows if slot is None else slot.write(rows)
    return latent_rows(kv, norm.weight, norm.variance_epsilon, *rope, plan.allow_triton, slot)


class _Queries(NamedTuple):
    """What queries are made of, `proj(norm(x))` of `x [B, S, width]`, and what their outputs are added to."""

    x: torch.Tensor
    norm: nn.Module | None
    proj: nn.Module
    residual: torch.Tensor | None

    def projected(self, first: int, last: int) -> torch.Tensor:
        """Queries `first` to `last`, before RoPE, `[B, last - first, H head_dim]`."""
        part = self.x[:, first:last]
        return self.proj(part if self.norm is None else self.norm(part))


def _attend_to_all(
    module: Any, queries: _Queries, latents: torch.Tensor, selection: Selection, plan: ForwardPlan
) -> torch.Tensor:
    """Dense attention, for sequences no longer than the selection: of few queries as to a selection of all keys."""
    batch, num_queries = queries.x.shape[:2]
    num_keys = latents.shape[1]
    if plan.allow_triton and _lists_every_key(module, latents, num_queries):
        listed = Selection(plan.visibility.every_listed_index(num_queries, num_keys, batch))
        return _attend_to_selected(module, queries, latents, listed, plan)
    q, gate = split_gate(
        module.config, queries.projected(0, num_queries).view(batch, num_queries, -1, module.query_dim)
    )
    q_rope = q[..., module.nope_dim :]
    rotate_into(q_rope, q_rope, *plan.angles, module.config.rope_interleave, plan.allow_triton)
    attended, _ = attend_densely(module, (q[..., : module.nope_dim], q_rope), latents, selection, plan)
    out = module.o_proj(gated(attended, gate).flatten(2))
    if (residual := queries.residual) is None:
        return out
    return residual.add_(out) if plan.overwrites(module.layer_idx) else residual + out


def _lists_every_key(module: Any, latents: torch.Tensor, num_queries: int) -> bool:
    """Whether the sparse kernels attend to all of `latents [B, T, C + R]` for less than expanding them costs."""
    heads, num_keys = module.config.num_attention_heads, latents.shape[1]
    return absorbed_is_cheaper(module, num_queries, num_keys) and takes_sparse_mla(
        latents, heads, module.kv_lora_rank, listed_width(num_keys)
    )


def _attend_to_selected(
    module: Any, queries: _Queries, latents: torch.Tensor, selection: Selection, plan: ForwardPlan
) -> torch.Tensor:
    """Absorbed form on the selected latents, chunk by chunk of queries, added to the residual if there is one."""
    to_latent, to_value = absorbed_weights(module, latents)
    allow_triton, listed = plan.allow_triton, selection.listed
    assert listed is not None
    batch, num_queries = queries.x.shape[:2]
    heads, rank = to_latent.shape[0], module.kv_lora_rank
    if allow_triton and takes_absorbed_vector(queries.x, to_latent, to_value):
        (q,) = linears(queries.x, (queries.proj,), allow_triton, norm=queries.norm)
        q, gate = split_gate(module.config, q.view(batch, num_queries, heads, module.query_dim))
        absorbed = absorb_queries(q, to_latent, *plan.angles, module.config.rope_interleave)
        few_out, _ = sparse_mla(absorbed, latents, listed, scale=module.scaling, value_dim=rank)
        values = gated(expand_values(few_out, to_value), gate).flatten(2)
        return linears(values, (module.o_proj,), allow_triton, base=queries.residual)[0]
    out = queries.residual
    if out is None:
        out = queries.x.new_empty(batch, num_queries, module.config.hidden_size)
    elif not plan.overwrites(module.layer_idx):
        out = out.clone()
    for first, last in _sparse_chunks(heads, num_queries, latents, listed, allow_triton):
        rows = batch * (last - first)
        q, gate = split_gate(module.config, queries.projected(first, last).view(rows, heads, module.query_dim))
        absorbed = q.new_empty(rows, heads, rank + module.rope_dim)
        torch.bmm(q[..., : module.nope_dim].transpose(0, 1), to_latent, out=absorbed[..., :rank].transpose(0, 1))
        absorbed = absorbed.view(batch, last - first, heads, -1)
        q_rope = q.view(batch, last - first, heads, -1)[..., module.nope_dim :]
        cos, sin = (angles[:, first:last] for angles in plan.angles)
        rotate_into(absorbed[..., rank:], q_rope, cos, sin, module.config.rope_interleave, allow_triton)
        del q, q_rope
        part, options = selection.of_queries(first, last), {"scale": module.scaling, "value_dim": rank}
        latent_out, _ = sparse_mla(absorbed, latents, part, **options, allow_triton=allow_triton)
        del absorbed
        values = latent_out.new_empty(rows, heads, module.v_head_dim)
        latent_out = latent_out.view(rows, heads, rank).transpose(0, 1)
        torch.bmm(latent_out, to_value.transpose(1, 2), out=values.transpose(0, 1))
        values = gated(values, gate)
        _project(module.o_proj, values.view(batch, last - first, -1), out[:, first:last], queries.residual is not None)
    return out


def _project(o_proj: nn.Module, values: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    """`out = o_proj(values)`, or `out += o_proj(values)`, of `values [B, S, H V]`."""
    weight: Any = o_proj.weight if is_plain_linear(o_proj) and o_proj.bias is None else None
    if weight is not None and out.shape[0] == 1 and out.dtype == weight.dtype:
        rows, into = values[0], out[0]
        torch.addmm(into, rows, weight.t(), beta=int(add), out=into)
    elif is_plain_block_fp8(o_proj) and o_proj.bias is None and out.shape[0] == 1 and out.dtype == values.dtype:
        o_proj.multiply_into(values[0], out[0], add)
    elif add:
        out += o_proj(values)
    else:
        out.copy_(o_proj(values))


def _sparse_chunks(
    heads: int, num_queries: int, latents: torch.Tensor, listed: Any, allow_triton: bool
) -> list[tuple[int, int]]:
    """Ranges of queries whose absorbed form stays bounded; with the sparse kernels whole waves of their programs."""
    batch, slots, width = latents.shape
    row_bytes = batch * heads * width * latents.element_size()
    if isinstance(listed, MergedSelection):
        group = listed.group
    elif allow_triton and latents.is_cuda:
        group = selection_group(latents.device, heads, num_queries, listed.shape[-1], slots)
    else:
        return chunks(num_queries, row_bytes)
    wave = queries_per_wave(latents.device, heads, group)
    # Merged lists begin at whole groups of queries.
    multiple = math.lcm(wave // math.gcd(wave, batch), group)
    return chunks(num_queries, row_bytes, multiple, group, SPARSE_BLOCK_BYTES)
