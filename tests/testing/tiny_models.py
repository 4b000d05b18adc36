"""Tiny random models: transformers' own as oracles, and ours with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AXK2Config,
    AXK2ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
)

from indexcache import IndexCacheConfig, IndexCacheForCausalLM, SharePattern

SIZES: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    moe_intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_shared_experts=1,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    kv_lora_rank=24,
    q_lora_rank=32,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=12,
    first_k_dense_replace=1,
    index_topk=12,
    index_n_heads=8,
    index_head_dim=16,
    max_position_embeddings=256,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    initializer_range=0.15,
    bos_token_id=0,
    eos_token_id=96,
    pad_token_id=1,
)

# What A.X-K2 has and the others have not.
GATES: dict[str, Any] = dict(gated_norm_rank=4, attention_output_gate=True, masked_group_score=0.0)
# Its weights as transformers' class names them, and as they are on disk and here.
_AXK2_NAMES = {
    ".q_gate_proj.": ".q_b_proj.",
    "layernorm.mlp.fc1.": "layernorm.W_down.",
    "layernorm.mlp.fc2.": "layernorm.W_up.",
}


def tiny_config(**changes: Any) -> IndexCacheConfig:
    return IndexCacheConfig(**{**SIZES, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> IndexCacheForCausalLM:
    torch.manual_seed(seed)
    model = IndexCacheForCausalLM._from_config(tiny_config(**changes), attn_implementation="sdpa")
    _random_router_bias(model)
    return model.eval()


def glm_oracle(pattern: str, **changes: Any) -> GlmMoeDsaForCausalLM:
    types = SharePattern(pattern).indexer_types
    config = GlmMoeDsaConfig(**{**SIZES, "num_hidden_layers": len(pattern), "indexer_types": types, **changes})
    return _oracle(GlmMoeDsaForCausalLM, config)


def deepseek_oracle(pattern: str, **changes: Any) -> DeepseekV32ForCausalLM:
    """DeepSeek-V3.2, which never shares in transformers: here shared layers are handed the last full selection."""
    config = DeepseekV32Config(**{**SIZES, "num_hidden_layers": len(pattern), **changes})
    return _sharing(_oracle(DeepseekV32ForCausalLM, config), pattern)


def axk2_oracle(pattern: str, **changes: Any) -> AXK2ForCausalLM:
    """A.X-K2, which never shares in transformers either."""
    fields = {**SIZES, "gated_norm_rank": GATES["gated_norm_rank"], "num_hidden_layers": len(pattern), **changes}
    return _sharing(_oracle(AXK2ForCausalLM, AXK2Config(**fields)), pattern)


def _sharing(model: Any, pattern: str) -> Any:
    memory: dict[str, torch.Tensor] = {}
    for letter, layer in zip(pattern, model.model.layers):
        layer.self_attn.indexer = (
            _Remembering(layer.self_attn.indexer, memory) if letter == "F" else _Repeating(memory)
        )
    return model


def ours_like(oracle: nn.Module, pattern: str, backend: str) -> IndexCacheForCausalLM:
    """Our model with the oracle's config and weights."""
    fields = oracle.config.to_dict()
    for name in ("model_type", "architectures", "layer_types", "indexer_types", "transformers_version"):
        fields.pop(name, None)
    interleaved = isinstance(oracle, GlmMoeDsaForCausalLM)
    if isinstance(oracle, AXK2ForCausalLM):
        fields |= {name: value for name, value in GATES.items() if name not in fields}
    config = IndexCacheConfig(**{**fields, "index_share_pattern": pattern, "indexer_rope_interleave": interleaved})
    model = IndexCacheForCausalLM._from_config(config, attn_implementation=backend)
    weights = {own_name(name): tensor for name, tensor in oracle.state_dict().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    return model.eval()


def own_name(name: str) -> str:
    """What a weight of an oracle is called in our model."""
    for theirs, own in _AXK2_NAMES.items():
        name = name.replace(theirs, own)
    return name.replace(".indexer.inner.", ".indexer.")


def _oracle(model_class: type, config: Any) -> Any:
    model = model_class._from_config(config, attn_implementation="eager")
    _random_router_bias(model)
    return model.eval()


def _random_router_bias(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)


class _Remembering(nn.Module):
    def __init__(self, inner: nn.Module, memory: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.memory = inner, memory

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.memory["selection"] = self.inner(*args, **kwargs)
        return self.memory["selection"]


class _Repeating(nn.Module):
    def __init__(self, memory: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.memory["selection"]
