"""What each engine reads of a checkpoint: how an export spells it, and what it must refuse.

Read in the engines' own sources, named with their versions in docs/conversion.md and restated as tests in
tests/conversion/publish/. An engine fills a field that config.json lacks with a default, often another model's, and
says nothing: so `Engine.reads` lists every field that it reads, and an export holds all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ...configuration.configuration_indexcache import IndexCacheConfig
from ...configuration.share_pattern import SharePattern
from ..convert.families import ROUTER, indexer_layer, layer_of
from ..io.checkpoint import Checkpoint
from ..io.sources import ConversionError

# Families whose reading by vLLM, SGLang, TensorRT-LLM and Megatron-Bridge was not followed in their sources.
UNREAD_FAMILIES = ("axk2",)
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Contents:
    """What a checkpoint's weights are, as far as engines differ about it.

    Attributes:
        surplus_indexers: shared layers whose indexers are in the shards all the same (`--keep-shared-indexers`).
        mtp_layers: how many multi-token-prediction layers follow the decoder layers.
        is_quantised: whether config.json describes quantised weights.
        dtype: torch's name for the type of the embedding; bfloat16 where it has none.
    """

    surplus_indexers: tuple[int, ...]
    mtp_layers: int
    is_quantised: bool
    dtype: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, pattern: SharePattern) -> Contents:
        """Read from the headers of a checkpoint that runs `pattern`."""
        tensors, depth = checkpoint.tensors, len(pattern)
        held = {layer for layer in map(indexer_layer, tensors) if layer is not None}
        embedding = tensors.get("model.embed_tokens.weight")
        return cls(
            surplus_indexers=tuple(layer for layer in pattern.shared_layers if layer in held),
            mtp_layers=len({place[0] for place in map(layer_of, tensors) if place and place[0] >= depth}),
            is_quantised=checkpoint.config.get("quantization_config") is not None,
            dtype=_TORCH_NAMES.get(embedding.dtype if embedding else "", "bfloat16"),
        )


_Refusal = Callable[[IndexCacheConfig, Contents], str | None]


@dataclass(frozen=True)
class Engine:
    """One engine's side of an export.

    Attributes:
        title: its name in messages.
        reads: the fields of config.json that its config reader, its model and its loader look at.
        spell: the pattern's fields, from the family's `model_type` and the pattern; ConversionError where it has none.
        refusals: each gives the reason why the engine would compute another model, or None.
    """

    title: str
    reads: frozenset[str]
    spell: Callable[[str, SharePattern], dict[str, Any]]
    refusals: tuple[_Refusal, ...] = ()

    def config(
        self, native: dict[str, Any], config: IndexCacheConfig, contents: Contents, location: str
    ) -> dict[str, Any]:
        """The config.json of an export.

        Args:
            native: the config.json as the source family spells it, without the pattern.
            config: the checkpoint's own.
            contents: what its weights are.
            location: how errors name the checkpoint.

        Raises:
            ConversionError: a pattern that the engine cannot run, a model that it would compute as another, or a
                field that would be left to its default.
        """
        spelled = self.spell(native["model_type"], config.share_pattern)
        self.check(config, contents, location)
        implied = _implied_fields(config, contents, native)
        written = implied.keys() & (self.reads | native.keys())
        fields = {**native, **{name: implied[name] for name in sorted(written)}, **spelled}
        self.check_complete(fields, location)
        return fields

    def check(self, config: IndexCacheConfig, contents: Contents, location: str) -> None:
        """Refuse a model that the engine cannot run as it is.

        Raises:
            ConversionError: every reason against it.
        """
        reasons = [reason for refuse in self.refusals if (reason := refuse(config, contents))]
        if reasons:
            raise ConversionError(f"{location} cannot be exported for {self.title}: {'; '.join(reasons)}")

    def check_complete(self, fields: dict[str, Any], location: str) -> None:
        """Refuse a config.json that leaves a field to the engine's default.

        Raises:
            ConversionError: naming the fields.
        """
        absent = sorted(self.reads - fields.keys())
        if absent:
            raise ConversionError(
                f"{location}: {self.title} reads {', '.join(absent)}, which would be left to its defaults: add them "
                "to the checkpoint's config.json"
            )


def engine_named(name: str) -> Engine:
    """The engine that `--to` names.

    Raises:
        ConversionError: there is none of that name.
    """
    if name not in ENGINES:
        raise ConversionError(f"{name!r} is no engine that exports are made for: choose one of {', '.join(ENGINES)}")
    return ENGINES[name]


def _implied_fields(config: IndexCacheConfig, contents: Contents, native: dict[str, Any]) -> dict[str, Any]:
    """Fields that engines read and a source need not spell, because transformers has them built in or derives them.

    Args:
        config: the checkpoint's config.
        contents: what its weights are.
        native: the config.json of the source family, whose own spellings stay.
    """
    leading, every = _expert_schedule(config) or (config.first_k_dense_replace, config.moe_layer_freq)
    rope = dict(config.rope_parameters or {})
    scaling = None
    if rope.get("rope_type", "default") != "default":
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"} | {"type": rope["rope_type"]}
    absent = {
        **ROUTER,
        "dtype": native.get("torch_dtype") or contents.dtype,
        "index_share_for_mtp_iteration": False,
        "mlp_bias": False,
        # transformers' router multiplies in fp32 whatever the weights are; vLLM does so only when told.
        "moe_router_dtype": "float32",
        "rope_interleave": True,
        "rope_parameters": rope,
        "rope_scaling": scaling,
        "rope_theta": rope.get("rope_theta"),
    }
    return {
        **{name: value for name, value in absent.items() if native.get(name) is None},
        # Of these the weights, or the per-layer list that transformers reads, are the truth.
        "first_k_dense_replace": leading,
        "moe_layer_freq": every,
        "mlp_layer_types": list(config.mlp_layer_types or []),
        "num_nextn_predict_layers": contents.mtp_layers,
        # One group of which one is kept is no choice of groups: null is no number to engines.
        "n_group": config.n_group or 1,
        "topk_group": config.topk_group if config.n_group else 1,
    }


def _expert_schedule(config: IndexCacheConfig) -> tuple[int, int] | None:
    """(leading dense layers, one layer with experts in so many), or None where no such pair gives the layers.

    The config's own pair where it does; `mlp_layer_types` may say something else.
    """
    kinds = [kind == "sparse" for kind in config.mlp_layer_types or []]
    first = kinds.index(True) if True in kinds else len(kinds)
    own = (config.first_k_dense_replace, config.moe_layer_freq)
    for leading, every in (own, *((first, every) for every in range(1, len(kinds) + 1))):
        if every > 0 and kinds == [layer >= leading and layer % every == 0 for layer in range(len(kinds))]:
            return leading, every
    return None


# ---- the pattern -----------------------------------------------------------------------------------------------


def _spell_for_serving(model_type: str, pattern: SharePattern) -> dict[str, Any]:
    """The whole list twice: vLLM and TensorRT-LLM read `index_topk_pattern`, SGLang `indexer_types` before it."""
    if model_type in UNREAD_FAMILIES:
        raise ConversionError(
            f"what serving engines read of {model_type}'s config has not been checked, so no export is made for them: "
            "load the IndexCache checkpoint itself with trust_remote_code=True"
        )
    return pattern.engine_fields()


def _spell_for_transformers(model_type: str, pattern: SharePattern) -> dict[str, Any]:
    if model_type in ("deepseek_v32", *UNREAD_FAMILIES) and pattern.shared_layers:
        raise ConversionError(
            f"transformers' own {model_type} runs an indexer in every layer and cannot share (pattern {pattern}): "
            "load the IndexCache checkpoint itself with trust_remote_code=True, or export an all-F one"
        )
    return {"indexer_types": pattern.indexer_types} if model_type == "glm_moe_dsa" else {}


def _spell_for_megatron(model_type: str, pattern: SharePattern) -> dict[str, Any]:
    """Megatron-LM: layer n, counted from 1, is full iff `max(n - max(offset, 1), 0) % freq == 0`.

    For an offset of at least 1 that is the schedule of `SharePattern.from_frequency`.
    """
    if model_type in ("deepseek_v32", *UNREAD_FAMILIES):
        raise ConversionError(
            f"Megatron-Bridge has no bridge for {model_type} in its release (0.6.2), and those that its repository "
            "has held read no field of sharing: export it for another engine"
        )
    layers = range(1, len(pattern) + 1)
    for freq in layers:
        for offset in layers:
            if SharePattern.from_frequency(len(pattern), freq, offset) == pattern:
                return {
                    "index_topk_freq": freq,
                    "index_skip_topk_offset": offset,
                    # transformers' config class, through which Megatron-Bridge reads, then says the same.
                    "indexer_types": pattern.indexer_types,
                }
    raise ConversionError(
        f"Megatron-LM has only a frequency and an offset (leading full layers, then one full layer in so many), and "
        f"{pattern} is no such schedule: export it for another engine, or convert with an evenly spaced pattern"
    )


# ---- what an engine would compute otherwise ----------------------------------------------------------------------


def _tied_head(config: IndexCacheConfig, contents: Contents) -> str | None:
    if not config.tie_word_embeddings:
        return None
    return "tie_word_embeddings=true, and its output layer has its own weights: store lm_head.weight and set it false"


def _attention_bias(config: IndexCacheConfig, contents: Contents) -> str | None:
    return "attention_bias=true, and its attention has no biases and drops them" if config.attention_bias else None


def _activation(config: IndexCacheConfig, contents: Contents) -> str | None:
    return None if config.hidden_act == "silu" else f"hidden_act={config.hidden_act!r}, and it has 'silu' alone"


def _unnormalised_weights(config: IndexCacheConfig, contents: Contents) -> str | None:
    if config.norm_topk_prob:
        return None
    return "norm_topk_prob=false, and it normalises the weights of a token's experts always"


def _expert_layers(config: IndexCacheConfig, contents: Contents) -> str | None:
    if _expert_schedule(config):
        return None
    return "mlp_layer_types, and it has only first_k_dense_replace and moe_layer_freq, which cannot give these layers"


def _expert_layers_of_megatron(config: IndexCacheConfig, contents: Contents) -> str | None:
    schedule = _expert_schedule(config)
    if schedule and schedule[1] == 1:
        return None
    return "mlp_layer_types, and it has only leading dense layers (first_k_dense_replace) before layers with experts"


def _scaled_rope(config: IndexCacheConfig, contents: Contents) -> str | None:
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    return None if kind in ("default", "yarn") else f"rope_type={kind!r}, and it takes every scaling for yarn"


def _yarn_of_vllm(config: IndexCacheConfig, contents: Contents) -> str | None:
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") == "default" or rope.get("attention_factor") != 1.0:
        return None
    return "rope_parameters has attention_factor=1.0, which it takes for another scaling than yarn: leave it out"


def _rope_of_megatron(config: IndexCacheConfig, contents: Contents) -> str | None:
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    return None if kind == "default" else f"rope_type={kind!r}, and its bridge of this family scales no RoPE"


def _surplus_indexers(config: IndexCacheConfig, contents: Contents) -> str | None:
    if not contents.surplus_indexers:
        return None
    return (
        f"the weights hold indexers of shared layers ({', '.join(map(str, contents.surplus_indexers))}), for which "
        "its loader has no parameter: convert without --keep-shared-indexers"
    )


def _quantised_weights(config: IndexCacheConfig, contents: Contents) -> str | None:
    if not contents.is_quantised:
        return None
    return "quantised weights, which its bridge of this family copies without scales: convert with --dtype bfloat16"


def _names(words: str) -> Iterator[str]:
    return iter(words.split())


_SHAPE = frozenset(
    _names(
        "architectures model_type vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers "
        "num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts "
        "n_shared_experts num_experts_per_tok n_group topk_group routed_scaling_factor first_k_dense_replace "
        "rms_norm_eps max_position_embeddings rope_parameters index_topk index_n_heads index_head_dim"
    )
)
_SERVED = _SHAPE | frozenset(
    _names(
        "dtype num_key_value_heads moe_layer_freq indexer_rope_interleave num_nextn_predict_layers "
        "index_share_for_mtp_iteration index_topk_pattern"
    )
)
_EVERY_SERVER_REFUSES = (_attention_bias, _activation, _expert_layers, _scaled_rope)

ENGINES: dict[str, Engine] = {
    "vllm": Engine(
        "vLLM",
        _SERVED | {*_names("hidden_act norm_topk_prob scoring_func topk_method moe_router_dtype tie_word_embeddings")},
        _spell_for_serving,
        (*_EVERY_SERVER_REFUSES, _tied_head, _yarn_of_vllm, _surplus_indexers),
    ),
    "sglang": Engine(
        "SGLang",
        _SERVED
        | {*_names("hidden_act norm_topk_prob scoring_func topk_method tie_word_embeddings pad_token_id")}
        | {"indexer_types", "rope_interleave"},
        _spell_for_serving,
        _EVERY_SERVER_REFUSES,
    ),
    "trtllm": Engine(
        "TensorRT-LLM",
        _SERVED | {"rope_theta", "rope_scaling"},
        _spell_for_serving,
        (*_EVERY_SERVER_REFUSES, _unnormalised_weights),
    ),
    "transformers": Engine(
        "transformers",
        (_SHAPE - {"first_k_dense_replace"})
        | {*_names("hidden_act num_key_value_heads norm_topk_prob mlp_layer_types attention_bias attention_dropout")}
        | {*_names("tie_word_embeddings pad_token_id initializer_range output_router_logits")},
        _spell_for_transformers,
    ),
    "megatron": Engine(
        "Megatron-Bridge",
        _SHAPE
        | {*_names("dtype hidden_act num_key_value_heads initializer_range attention_dropout attention_bias mlp_bias")}
        | {*_names("tie_word_embeddings scoring_func num_nextn_predict_layers indexer_rope_interleave")}
        | {"index_topk_freq", "index_skip_topk_offset"},
        _spell_for_megatron,
        (
            _tied_head,
            _attention_bias,
            _unnormalised_weights,
            _expert_layers_of_megatron,
            _rope_of_megatron,
            _quantised_weights,
        ),
    ),
}
