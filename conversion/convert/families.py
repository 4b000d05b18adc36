"""The checkpoint families that can become IndexCache checkpoints: their tensors, their configs, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ...configuration.configuration_indexcache import PATTERN_FIELDS, IndexCacheConfig
from ...configuration.hub_code import code_version
from ...configuration.share_pattern import SharePattern
from ..io.sources import ConversionError
from ..io.terminal_text import shown

INDEXCACHE = IndexCacheConfig.model_type
_LAYER = re.compile(r"model\.layers\.([0-9]{1,9})\.(.+)")
# A multi-token-prediction layer has these; any other layer beyond num_hidden_layers is a mistake in the config.
MTP_MARK = "eh_proj.weight"
INDEXER = "self_attn.indexer."

# Fields that IndexCacheConfig derives, whatever a source says (GLM-5.2 ships head_dim 192).
_DERIVED_FIELDS = frozenset({"head_dim", "layer_types", "architectures", "dtype"})
_SOURCE_CODE_FIELDS = frozenset({"auto_map", "architectures", "model_type"})
# Where the source lay on somebody's machine, and code that its owner chose to run it with (a Hub kernel's name, say).
LOCAL_FIELDS = frozenset(
    {
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "_attn_implementation",
        "attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_experts_implementation",
        "experts_implementation",
        "_experts_implementation_internal",
        "custom_pipelines",
    }
)
# The one router that these families have, and IndexCacheForCausalLM with them.
ROUTER = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


@dataclass(frozen=True)
class Family:
    """A family of DSA checkpoints that IndexCacheForCausalLM serves with switches alone.

    Attributes:
        model_type: as its config.json has it.
        indexer_rope_interleave: RoPE layout in its indexers, where config.json does not say.
        switches: fields of IndexCacheConfig that the family has built in, otherwise than IndexCacheConfig's defaults.
    """

    model_type: str
    indexer_rope_interleave: bool
    switches: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("deepseek_v32", indexer_rope_interleave=False),
        Family("glm_moe_dsa", indexer_rope_interleave=True),
        Family("axk2", False, {"attention_output_gate": True, "masked_group_score": 0.0}),
    )
}

# Dense MLA models, and the family that each becomes once it has indexers.
DENSE_FAMILIES = {"glm4_moe_lite": FAMILIES["glm_moe_dsa"], "deepseek_v3": FAMILIES["deepseek_v32"]}

# Wider than any head's; a config's word alone is not enough to make so many angles.
_WIDEST_ROPE = 2**16
# Characters of a value in a message.
_LONGEST_VALUE = 200

# What transformers' configs raise at values of a wrong kind.
CONFIG_FAULTS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, StrictDataclassError)

_REFUSED = {
    **dict.fromkeys(
        DENSE_FAMILIES,
        "it has no lightning indexers to share: its layers are dense MLA, so indexers must be distilled into it first "
        "(`indexcache distill`)",
    ),
    **dict.fromkeys(
        ("dots3_note", "hy_v4", "mistral_large4"),
        "it has lightning indexers, but attention that IndexCacheForCausalLM does not have",
    ),
    **dict.fromkeys(
        ("deepseek_v4", "glm5_next", "minimax_m3_vl", "qwen4_exp"),
        "its indexers choose blocks or compressed entries, which is another method",
    ),
}


def known_families() -> str:
    """The accepted values of `model_type`, for messages."""
    return ", ".join([*FAMILIES, INDEXCACHE])


def family_of(config: dict[str, Any], location: str) -> Family:
    """The family of a source, by `model_type`; for an `indexcache` source the one it came from.

    Raises:
        ConversionError: unknown family, or one that is known not to work, with the reason.
    """
    model_type = config.get("model_type")
    if model_type == INDEXCACHE:
        model_type = config.get("source_model_type") or "deepseek_v32"
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = _REFUSED.get(str(model_type), "it is not known")
    raise ConversionError(
        f"{location}: model_type {model_type!r} cannot be converted: {reason} (accepted: {known_families()})"
    )


def is_dense_family(config: dict[str, Any]) -> bool:
    """Whether a config, of which nothing was checked, is of a family that indexers can be distilled into."""
    return str(config.get("model_type")) in DENSE_FAMILIES


def has_pattern(config: dict[str, Any]) -> bool:
    """Whether a source's config spells a share pattern in any way."""
    return any(config.get(name) is not None for name in PATTERN_FIELDS if name != "index_skip_topk_offset")


