"""IndexCache models: DeepSeek Sparse Attention whose shared layers reuse a full layer's selection of keys.

Attention, experts and model stand in one file because transformers reads its source to learn what it supports.

Legend: B batch, S new tokens, T key slots, H attention heads, C latent width, R RoPE width, K selected keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import CompileConfig, GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.configuration_indexcache import IndexCacheConfig
from ..configuration.share_pattern import SharePattern
from ..kernels.norm_rope_linear.rotary import rotate
from .attention.absorbed_attention import attend_absorbed
from .attention.attention_backends import (
    EAGER_ATTENTION,
    TRITON_ATTENTION,
    eager_attention_forward,
    resolve_attention_backend,
)
from .attention.dense_attention import attend_densely
from .attention.inference_attention import attend_streamed
from .attention.key_visibility import KeyVisibility, mask_at_capacity, packed_key_start
from .attention.output_gate import gated, query_inputs, split_gate
from .block_fp8_loading import loading_block_fp8, refuse_missing_scales
from .cache.decode_graph import decode_graph
from .cache.latent_cache import append_latents
from .compile_ahead import compile_ahead
from .eligibility import why_no_graphs, why_not_in_place
from .explain_paths import Paths, explain_paths
from .forward_arguments import ForwardOptions, refuse_lost_history, refuse_pipeline, refuse_unknown_options
from .forward_plan import ForwardPlan, LayerReport
from .layers.expert_router import IndexCacheTopkRouter
from .layers.feed_forward import IndexCacheMLP, add_feed_forward, run_expert_kernels, runs_expert_kernels
from .layers.few_token_linears import linears
from .layers.indexer import IndexCacheIndexer, refuse_missing_indexers
from .layers.normalization import IndexCacheRMSNorm, layer_norm_of
from .layers.rotary_embedding import IndexCacheRotaryEmbedding, yarn_softmax_factor
from .layers.stacked_experts import with_stacked_experts
from .model_outputs import IndexCacheCausalLMOutput, IndexCacheModelOutput
from .parallel.layer_placement import onloaded
from .selection import Selection
from .training.causal_lm_loss import causal_lm_loss
from .training.indexer_training import compare_attention, trace_indexer, training_outputs
from .transformers_compat import CACHE_NAME, ROUTER_IN_FP32, one_cache, refuse_continuous_batching

# On disk there is one tensor an expert, in the module one for all: the same merge as transformers' GLM-5.
register_checkpoint_conversion_mapping(
    IndexCacheConfig.model_type, get_checkpoint_conversion_mapping("glm_moe_dsa"), overwrite=True
)


class IndexCacheAttention(nn.Module):
    """Multi-head latent attention over the keys that this layer's indexer, or an earlier one, selected."""

    def __init__(self, config: IndexCacheConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = 1
        self.is_causal = True
        self.kv_lora_rank, self.v_head_dim, self.head_dim = config.kv_lora_rank, config.v_head_dim, config.qk_head_dim
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        # What the projection of queries gives each head.
        self.query_dim = self.head_dim + (self.v_head_dim if config.attention_output_gate else 0)
        num_heads, hidden, bias = config.num_attention_heads, config.hidden_size, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, num_heads * self.head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = IndexCacheRMSNorm(config, config.q_lora_rank, config.mla_norm_eps)
            inputs = config.q_lora_rank * (2 if config.attention_output_gate else 1)
            self.q_b_proj = nn.Linear(inputs, num_heads * self.query_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.kv_lora_rank + self.rope_dim, bias=bias)
        self.kv_a_layernorm = IndexCacheRMSNorm(config, self.kv_lora_rank, config.mla_norm_eps)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, num_heads * (self.nope_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * self.v_head_dim, hidden, bias=bias)
        self.scaling = self.head_dim**-0.5 * yarn_softmax_factor(config.rope_parameters)
        has_indexer = config.index_topk is not None and config.share_pattern.is_full(layer_idx)
        self.indexer = IndexCacheIndexer(config, layer_idx) if has_indexer else None

    def forward(
        self, hidden_states: torch.Tensor, selection: Selection, plan: ForwardPlan
    ) -> tuple[torch.Tensor, torch.Tensor | None, Selection, LayerReport | None]:
        """Attend.

        Args:
            hidden_states: `[B, S, hidden_size]`, normed.
            selection: of the nearest full layer; a full layer makes its own.
            plan: of the forward.

        Returns:
            The output `[B, S, hidden_size]`, the attention weights `[B, H, S, T]` where the plan returns them, the
            selection that was used, and in training what was measured of it.
        """
        if plan.streams:
            out, selection = attend_streamed(self, hidden_states, selection, plan)
            return out, None, selection, None
        batch, num_queries = hidden_states.shape[:2]
        q_resid: Any = None
        if self.config.q_lora_rank is None:
            q, kv = linears(hidden_states, (self.q_proj, self.kv_a_proj_with_mqa), plan.allow_triton)
        else:
            q_a, kv = linears(hidden_states, (self.q_a_proj, self.kv_a_proj_with_mqa), plan.allow_triton)
            q_resid = self.q_a_layernorm(q_a)
            (q,) = linears(query_inputs(self.config, q_resid, q_a), (self.q_b_proj,), plan.allow_triton)
        q, gate = split_gate(self.config, q.view(batch, num_queries, -1, self.query_dim))
        q_nope, q_rope = q.split([self.nope_dim, self.rope_dim], dim=-1)
        queries = q_nope, rotate(q_rope, *plan.angles, self.config.rope_interleave)
        latent, k_rope = kv.split([self.kv_lora_rank, self.rope_dim], dim=-1)
        k_rope = rotate(k_rope, *plan.angles, self.config.rope_interleave)
        # The norm's weight is wider than its input under autocast.
        latents = torch.cat((self.kv_a_layernorm(latent).to(k_rope.dtype), k_rope), dim=-1)  # [B, S, C + R]

        if self.indexer is not None and plan.is_full(self.layer_idx):
            if plan.training is None:
                selection = Selection(self.indexer(hidden_states, q_resid, plan))
            else:
                trace = trace_indexer(self.indexer, hidden_states, q_resid, plan, plan.training)
                selection = Selection(trace.indices if plan.training.stage == "sparse" else None, trace)
        latents = append_latents(plan.cache, latents, self.layer_idx)
        weights = lse = report = None
        if selection.listed is None or plan.backend == EAGER_ATTENTION or plan.dropout:
            out, weights = attend_densely(self, queries, latents, selection, plan)
        else:
            out, lse = attend_absorbed(self, queries, latents, selection, plan)
        if plan.training is not None and selection.trace is not None:
            report = compare_attention(self, selection.trace, queries, latents, plan, plan.training, lse)
        (out,) = linears(gated(out, gate).flatten(2), (self.o_proj,), plan.allow_triton)
        return out, weights, selection, report

    def attention_function(self, backend: str) -> Callable[..., Any]:
        """What attends on expanded heads: for "triton", which has no kernel for them, PyTorch's."""
        backend = "sdpa" if backend == TRITON_ATTENTION else backend
        return ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)


