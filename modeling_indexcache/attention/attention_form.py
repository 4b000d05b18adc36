"""Which form of Multi-head Latent Attention costs less to attend to keys that no selection names."""

from __future__ import annotations

from typing import Any

from ..layers.block_fp8_modules import is_plain_block_fp8
from ..layers.few_token_linears import is_plain_linear
from .attention_backends import TRITON_ATTENTION

# Attention functions that may be replaced by one on latents; any other was registered by the user.
_OWN = ("eager", "sdpa", TRITON_ATTENTION)


def absorbed_is_cheaper(module: Any, num_queries: int, num_keys: int) -> bool:
    """Whether `num_queries` attend to `num_keys` latents with fewer products in the absorbed form.

    Expanding every latent to keys and values of each head costs once what it costs to absorb so many queries; each
    pair of query and key is dearer in the latent space. So many queries expand, and the few of a decoding step absorb.

    Args:
        module: an `IndexCacheAttention`.
        num_queries: S.
        num_keys: T, slots that are empty or padded included.
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