def load_config(fields: dict[str, Any], location: str) -> IndexCacheConfig:
    """`fields` as a checked IndexCacheConfig; ConversionError with the config's own message.

    transformers normalises nested fields (`rope_scaling`) in place: it gets a copy, so that `fields` stay as they are.
    """
    try:
        config: IndexCacheConfig = IndexCacheConfig.from_dict(copy.deepcopy(fields))
        _check_parts(config)
        return config
    except CONFIG_FAULTS as error:
        reason = str(error.__cause__ or error).strip()
        raise ConversionError(f"{location}: config.json cannot be used: {reason}") from error


def _check_parts(config: IndexCacheConfig) -> None:
    """Refuse what a config may say by its types and no model can be built of: activation, dtype and RoPE.

    Raises:
        ValueError: an activation that transformers does not have, a dtype that torch does not have, or RoPE
            parameters that give no finite angles.
    """
    import torch
    from transformers.activations import ACT2FN

    from ...modeling_indexcache.layers.rotary_embedding import IndexCacheRotaryEmbedding, yarn_softmax_factor

    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act={config.hidden_act!r} is no activation that transformers has")
    dtype = config.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={shown(config.dtype, _LONGEST_VALUE)} is no type of floats that torch has")
    rope = dict(config.rope_parameters or {})
    theta = rope.get("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise ValueError(f"rope_theta={shown(theta, _LONGEST_VALUE)} is no number")
    if config.qk_rope_head_dim > _WIDEST_ROPE:
        # The weights will contradict it; no memory is taken for it before.
        return
    try:
        with torch.device("cpu"):
            angles = IndexCacheRotaryEmbedding(config).inv_freq
        factor = yarn_softmax_factor(rope)
        is_finite = bool(angles.isfinite().all()) and math.isfinite(factor)
    except (*CONFIG_FAULTS, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"rope_parameters={shown(rope, _LONGEST_VALUE)} cannot be used ({reason})") from None
    if not is_finite:
        raise ValueError(f"rope_parameters={shown(rope, _LONGEST_VALUE)} give angles that are not finite")


def source_pattern(config: dict[str, Any], location: str) -> SharePattern:
    """The pattern that a source's config spells; all full when it spells none."""
    return load_config({**config, "model_type": INDEXCACHE}, location).share_pattern


def convert_config(
    source: dict[str, Any], pattern: SharePattern | None, dtype: str | None, auto_map: dict[str, str], location: str
) -> dict[str, Any]:
    """The config.json of the converted checkpoint.

    Every field of the source stays, under its name and with its value; its own spellings of the pattern and its code
    are replaced, `LOCAL_FIELDS` stay behind, and defaults that the source's family has and IndexCacheConfig has not
    are spelled out.

    Args:
        source: the source's config.json.
        pattern: the pattern to write; the source's own when `None`.
        dtype: the dtype that all weights are cast to (`"bfloat16"`, ...), or `None` when they stay as they are.
        auto_map: where the bundled code keeps its classes.
        location: how errors name the source.

    Raises:
        ConversionError: unknown family, a pattern that does not fit, or a config that does not validate.
    """
    family = family_of(source, location)
    num_layers = source.get("num_hidden_layers")
    if type(num_layers) is not int or num_layers < 1:
        raise ConversionError(f"{location}: config.json has num_hidden_layers={num_layers!r}: it must be a number")
    if "index_topk" in source and source["index_topk"] is None:
        raise ConversionError(f"{location}: config.json has index_topk=null: dense layers have no indexer to share")
    check_router(source, location)
    if pattern is None:
        pattern = source_pattern(source, location)
    try:
        pattern = SharePattern.parse(pattern, num_layers)
    except ValueError as error:
        raise ConversionError(f"{location}: {error}") from error
    replaced = {*PATTERN_FIELDS, *_SOURCE_CODE_FIELDS, *LOCAL_FIELDS}
    fields = {name: value for name, value in source.items() if name not in replaced}
    fields |= {
        "model_type": INDEXCACHE,
        "architectures": ["IndexCacheForCausalLM"],
        "auto_map": dict(auto_map),
        "source_model_type": family.model_type,
        "indexcache_version": code_version(),
        "indexer_rope_interleave": source.get("indexer_rope_interleave", family.indexer_rope_interleave),
        "index_share_pattern": pattern.letters,
        "indexer_types": pattern.indexer_types,
    }
    if dtype is not None:
        fields.pop("torch_dtype", None)
        fields.pop("quantization_config", None)
        fields["dtype"] = dtype
    config = load_config(fields, location)
    if source["model_type"] != INDEXCACHE:
        fields |= family.switches | _family_defaults(source, family, config, location)
        load_config(fields, location)
    return fields


def check_router(source: dict[str, Any], location: str) -> None:
    """Refuse a router that would be computed as another: transformers' classes of these families ignore the fields."""
    for name, known in ROUTER.items():
        value = source.get(name)
        if value is not None and value != known:
            raise ConversionError(
                f"{location}: config.json has {name}={value!r}, and IndexCacheForCausalLM routes by {known!r} alone: "
                f"if the model was trained so, it cannot be converted; if the field is stale, set it to {known!r}"
            )


def convert_dense_config(
    source: dict[str, Any],
    pattern: SharePattern,
    indexer: dict[str, int],
    auto_map: dict[str, str],
    location: str,
) -> dict[str, Any]:
    """The config.json that a dense MLA checkpoint gets with its indexers.

    Args:
        source: the dense checkpoint's config.json.
        pattern: the layers that get an indexer.
        indexer: `index_topk`, `index_n_heads` and `index_head_dim` of the new indexers.
        auto_map: where the bundled code keeps its classes.
        location: how errors name the source.

    Raises:
        ConversionError: no dense family, no query latent for indexers to read, or a config that does not validate.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(source.get("model_type"))
    if not is_dense_family(source):
        raise ConversionError(
            f"{location}: model_type {model_type!r} is no dense family that indexers can be distilled into "
            f"(accepted: {', '.join(DENSE_FAMILIES)})"
        )
    try:
        native = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(source)).to_dict()
    except CONFIG_FAULTS as error:
        raise ConversionError(f"{location}: config.json is no valid {model_type} config: {error}") from error
    if native.get("q_lora_rank") is None:
        raise ConversionError(
            f"{location}: config.json has q_lora_rank=null: indexers read the query latent, which this model lacks"
        )
    known = {entry.name for entry in dataclasses.fields(IndexCacheConfig)} - _DERIVED_FIELDS
    spelled = {name: value for name, value in native.items() if name in known and value is not None}
    fields = {**spelled, **source, **indexer, "model_type": DENSE_FAMILIES[model_type].model_type}
    return convert_config(fields, pattern, None, auto_map, location)


def _family_defaults(
    source: dict[str, Any], family: Family, config: IndexCacheConfig, location: str
) -> dict[str, Any]:
    """The family's own values of fields that would otherwise fall to other defaults of IndexCacheConfig."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        native = CONFIG_MAPPING[family.model_type].from_dict(
            copy.deepcopy({name: value for name, value in source.items() if name not in PATTERN_FIELDS})
        )
    except CONFIG_FAULTS as error:
        raise ConversionError(f"{location}: config.json is no valid {family.model_type} config: {error}") from error
    names = {entry.name for entry in dataclasses.fields(config)} - _DERIVED_FIELDS
    return {
        name: getattr(native, name)
        for name in sorted(names)
        if hasattr(native, name) and getattr(native, name) != getattr(config, name)
    }


