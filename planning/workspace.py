"""Memory that a prefill needs beside weights and a full cache, reckoned from what its steps hold at a time.

Each stage of a layer holds some rows of all tokens, and blocks of bounded size, while the cache has the rows of the
layers so far. The terms follow `attention/inference_attention.py`, `layers/indexer.py` and `layers/feed_forward.py`;
a test compares them with measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..configuration.configuration_indexcache import IndexCacheConfig
from ..kernels.experts.routed_experts import BLOCK_BYTES as EXPERT_BLOCK_BYTES
from ..modeling_indexcache.attention.inference_attention import SPARSE_BLOCK_BYTES
from ..modeling_indexcache.layers.feed_forward import FEED_FORWARD_BLOCK_BYTES
from ..modeling_indexcache.layers.indexer import QUERY_BLOCK_BYTES

# Lists of scores and keys of one launch of the indexer on Hopper: rows, and bytes each
# (`lightning_indexer_hopper_gluon.py`).
_LISTED_ROWS, _LIST_BYTES = 8448, 4 * (2 * 6144 + 16)
_ELEMENT = 2


class Prefill(NamedTuple):
    """What is prefilled, and how its layers are split.

    Attributes:
        config: with the pattern that runs.
        batch: prompts that run at a time.
        length: tokens of each.
        ranks: processes that heads are split over.
        narrow: linear layers are block fp8: many rows are quantised first.
        spread: experts are split over the ranks, by width or by number.
        chunk: tokens of each prompt at a time, `prefill_chunk_size` of `generate()`; 0: all.
    """

    config: IndexCacheConfig
    batch: int
    length: int
    ranks: int = 1
    narrow: bool = False
    spread: bool = False
    chunk: int = 0

    @property
    def at_once(self) -> int:
        """Tokens of each prompt at a time."""
        return min(self.chunk or self.length, self.length)

    @property
    def rows(self) -> int:
        """Tokens at a time."""
        return self.batch * self.at_once

    @property
    def selects(self) -> bool:
        """Whether indexers select; up to `index_topk` tokens all keys are used."""
        return self.config.index_topk is not None and self.length > self.config.index_topk

    @property
    def hidden(self) -> int:
        """Bytes of hidden states."""
        return self.rows * self.config.hidden_size * _ELEMENT

    @property
    def query_latents(self) -> int:
        """Bytes of what queries are made of."""
        return self.rows * (self.config.q_lora_rank or 0) * _ELEMENT

    @property
    def selection(self) -> int:
        """Bytes of the selection in use."""
        return self.rows * (self.config.index_topk or 0) * 4 if self.selects else 0


def workspace_bytes(prefill: Prefill, caches: Sequence[int], first: int = 0) -> int:
    """The most that a prefill in bf16 holds beside weights and the full cache.

    Args:
        prefill: what runs.
        caches: bytes of cache of each layer on the GPU.
        first: the first of these layers.
    """
    config, highest, cached = prefill.config, 0, 0
    if prefill.at_once < prefill.length:
        # Behind the first chunk all layers have their cache.
        cached, caches = sum(caches), [0] * len(caches)
    for layer, size in enumerate(caches, first):
        before, behind = _stages(prefill, config.share_pattern.is_full(layer))
        highest = max(highest, cached + before)
        cached += size
        highest = max(highest, cached + behind)
    logits = prefill.batch * config.vocab_size * (_ELEMENT + 4)
    return max(highest, cached + 2 * prefill.hidden + prefill.selection + logits) - cached


def _stages(prefill: Prefill, is_full: bool) -> tuple[int, int]:
    """The largest stage of a layer before its rows are cached, and of those behind that."""
    hidden, query_latents, selection = prefill.hidden, prefill.query_latents, prefill.selection
    latents = prefill.rows * (prefill.config.kv_lora_rank + prefill.config.qk_rope_head_dim) * _ELEMENT
    # What rows are quantised to: one byte per element and an fp32 scale per 128.
    quantised = hidden // 2 + hidden // 64 if prefill.narrow else 0
    # The residual and its norm; query latents and keys' latents, each before and after their norm. A full layer comes
    # without a selection.
    before = 2 * hidden + 2 * query_latents + 2 * latents + quantised + (0 if is_full else selection)
    behind = [
        hidden + query_latents + selection + _attention_block(prefill),
        hidden + selection + _feed_forward(prefill),
    ]
    if is_full and prefill.selects:
        behind.append(hidden + query_latents + selection + _indexer_block(prefill))
    return before, max(behind)


def _indexer_block(prefill: Prefill) -> int:
    """Head weights of all tokens; a block's queries, its selection and the last block's, the kernel's lists."""
    config, rows = prefill.config, prefill.rows
    query = config.index_n_heads * config.index_head_dim * _ELEMENT
    blocks = -(-rows // max(1, QUERY_BLOCK_BYTES // max(1, query)))
    block = -(-rows // blocks)
    chosen = min(blocks, 2) * block * (config.index_topk or 0) * 4
    return rows * config.index_n_heads * 4 + block * query + chosen + min(rows, _LISTED_ROWS) * _LIST_BYTES


def _attention_block(prefill: Prefill) -> int:
    """A chunk of absorbed queries and their outputs, with the outputs and values of the chunk before.

    Without a selection the heads of all tokens, expanded.
    """
    config, rows = prefill.config, prefill.rows
    heads = -(-config.num_attention_heads // prefill.ranks)
    if not prefill.selects:
        widths = 2 * config.qk_head_dim + config.qk_nope_head_dim + 2 * config.v_head_dim
        return rows * heads * widths * _ELEMENT
    width = config.kv_lora_rank + config.qk_rope_head_dim
    chunk = min(rows, SPARSE_BLOCK_BYTES // max(1, heads * width * _ELEMENT))
    of_last = config.kv_lora_rank + config.v_head_dim if chunk < rows else 0
    return chunk * heads * (width + config.kv_lora_rank + of_last) * _ELEMENT


def _feed_forward(prefill: Prefill) -> int:
    """Experts block by block; where they are spread over ranks the norm, routed, shared and summed rows whole."""
    config, rows = prefill.config, prefill.rows
    chosen, inner = config.num_experts_per_tok, config.moe_intermediate_size
    # Rows of the chosen experts, and beside them the shared expert's and the norm.
    per_row = (chosen + 1) * max(config.hidden_size + 2 * inner, 3 * inner) * _ELEMENT
    block = max(
        min(EXPERT_BLOCK_BYTES * (chosen + 1) // max(1, chosen), rows * per_row),
        min(3 * FEED_FORWARD_BLOCK_BYTES, rows * 3 * config.intermediate_size * _ELEMENT),
    )
    if not prefill.spread:
        return block
    whole = 4 * prefill.hidden
    if prefill.narrow:
        return whole + block
    # transformers' grouped products: rows of all chosen experts before, between and behind them.
    return whole + rows * chosen * (2 * config.hidden_size + 3 * -(-inner // prefill.ranks)) * _ELEMENT
