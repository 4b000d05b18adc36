"""Configuration of IndexCache models: every DeepSeek-V3.2 / GLM-5 field under its own name, plus the share pattern."""

import transformers
from packaging.version import Version

MINIMUM_TRANSFORMERS = "5.23.0"
if Version(transformers.__version__) < Version(MINIMUM_TRANSFORMERS):
    raise ImportError(
        f"IndexCache needs transformers {MINIMUM_TRANSFORMERS} or newer and found {transformers.__version__}: "
        "run `pip install -U transformers`"
    )

import os  # noqa: E402
from typing import Any, ClassVar  # noqa: E402

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers.configuration_utils import PreTrainedConfig  # noqa: E402

from .architecture_attribute import offer_architecture  # noqa: E402
from .hub_code import AUTO_MAP, code_version, write_hub_code  # noqa: E402
from .share_pattern import SharePattern  # noqa: E402

# Here, because the server of transformers has read a checkpoint's config when it looks, and not yet its model's code.
offer_architecture()

LARGEST_FP32 = 3.4028234663852886e38
# Every way a config may spell its pattern, besides the canonical first one.
PATTERN_FIELDS = (
    "index_share_pattern",
    "indexer_types",
    "index_topk_pattern",
    "index_topk_freq",
    "index_skip_topk_offset",
)