@use_experts_implementation
class IndexCacheExperts(nn.Module):
    """The routed experts' weights, stacked."""

    def __init__(self, config: IndexCacheConfig) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim, self.intermediate_dim = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(with_stacked_experts(state_dict, prefix, self.num_experts), prefix, *rest)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`[tokens, hidden_size]` through each token's experts, one expert at a time."""
        out = torch.zeros_like(hidden_states)
        # Under expert parallelism ids of num_experts mark tokens of other ranks; they match no expert here.
        for expert in top_k_index.unique().tolist():
            if not 0 <= expert < self.num_experts:
                continue
            token, position = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_out = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out.index_add_(0, token, (expert_out * top_k_weights[token, position, None]).to(out.dtype))
        return out


class IndexCacheMoE(nn.Module):
    """Routed and shared experts."""

    def __init__(self, config: IndexCacheConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = IndexCacheTopkRouter(config)
        self.experts = IndexCacheExperts(config)
        shared = config.shared_experts_intermediate_size or config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = IndexCacheMLP(config, shared)

    def forward(self, x: torch.Tensor, accumulate: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, S, hidden_size]` to the same; added in place to `accumulate` if given."""
        tokens = x.view(-1, x.shape[-1])
        _, weights, experts = self.gate(tokens)
        if runs_expert_kernels(self, tokens):
            target = None if accumulate is None else accumulate.view_as(tokens)
            return run_expert_kernels(self, tokens, experts, weights, target).view_as(x)
        out = self.experts(tokens, experts, weights).view_as(x)
        if accumulate is None:
            return out + self.shared_experts(x)
        if why_not_in_place(self.shared_experts, x.device):
            return accumulate.add_(out).add_(self.shared_experts(x))
        return self.shared_experts(x, accumulate.add_(out))


class IndexCacheDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind a norm and a residual."""

    def __init__(self, config: IndexCacheConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = IndexCacheAttention(config, layer_idx)
        assert config.mlp_layer_types is not None
        sparse = config.mlp_layer_types[layer_idx] == "sparse"
        self.mlp = IndexCacheMoE(config) if sparse else IndexCacheMLP(config, config.intermediate_size)
        self.input_layernorm = layer_norm_of(config, True)
        self.post_attention_layernorm = layer_norm_of(config, sparse)

    def forward(
        self, hidden_states: torch.Tensor, selection: Selection, plan: ForwardPlan
    ) -> tuple[torch.Tensor, Selection, LayerReport | None]:
        """`[B, S, hidden_size]` to the same, the selection in use, and what training measures of it."""
        report = None
        with onloaded(self.self_attn):
            if plan.streams and plan.may_fuse(self.self_attn, hidden_states.device):
                norm = self.input_layernorm
                hidden_states, selection = attend_streamed(self.self_attn, hidden_states, selection, plan, norm)
            else:
                normed = self.input_layernorm(hidden_states)
                attended, _, selection, report = self.self_attn(normed, selection=selection, plan=plan)
                del normed
                hidden_states = hidden_states + attended
                del attended
        with onloaded(self.mlp):
            norm = self.post_attention_layernorm
            if all(plan.may_fuse(part, hidden_states.device) for part in (self.mlp, norm)):
                return add_feed_forward(self.mlp, norm, hidden_states), selection, report
            return hidden_states + self.mlp(norm(hidden_states)), selection, report


class IndexCachePreTrainedModel(PreTrainedModel):
    """Loading, saving and capabilities of IndexCache models."""

    config: IndexCacheConfig
    config_class = IndexCacheConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["IndexCacheDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = False
    _supports_sdpa = True
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": IndexCacheDecoderLayer,
        "attentions": IndexCacheAttention,
        "router_logits": OutputRecorder(IndexCacheTopkRouter, index=0),
        "topk_indices": OutputRecorder(IndexCacheIndexer, index=0),
    }
    _keep_in_fp32_modules_strict = ROUTER_IN_FP32
    _keep_in_fp32_modules = ["indexer.weights_proj"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; any config field, such as `index_share_pattern`, may be given too.

        With `new_indexers=True` full layers without indexer weights get random ones, to be trained.

        Raises:
            ValueError: when a full layer of the pattern has no indexer weights in the checkpoint; for a pipeline; for
                fp8 weights without their scales.
        """
        want_info, new_indexers = kwargs.pop("output_loading_info", False), kwargs.pop("new_indexers", False)
        kwargs["output_loading_info"], source = True, pretrained_model_name_or_path
        refuse_pipeline(**kwargs)
        with loading_block_fp8():
            loaded: Any = super().from_pretrained(source, *model_args, **kwargs)
        model, info = loaded
        for module in model.modules():
            if isinstance(module, IndexCacheTopkRouter):
                module.store_exactly(model.get_input_embeddings().weight.dtype)
        refuse_missing_scales(info["missing_keys"], source)
        # Without a source all weights are new, or given.
        if not new_indexers and source is not None:
            refuse_missing_indexers(model.config, info["missing_keys"], source)
        return (model, info) if want_info else model

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Resolve `attn_implementation`: `eager`, `sdpa` or `triton`; None is the best that this machine runs."""
        resolved = resolve_attention_backend(requested_attention)
        if resolved == TRITON_ATTENTION:
            return resolved
        return super().get_correct_attn_implementation(resolved, is_init_check)

    def explain_paths(self) -> Paths:
        """Which path prefill, decoding steps and recorded steps take here, and why not a faster one; see `Paths`."""
        return explain_paths(getattr(self, self.base_model_prefix, self))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, IndexCacheTopkRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, IndexCacheExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)


class IndexCacheModel(IndexCachePreTrainedModel):
    """The decoder without a head.

    Attributes:
        decode_graphs: on CUDA, replay decoding steps of dynamic caches as CUDA graphs (`decode_graph.py`).
    """

    decode_graphs = True

    def __init__(self, config: IndexCacheConfig) -> None:
        super().__init__(config)
        num_layers = config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(IndexCacheDecoderLayer(config, layer) for layer in range(num_layers))
        self.norm = IndexCacheRMSNorm(config, config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = IndexCacheRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self._running_pattern = config.share_pattern
        own_layers = "|".join(map(str, range(num_layers)))
        shared = "|".join(map(str, config.share_pattern.shared_layers))
        # Multi-token-prediction layers stand behind the last one; shared layers of an all-full file are surplus.
        self._keys_to_ignore_on_load_unexpected = [rf"layers\.(?!(?:{own_layers})\.)\d+\."]
        if shared:
            self._keys_to_ignore_on_load_unexpected.append(rf"layers\.(?:{shared})\.self_attn\.indexer\.")
        self.post_init()

    def set_index_share_pattern(self, pattern: str | SharePattern) -> None:
        """Run with another pattern from the next forward on; weights stay (search and analysis use this).

        Caches made before are of no use after. `config.index_share_pattern` does not change.

        Raises:
            ValueError: when a full layer of `pattern` has no indexer in this model.
        """
        pattern = SharePattern.parse(pattern, self.config.num_hidden_layers)
        loaded = self.config.share_pattern
        without = [layer for layer in pattern.full_layers if not loaded.is_full(layer)]
        if without:
            raise ValueError(f"pattern {pattern} makes layers {without} full, but they have no indexer in this model")
        self._running_pattern = pattern

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> IndexCacheModelOutput:
        """Run the decoder.

        Args:
            input_ids: `[B, S]`.
            attention_mask: `[B, past + S]`, 1 for tokens and 0 for padding; or `[B, 1, S, T]`.
            position_ids: `[B, S]`. Without a mask and a cache, positions that start anew begin a document that sees
                nothing before it.
            cache: a cache made with this model's config.
            inputs_embeds: `[B, S, hidden_size]` in place of `input_ids`.
            use_cache: make a cache when none is given.
            past_key_values: the older name of `cache`.
            **kwargs: `output_hidden_states`, `output_attentions` (eager), `output_router_logits`,
                `output_topk_indices`; `cu_seq_lens_q` of packed documents, see `packed_key_start`;
                `indexer_training`, a stage or an `IndexerTraining`, see `indexer_training.py`.

        Raises:
            TypeError: an option that nobody knows, naming the nearest known one.
            ValueError: arguments that contradict each other, or a step without the history that it counts on.
        """
        cache = one_cache(cache, past_key_values)
        options = ForwardOptions.of(kwargs, type(self).forward, self.config, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, num_queries = hidden_states.shape[:2]
        starts = options.cu_seq_lens
        refuse_lost_history(attention_mask, position_ids, cache, num_queries, is_packed=starts is not None)
        packs = attention_mask is None and cache is None
        key_start = packed_key_start(position_ids, starts, batch, num_queries) if packs else None
        if use_cache and cache is None and options.training is None:
            cache = DynamicCache(config=self.config)
        hidden_out = decode_graph(self, hidden_states, attention_mask, position_ids, cache, options)
        reports: list[Any] = []
        if hidden_out is None:
            visibility = KeyVisibility.of(attention_mask, cache, num_queries, hidden_states.device, key_start)
            compile_ahead(self, hidden_states, masked=visibility.key_mask is not None)
            plan = ForwardPlan.of(self, hidden_states, position_ids, visibility, cache, options)
            # Handed over, so that the embeddings' memory is free after the first layer.
            given = [hidden_states]
            del hidden_states
            hidden_out, _, reports = plan.run(self, given.pop())
            hidden_out = self.norm(hidden_out)
        measured = {} if options.training is None else training_outputs(reports)
        outputs: dict[str, Any] = {CACHE_NAME: cache, **measured}
        return IndexCacheModelOutput(last_hidden_state=hidden_out, **outputs)


class IndexCacheForCausalLM(IndexCachePreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    init_continuous_batching = refuse_continuous_batching

    def __init__(self, config: IndexCacheConfig) -> None:
        super().__init__(config)
        self.model = IndexCacheModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_index_share_pattern(self, pattern: str | SharePattern) -> None:
        """As `IndexCacheModel.set_index_share_pattern`."""
        self.model.set_index_share_pattern(pattern)

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        """What `generate` calls at each step with a static cache: CUDA graphs of our own unless asked to compile."""
        if compile_config is None and why_no_graphs(self.model) is None:
            return self.__call__
        return super().get_compiled_call(compile_config)

    @staticmethod
    def create_masks_for_generate(
        config: IndexCacheConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> torch.Tensor | None:
        """See `mask_at_capacity`: transformers would make an `[S, T]` mask, huge at long contexts."""
        return mask_at_capacity(attention_mask, one_cache(cache, past_key_values))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> IndexCacheCausalLMOutput:
        """As `IndexCacheModel.forward`, then logits `[B, S, vocab_size]`.

        `labels [B, S]`, -100 where no loss is wanted, are shifted here (or come as `shift_labels`); their loss is
        divided by `num_items_in_batch` if given. `logits_to_keep` wants logits of only so many last positions (0:
        all), or of those listed, `skip_logits` none: the loss is then made block by block, for long sequences.
        """
        refuse_unknown_options(kwargs, type(self).forward)
        outputs: IndexCacheModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states: Any = outputs.last_hidden_state
        logits = loss = None
        if not skip_logits:
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        elif labels is not None:
            loss = causal_lm_loss(hidden_states, self.lm_head, labels, **kwargs)
        if labels is not None and loss is None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return IndexCacheCausalLMOutput(loss=loss, logits=logits, **rest)


__all__ = ["IndexCacheForCausalLM", "IndexCacheModel", "IndexCachePreTrainedModel"]