# ---- tensors ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A tensor that a checkpoint must hold; `quantisable` ones may be fp8 with scales beside them."""

    shape: tuple[int, ...]
    quantisable: bool = False


def layer_of(name: str) -> tuple[int, str] | None:
    """The layer a tensor belongs to and its name there; `None` outside the layers."""
    match = _LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def indexer_layer(name: str) -> int | None:
    """The layer whose lightning indexer a tensor belongs to; `None` for all other tensors."""
    place = layer_of(name)
    return place[0] if place and place[1].startswith(INDEXER) else None


def expected_indexer(config: IndexCacheConfig, layer: int) -> dict[str, ExpectedTensor]:
    """The tensors of one layer's lightning indexer."""
    heads, width, query_rank = config.index_n_heads, config.index_head_dim, config.q_lora_rank or 0
    prefix = f"model.layers.{layer}.{INDEXER}"
    return {
        f"{prefix}wq_b.weight": ExpectedTensor((heads * width, query_rank), True),
        f"{prefix}wk.weight": ExpectedTensor((width, config.hidden_size), True),
        f"{prefix}weights_proj.weight": ExpectedTensor((heads, config.hidden_size), True),
        f"{prefix}k_norm.weight": ExpectedTensor((width,)),
        f"{prefix}k_norm.bias": ExpectedTensor((width,)),
    }


