"""Refuse what transformers cannot dequantise rightly, before it loads wrong numbers or fails without a mend."""

from __future__ import annotations

from ..configuration.configuration_indexcache import IndexCacheConfig


def refuse_ragged_dequantisation(config: IndexCacheConfig) -> None:
    """Block-scaled fp8 weights that would be dequantised at load must have whole blocks.

    transformers derives the block from the weight's width over the number of scales, which is wrong (or fails) where
    the last block is ragged, as in the 512 + 64 rows of `kv_a_proj_with_mqa`.

    Raises:
        ValueError: naming the ragged widths and the mend.
    """
    quantization = getattr(config, "quantization_config", None)
    block = getattr(quantization, "weight_block_size", None)
    if not getattr(quantization, "dequantize", False) or not block:
        return
    heads = config.num_attention_heads
    widths = {
        "hidden_size": config.hidden_size,
        "q_lora_rank": config.q_lora_rank or 0,
        "kv_a_proj_with_mqa rows": config.kv_lora_rank + config.qk_rope_head_dim,
        "q_b_proj rows": heads * config.qk_head_dim,
        "kv_b_proj rows": heads * (config.qk_nope_head_dim + config.v_head_dim),
        "o_proj columns": heads * config.v_head_dim,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "indexer wq_b rows": config.index_n_heads * config.index_head_dim,
        "indexer wk rows": config.index_head_dim,
    }
    ragged = [f"{name} = {width}" for name, width in widths.items() if any(width % side for side in block)]
    if ragged:
        raise ValueError(
            f"this fp8 checkpoint would be dequantised while loading, and transformers cannot do that for widths that "
            f"are no multiple of its {block[0]} x {block[1]} blocks ({', '.join(ragged)}): run `indexcache convert "
            "SOURCE OUTPUT --dtype bfloat16` once and load that, or load it where fp8 runs (compute capability 8.9)"
        )