@strict
class IndexCacheConfig(PreTrainedConfig):
    r"""Configuration of an `IndexCacheModel`. Defaults are those of DeepSeek-V3.2.

    The pattern may also be given as `indexer_types` (a list of `full`/`shared`), `index_topk_pattern` (a string or
    list) or `index_topk_freq` with `index_skip_topk_offset` (layer i is full iff
    `max(i - offset + 1, 0) % freq == 0`, default offset 2, as vLLM and transformers read them). Spellings that
    disagree are refused. Saved configs hold `index_share_pattern` and, for other engines, `indexer_types`.

    Args:
        index_share_pattern: one character a decoder layer: `F` runs its lightning indexer, `S` reuses the selection
            of the nearest `F` before it. All `F` (plain DSA) when no spelling is given.
        index_topk: keys that the indexer selects for each query. `None` turns sparse attention and every indexer
            off: the model is then dense MLA, as GLM-4.7-Flash (`glm4_moe_lite`).
        index_n_heads: indexer query heads.
        index_head_dim: width of an indexer head.
        index_k_norm_eps: epsilon of the LayerNorm on the indexer's keys.
        indexer_rope_interleave: RoPE layout in the indexer: `False` half-split (DeepSeek-V3.2), `True` interleaved
            (GLM-5).
        rope_interleave: RoPE layout in the main attention: `True` for DeepSeek and GLM.
        q_lora_rank: rank of the query latent; `None` projects queries directly and forbids indexers.
        mla_norm_eps: epsilon of the RMSNorms on the query and key-value latents.
        gated_norm_rank: rank of the gates on the norms before attention and before experts (A.X-K2); `None` has none.
        attention_output_gate: whether `q_b_proj` also makes a gate on each head's output, and reads the query latent
            before its norm too (A.X-K2).
        n_group: router groups; `None` skips the choice of groups.
        topk_group: groups that stay eligible for each token.
        masked_group_score: choice score given to experts of the other groups; `None` is minus infinity.
        mlp_layer_types: `dense` or `sparse` a layer; derived from `first_k_dense_replace` and `moe_layer_freq` when
            not given.
        first_k_dense_replace: leading layers with a dense MLP.
        moe_layer_freq: one layer in so many has experts, after the leading dense ones.
        shared_experts_intermediate_size: width of the shared expert; `moe_intermediate_size * n_shared_experts`
            when `None`.
        source_model_type: the family this checkpoint came from (`deepseek_v32`, `glm_moe_dsa`, ...), for export.
        indexer_fp8: score with e4m3 queries and keys (Hadamard-rotated, scaled by token with powers of two), as
            DeepSeek-V3.2's own inference does; changes the selection near its threshold, also because Hopper's e4m3
            products accumulate in fewer bits than fp32 (1e-4 of their rms). Off by default.
        indexcache_version: the release whose code lies beside the checkpoint, written on saving.
    """

    model_type = "indexcache"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {"num_local_experts": "n_routed_experts"}

    base_model_tp_plan = {
        "layers.*.self_attn.q_b_proj": "colwise",
        "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
        "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan: ClassVar[Any] = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int = 128
    n_shared_experts: int = 1
    shared_experts_intermediate_size: int | None = None
    n_routed_experts: int = 256
    output_router_logits: bool = False
    routed_scaling_factor: float = 2.5
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    qk_nope_head_dim: int = 128
    n_group: int | None = 8
    topk_group: int | None = 4
    masked_group_score: float | None = None
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 163840
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    mla_norm_eps: float = 1e-6
    gated_norm_rank: int | None = None
    attention_output_gate: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    rope_interleave: bool = True
    mlp_layer_types: list[str] | None = None
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    index_share_pattern: str | None = None
    index_topk: int | None = 2048
    index_head_dim: int = 128
    index_n_heads: int = 64
    index_k_norm_eps: float = 1e-6
    indexer_rope_interleave: bool = False
    indexer_fp8: bool = False
    source_model_type: str | None = None
    indexcache_version: str | None = None
    head_dim: int = 64
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        spellings = {name: kwargs.pop(name, None) for name in PATTERN_FIELDS[1:]}
        pattern = _agreed_pattern({"index_share_pattern": self.index_share_pattern, **spellings}, self)
        self.index_share_pattern = pattern.letters
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        # RoPE turns only the rope slice, and transformers' RoPE initialisers read `head_dim`.
        self.head_dim = self.qk_rope_head_dim
        if self.mlp_layer_types is None:
            self.mlp_layer_types = [
                "sparse" if layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0 else "dense"
                for layer in range(self.num_hidden_layers)
            ]
        # The cache class of each layer follows from this; shared layers never allocate the index keys it offers.
        kind = "full_attention" if self.index_topk is None else "indexed_attention"
        self.layer_types = [kind] * self.num_hidden_layers
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def share_pattern(self) -> SharePattern:
        """The pattern, checked against the number of layers."""
        return SharePattern.parse(self.index_share_pattern or "", self.num_hidden_layers)

    @property
    def indexer_types(self) -> list[str]:
        """`full` or `shared` a layer, derived from `index_share_pattern`: the spelling of other engines."""
        return self.share_pattern.indexer_types

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`; a pattern among `kwargs`, in any spelling, replaces the one on file."""
        override = {name: kwargs.pop(name) for name in PATTERN_FIELDS if name in kwargs}
        if override:
            on_file = {name: value for name, value in config_dict.items() if name not in PATTERN_FIELDS}
            config_dict = {**on_file, **override}
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As `PreTrainedConfig.save_pretrained`; the model's code goes along, for `trust_remote_code=True`.

        Saving a model saves its config between noting which files are new and uploading them, so this one place
        serves `save_pretrained` and `push_to_hub` of models too.
        """
        self.auto_map, self.indexcache_version = dict(AUTO_MAP), code_version()
        write_hub_code(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-ready values, with `indexer_types` beside the pattern for other engines."""
        return {**super().to_dict(), "indexer_types": self.indexer_types}

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that `save_pretrained` writes: those that differ from the defaults, and always the pattern."""
        return {
            **super().to_diff_dict(),
            "index_share_pattern": self.index_share_pattern,
            "indexer_types": self.indexer_types,
        }

    def validate_indexer(self) -> None:
        """The indexer's sizes fit the attention's."""
        if self.index_topk is None:
            if "S" in (self.index_share_pattern or ""):
                raise ValueError(
                    "index_topk=None makes every layer dense, so there is no selection to share: "
                    f"set index_topk, or drop index_share_pattern (got {self.index_share_pattern!r})"
                )
            return
        if self.index_topk < 1:
            raise ValueError(f"index_topk must be at least 1, or None for dense attention (got {self.index_topk})")
        if self.q_lora_rank is None:
            raise ValueError(
                "the indexer reads the query latent: set q_lora_rank, or index_topk=None for dense layers"
            )
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(
                f"index_head_dim ({self.index_head_dim}) must be at least qk_rope_head_dim ({self.qk_rope_head_dim}): "
                "RoPE turns that many of its entries"
            )

    def validate_numbers(self) -> None:
        """Numbers that arithmetic in fp32 can hold."""
        for name in (
            "routed_scaling_factor",
            "rms_norm_eps",
            "mla_norm_eps",
            "index_k_norm_eps",
            "masked_group_score",
        ):
            value = getattr(self, name)
            if value is not None and not abs(value) <= LARGEST_FP32:
                raise ValueError(f"{name} must be a finite number of fp32 (got {value})")

    def validate_gates(self) -> None:
        """Gates have a rank, and a query latent to be made of."""
        if self.gated_norm_rank is not None and self.gated_norm_rank < 1:
            raise ValueError(f"gated_norm_rank must be at least 1, or None for no gates (got {self.gated_norm_rank})")
        if self.attention_output_gate and self.q_lora_rank is None:
            raise ValueError("attention_output_gate is made of the query latent: set q_lora_rank")

    def validate_router(self) -> None:
        """Each token has experts, groups divide the experts and leave enough of them to choose from."""
        if "sparse" not in (self.mlp_layer_types or []):
            return
        eligible, place = self.n_routed_experts, f"n_routed_experts={self.n_routed_experts}"
        if self.n_group is not None:
            if self.n_group < 1 or self.n_routed_experts % self.n_group:
                raise ValueError(f"n_group ({self.n_group}) must divide n_routed_experts ({self.n_routed_experts})")
            if self.topk_group is None or not 1 <= self.topk_group <= self.n_group:
                raise ValueError(f"topk_group must lie in 1 .. n_group={self.n_group} (got {self.topk_group})")
            eligible = self.n_routed_experts // self.n_group * self.topk_group
            place = f"the {eligible} experts that {self.topk_group} of {self.n_group} groups hold"
        if not 1 <= self.num_experts_per_tok <= eligible:
            raise ValueError(
                f"num_experts_per_tok must be at least 1 and at most {place} (got {self.num_experts_per_tok})"
            )


def _agreed_pattern(spellings: dict[str, Any], config: "IndexCacheConfig") -> SharePattern:
    """The one pattern that all given spellings mean; ValueError naming two that disagree."""
    num_layers = config.num_hidden_layers
    read: dict[str, SharePattern] = {}
    for name in ("index_share_pattern", "indexer_types", "index_topk_pattern"):
        if spellings[name] is not None:
            read[name] = SharePattern.parse(spellings[name], num_layers)
    if spellings["index_topk_freq"] is not None:
        offset = 2 if spellings["index_skip_topk_offset"] is None else spellings["index_skip_topk_offset"]
        schedule = SharePattern.from_frequency(num_layers, spellings["index_topk_freq"], offset)
        read[f"index_topk_freq={spellings['index_topk_freq']} with index_skip_topk_offset={offset}"] = schedule
    if not read:
        return SharePattern.all_full(num_layers)
    (first, pattern), *others = read.items()
    for name, other in others:
        if other != pattern:
            layer = next(i for i in range(num_layers) if other.is_full(i) != pattern.is_full(i))
            raise ValueError(
                f"{first} and {name} disagree from layer {layer} on ({pattern} against {other}): "
                "keep one of them, index_share_pattern for choice"
            )
    return pattern


__all__ = ["IndexCacheConfig"]
