"""Slices of released models at full width with random weights, in bf16 or in block fp8 as they are published.

A slice has the first layers of the release, one of them dense. Weights of fp8 models are made where they are to stay,
module by module: a layer of 256 experts would take twice its room in bf16 first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...configuration.configuration_indexcache import IndexCacheConfig
from ...kernels.block_fp8.block_fp8_format import quantise_weight, scale_grid
from ...modeling_indexcache.layers.block_fp8_modules import BlockFp8Experts, BlockFp8Linear, put_block_fp8
from ...modeling_indexcache.layers.rotary_embedding import IndexCacheRotaryEmbedding
from ...modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM

# DeepSeek-V3.2 is what `IndexCacheConfig` defaults to.
SHAPE_V32: dict[str, Any] = dict(
    num_hidden_layers=4,
    first_k_dense_replace=1,
    rope_parameters={
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
)
SHAPE_GLM_5: dict[str, Any] = dict(
    vocab_size=154880,
    hidden_size=6144,
    intermediate_size=12288,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=64,
    num_key_value_heads=64,
    n_group=1,
    topk_group=1,
    q_lora_rank=2048,
    qk_nope_head_dim=192,
    v_head_dim=256,
    index_n_heads=32,
    indexer_rope_interleave=True,
    max_position_embeddings=1048576,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 8000000.0},
)
#: Slices by the name that `--shape` has for them.
SLICES = {"v3.2": SHAPE_V32, "glm-5": SHAPE_GLM_5}
# In place of a slice's widths, to try it without a GPU; ragged, as the release's own 576 rows are.
NARROW: dict[str, Any] = dict(
    vocab_size=512,
    hidden_size=160,
    intermediate_size=256,
    moe_intermediate_size=64,
    num_attention_heads=8,
    num_key_value_heads=8,
    n_routed_experts=16,
    num_experts_per_tok=4,
    kv_lora_rank=64,
    q_lora_rank=96,
    qk_rope_head_dim=16,
    qk_nope_head_dim=32,
    v_head_dim=32,
    index_topk=64,
    index_n_heads=8,
    index_head_dim=32,
)
BLOCK = (128, 128)
# As the releases': what is quantised, by module.
_KEPT_WIDE = ("lm_head", "indexer.weights_proj")


def block_fp8_model(config: IndexCacheConfig, device: torch.device, dtype: torch.dtype) -> IndexCacheForCausalLM:
    """A model with random weights whose linear layers and experts are block fp8.

    Args:
        config: of the model; it gets the `quantization_config` of a release.
        device: where weights are made.
        dtype: of what is not quantised.
    """
    torch.manual_seed(0)
    config.quantization_config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
    }
    with torch.device("meta"):
        model: Any = IndexCacheForCausalLM._from_config(config, dtype=dtype)
    put_block_fp8(model, BLOCK, lambda name, experts: None if name.endswith(_KEPT_WIDE) else torch.float32)
    model.to_empty(device=device)
    # What is computed from the config, and not loaded.
    model.model.rotary_emb = IndexCacheRotaryEmbedding(config).to(device)
    for module in model.modules():
        _fill(module, config.initializer_range)
    return model.eval()


@torch.no_grad()
def _fill(module: nn.Module, spread: float) -> None:
    """Random weights for a module's own parameters; norms do nothing, and no expert is preferred."""
    if isinstance(module, BlockFp8Linear):
        _fill_block_fp8(module.weight, module.weight_scale_inv, spread)
    elif isinstance(module, BlockFp8Experts):
        width = module.gate_up_proj.shape[1] // 2
        rows = scale_grid(width, module.gate_up_proj.shape[2], BLOCK)[0]
        for expert in range(module.num_experts):
            # Gate above up, and their scales likewise: a ragged half ends a block.
            for half in (0, 1):
                part, grid = slice(half * width, (half + 1) * width), slice(half * rows, (half + 1) * rows)
                weight, scales = module.gate_up_proj[expert, part], module.gate_up_proj_scale_inv[expert, grid]
                _fill_block_fp8(weight, scales, spread)
            _fill_block_fp8(module.down_proj[expert], module.down_proj_scale_inv[expert], spread)
    else:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                parameter.normal_(std=spread)
            else:
                parameter.fill_(float(name == "weight"))
        for name, buffer in module.named_buffers(recurse=False):
            if name == "e_score_correction_bias":
                buffer.zero_()


def _fill_block_fp8(weight: torch.Tensor, scales: torch.Tensor, spread: float) -> None:
    """Normally distributed entries of standard deviation `spread`, quantised."""
    wide = torch.empty(weight.shape, dtype=torch.float32, device=weight.device).normal_(std=spread)
    values, grid = quantise_weight(wide, BLOCK)
    weight.copy_(values)
    scales.copy_(grid)
