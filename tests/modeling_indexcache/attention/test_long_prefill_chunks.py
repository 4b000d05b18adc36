"""Chunks of long prefills and what in-place residuals leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from testing.tiny_models import tiny_model

from indexcache.kernels.sparse_mla.merged_selection import MergedSelection
from indexcache.kernels.sparse_mla.sparse_mla_union_triton import group_size
from indexcache.modeling_indexcache.attention import inference_attention


@pytest.mark.parametrize("processors", [132, 114, 108, 78])
def test_chunks_begin_at_whole_groups_for_every_batch(monkeypatch, processors):
    def wave(device, heads, group):
        return max(1, processors * group // math.ceil(group * heads / 64))

    monkeypatch.setattr(inference_attention, "queries_per_wave", wave)
    for heads in (8, 12, 16, 20, 24, 32):
        group = group_size(heads, 64, 20_000, 64, 20_000)
        assert group > 1
        for batch in range(1, 65):
            latents = torch.empty(batch, 20_000, 576, dtype=torch.bfloat16, device="meta")
            selection = MergedSelection(torch.empty(0), torch.empty(0), group, 20_000)
            found = inference_attention._sparse_chunks(heads, 20_000, latents, selection, True)
            assert found[0][0] == 0 and found[-1][1] == 20_000
            assert all(first % group == 0 for first, _ in found), (heads, batch)


@pytest.mark.parametrize("everywhere", [False, True])
def test_what_a_hook_keeps_is_not_overwritten(everywhere):
    model = tiny_model(index_share_pattern="FSFS").eval()
    kept = []

    def keep(module, args, *_):
        if module.__class__.__name__ == "IndexCacheRMSNorm" and args[0].shape[-1] == model.config.hidden_size:
            kept.append((args[0], args[0].clone()))

    handles = (
        [torch.nn.modules.module.register_module_forward_pre_hook(keep)]
        if everywhere
        else [layer.input_layernorm.register_forward_pre_hook(keep) for layer in model.model.layers]
        + [layer.post_attention_layernorm.register_forward_pre_hook(keep) for layer in model.model.layers]
    )
    try:
        with torch.no_grad():
            model(torch.arange(2, 26)[None])
    finally:
        for handle in handles:
            handle.remove()
    assert len(kept) >= 2 * model.config.num_hidden_layers
    assert all(torch.equal(now, then) for now, then in kept)