def expected_tensors(config: IndexCacheConfig) -> dict[str, ExpectedTensor]:
    """Every tensor outside indexers and MTP layers that a checkpoint of this config holds, with its shape."""
    hidden = config.hidden_size
    expected = {
        "model.embed_tokens.weight": ExpectedTensor((config.vocab_size, hidden)),
        "model.norm.weight": ExpectedTensor((hidden,)),
    }
    if not config.tie_word_embeddings:
        expected["lm_head.weight"] = ExpectedTensor((config.vocab_size, hidden))
    for layer, kind in enumerate(config.mlp_layer_types or []):
        prefix = f"model.layers.{layer}."
        expected |= _layer_norm(config, f"{prefix}input_layernorm.", True)
        expected |= _layer_norm(config, f"{prefix}post_attention_layernorm.", kind == "sparse")
        expected |= _attention(config, f"{prefix}self_attn.")
        if kind == "sparse":
            expected |= _experts(config, f"{prefix}mlp.")
        else:
            expected |= _gated_mlp(f"{prefix}mlp.", hidden, config.intermediate_size)
    return expected


def _layer_norm(config: IndexCacheConfig, prefix: str, may_be_gated: bool) -> dict[str, ExpectedTensor]:
    hidden, rank = config.hidden_size, config.gated_norm_rank
    if rank is None or not may_be_gated:
        return {f"{prefix}weight": ExpectedTensor((hidden,))}
    return {
        f"{prefix}norm.weight": ExpectedTensor((hidden,)),
        f"{prefix}W_down.weight": ExpectedTensor((rank, hidden)),
        f"{prefix}W_up.weight": ExpectedTensor((hidden, rank)),
    }


def _attention(config: IndexCacheConfig, prefix: str) -> dict[str, ExpectedTensor]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    query_rank, latent, rope = config.q_lora_rank or 0, config.kv_lora_rank, config.qk_rope_head_dim
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    gate, inputs = (value, 2) if config.attention_output_gate else (0, 1)
    expected = {
        f"{prefix}q_a_proj.weight": ExpectedTensor((query_rank, hidden), True),
        f"{prefix}q_a_layernorm.weight": ExpectedTensor((query_rank,)),
        f"{prefix}q_b_proj.weight": ExpectedTensor((heads * (nope + rope + gate), inputs * query_rank), True),
        f"{prefix}kv_a_proj_with_mqa.weight": ExpectedTensor((latent + rope, hidden), True),
        f"{prefix}kv_a_layernorm.weight": ExpectedTensor((latent,)),
        f"{prefix}kv_b_proj.weight": ExpectedTensor((heads * (nope + value), latent), True),
        f"{prefix}o_proj.weight": ExpectedTensor((hidden, heads * value), True),
    }
    if config.attention_bias:
        expected[f"{prefix}q_a_proj.bias"] = ExpectedTensor((query_rank,))
        expected[f"{prefix}kv_a_proj_with_mqa.bias"] = ExpectedTensor((latent + rope,))
        expected[f"{prefix}o_proj.bias"] = ExpectedTensor((hidden,))
    return expected


def _experts(config: IndexCacheConfig, prefix: str) -> dict[str, ExpectedTensor]:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    shared = config.shared_experts_intermediate_size or width * config.n_shared_experts
    expected = {
        f"{prefix}gate.weight": ExpectedTensor((config.n_routed_experts, hidden)),
        f"{prefix}gate.e_score_correction_bias": ExpectedTensor((config.n_routed_experts,)),
    }
    if shared:
        expected |= _gated_mlp(f"{prefix}shared_experts.", hidden, shared)
    for expert in range(config.n_routed_experts):
        expected |= _gated_mlp(f"{prefix}experts.{expert}.", hidden, width)
    return expected


def _gated_mlp(prefix: str, hidden: int, width: int) -> dict[str, ExpectedTensor]:
    return {
        f"{prefix}gate_proj.weight": ExpectedTensor((width, hidden), True),
        f"{prefix}up_proj.weight": ExpectedTensor((width, hidden), True),
        f"{prefix}down_proj.weight": ExpectedTensor((hidden, width), True),
    }
