"""An export leaves no field to an engine's default: each engine's config reader, restated from its source.

Read in the released wheels vllm 0.33.0, sglang 0.5.23, megatron-bridge 0.6.2 with megatron-core 0.19.2, in the
repository of TensorRT-LLM at the commits below, and in the installed transformers. A reader asks for each field as its
engine does, with the engine's own default where it has one.
"""

import dataclasses
import inspect
import json
import re

import pytest
from testing.released_configs import RELEASED
from testing.tiny_models import tiny_model
from transformers import DeepseekV32Config, GlmMoeDsaConfig
from transformers.models.deepseek_v32 import modeling_deepseek_v32
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa

from indexcache import IndexCacheConfig
from indexcache.conversion.convert.families import convert_config, load_config
from indexcache.conversion.io.sources import ConversionError
from indexcache.conversion.publish.bundle import AUTO_MAP
from indexcache.conversion.publish.export import ENGINES, _native_fields, export
from indexcache.conversion.publish.export_engines import Contents

GLM = {"source_model_type": "glm_moe_dsa", "indexer_rope_interleave": True}
DEEPSEEK = {"source_model_type": "deepseek_v32"}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 20000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# What every engine takes from the config without a default.
SHAPE = """
    vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads q_lora_rank
    kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts n_shared_experts num_experts_per_tok
    rms_norm_eps index_topk index_n_heads index_head_dim
""".split()  # noqa: SIM905
_NEEDED = object()


class LeftToDefault(Exception):
    pass


class Fields:
    """A config.json that is asked for fields: `strictly`, each must be there, whatever default the engine has."""

    def __init__(self, content, strictly=True):
        self.content, self.strictly, self.asked = content, strictly, set()

    def __call__(self, name, default=_NEEDED):
        self.asked.add(name)
        if name in self.content:
            return self.content[name]
        if self.strictly or default is _NEEDED:
            raise LeftToDefault(name)
        return default

    def shape(self):
        return {name: self(name) for name in SHAPE}


def layers_with_experts(ask, every):
    return [layer >= ask("first_k_dense_replace") and layer % every == 0 for layer in range(ask("num_hidden_layers"))]


def by_frequency(depth, freq, offset):
    return "".join("F" if max(layer - offset + 1, 0) % freq == 0 else "S" for layer in range(depth))


def vllm(ask):
    """What vLLM 0.33.0 takes a checkpoint for.

    models/deepseek_v32/attention.py `DeepseekV32Attention.__init__` (pattern, both RoPEs), nvidia/model.py
    `DeepseekV32DecoderLayer.__init__` (experts by layer), model_executor/models/deepseek_v2.py
    `DeepseekV2MoE.__init__` and `_get_moe_router_dtype`, model_executor/models/utils.py
    `get_spec_layer_idx_from_weight_name`, transformers_utils/model_arch_config_convertor.py (heads), and
    v1/spec_decode/llm_base_proposer.py.
    """
    depth, pattern = ask("num_hidden_layers"), ask("index_topk_pattern", None)
    if pattern is None:
        pattern = by_frequency(depth, ask("index_topk_freq", 1), ask("index_skip_topk_offset", 2))
    noaux = ask("topk_method", None) == "noaux_tc"
    fp32 = ask("model_type") == "glm_moe_dsa", ask("moe_router_dtype", None) == "float32"
    ask("num_key_value_heads", None)
    assert ask("hidden_act") == "silu"
    assert ask("architectures")[0] in ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")
    return ask.shape() | {
        "pattern": pattern,
        "experts": layers_with_experts(ask, ask("moe_layer_freq", 1)),
        "router": (ask("scoring_func", "softmax"), noaux, ask("norm_topk_prob"), ask("routed_scaling_factor", 1.0)),
        "groups": (ask("n_group", 1), ask("topk_group", 1)),
        "router_fp32": any(fp32),
        "indexer_interleaved": ask("indexer_rope_interleave", False),
        "rope": ask("rope_parameters"),
        "length": ask("max_position_embeddings", 8192),
        "mtp": (ask("num_nextn_predict_layers", 0), ask("index_share_for_mtp_iteration", False)),
        "tied": ask("tie_word_embeddings", False),
        "dtype": ask("dtype"),
    }


def sglang(ask):
    """What SGLang 0.5.23 takes a checkpoint for.

    srt/configs/model_config.py `dsa_layer_skips_topk`, srt/models/deepseek_v2.py `MoEGate`, `DeepseekV2MoE`,
    `DeepseekV2AttentionMLA`, `DeepseekV2DecoderLayer` (`__init__` and `_is_layer_sparse`), `DeepseekV2ForCausalLM`;
    srt/speculative/eagle_worker_v2.py, srt/arg_groups/model_hook.py.
    """
    kinds, pattern = ask("indexer_types", None), ask("index_topk_pattern", None)
    if kinds is not None:
        pattern = "".join("S" if kind == "shared" else "F" for kind in kinds)
    elif pattern is None:
        pattern = by_frequency(
            ask("num_hidden_layers"), ask("index_topk_freq", 1), ask("index_skip_topk_offset", None) or 2
        )
    ask("pad_token_id"), ask("num_key_value_heads", None)
    assert ask("hidden_act") == "silu"
    assert ask("architectures")[0] in ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")
    assert ask("rope_interleave", True)
    ask("model_type")  # which config class reads all this
    return ask.shape() | {
        "pattern": pattern,
        "experts": layers_with_experts(ask, ask("moe_layer_freq")),
        "router": (
            ask("scoring_func"),
            ask("topk_method") == "noaux_tc",
            ask("norm_topk_prob"),
            ask("routed_scaling_factor"),
        ),
        "groups": (ask("n_group"), ask("topk_group")),
        "router_fp32": True,
        "indexer_interleaved": ask("indexer_rope_interleave", False),
        "rope": ask("rope_parameters"),
        "length": ask("max_position_embeddings"),
        "mtp": (ask("num_nextn_predict_layers", 0), ask("index_share_for_mtp_iteration", False)),
        "tied": ask("tie_word_embeddings"),
        "dtype": ask("dtype"),
    }


def as_one_rope(fields):
    return {**fields, "rope_type": fields.get("rope_type") or fields["type"], "type": None}


def trtllm(ask):
    """What TensorRT-LLM's main branch takes a checkpoint for; its release was not read.

    tensorrt_llm/llmapi/llm_args.py at 0004396720054fd8 `DeepSeekSparseAttentionConfig._is_full_indexer_layer`,
    _torch/model_config.py at 008e0af8980fc560 `ModelConfig.from_pretrained`, _torch/pyexecutor/config_utils.py at
    00679c66c3e38f6d `load_pretrained_config`, _torch/models/modeling_deepseekv3.py (an undated version)
    `DeepseekV3DecoderLayer` and `Deepseekv3RoutingImpl`: sigmoid with a bias, weights always normalised.
    """
    depth, pattern = ask("num_hidden_layers"), ask("index_topk_pattern", None)
    if pattern is None:
        pattern = by_frequency(depth, max(ask("index_topk_freq", 1) or 1, 1), ask("index_skip_topk_offset", 2))
    pattern = "F" + pattern[1:].upper()
    assert ask("architectures")[0] in ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")
    ask("model_type"), ask("num_key_value_heads")
    rope, scaling = ask("rope_parameters", None), ask("rope_scaling", None)
    legacy = {"rope_theta": ask("rope_theta", 10000.0), **(scaling or {"rope_type": "default"})}
    assert as_one_rope(legacy) == as_one_rope(rope), "releases before transformers 5 read the one, later the other"
    return ask.shape() | {
        "pattern": pattern,
        "experts": layers_with_experts(ask, ask("moe_layer_freq")),
        "router": ("sigmoid", True, True, ask("routed_scaling_factor")),
        "groups": (ask("n_group"), ask("topk_group")),
        "router_fp32": True,
        "indexer_interleaved": ask("indexer_rope_interleave", False),
        "rope": rope,
        "length": ask("max_position_embeddings"),
        "mtp": (ask("num_nextn_predict_layers"), ask("index_share_for_mtp_iteration", None)),
        "tied": False,
        "dtype": ask("dtype"),
    }


def megatron(ask):
    """What Megatron-Bridge 0.6.2 with Megatron-Core 0.19.2 takes a GLM-5 checkpoint for.

    bridge/models/glm_moe_dsa/glm5_bridge.py `GLM5Bridge.provider_bridge`, models/conversion/model_bridge.py
    `CONFIG_MAPPING` and `hf_config_to_provider_kwargs`, core/transformer/experimental_attention_variant/dsa.py
    `is_dsa_skip_topk_layer` (layers counted from 1), core/transformer/moe/moe_utils.py (weights always normalised).
    """
    freq, offset = ask("index_topk_freq", 1), ask("index_skip_topk_offset", 0)
    numbers = range(1, ask("num_hidden_layers") + 1)
    full = [freq <= 1 or max(number - max(offset, 1), 0) % freq == 0 for number in numbers]
    assert ask("architectures")[0] == "GlmMoeDsaForCausalLM" and ask("model_type") == "glm_moe_dsa"
    assert ask("hidden_act", "silu") == "silu"
    assert ask("scoring_func", None) in (None, "sigmoid")  # overwritten with sigmoid
    assert not ask("attention_bias", False) and not ask("mlp_bias", False)
    for name in ("num_key_value_heads", "initializer_range", "attention_dropout"):
        ask(name, None)
    ask("num_nextn_predict_layers", 0)  # the bridge then drops the layers: mtp_num_layers=None
    return ask.shape() | {
        "pattern": "".join("F" if is_full else "S" for is_full in full),
        "experts": layers_with_experts(ask, 1),
        "router": ("sigmoid", True, True, ask("routed_scaling_factor", None)),
        "groups": (ask("n_group", None), ask("topk_group", None)),
        "router_fp32": True,
        "indexer_interleaved": ask("indexer_rope_interleave"),
        "rope": {"rope_type": "default", "rope_theta": ask("rope_parameters")["rope_theta"]},
        "length": ask("max_position_embeddings", None),
        "mtp": (0, False),
        "tied": ask("tie_word_embeddings", False),
        "dtype": ask("dtype", "float32"),
    }


READERS = {"vllm": vllm, "sglang": sglang, "trtllm": trtllm, "megatron": megatron}


def as_ours(config: IndexCacheConfig):
    """The same facts of the checkpoint that is exported."""
    shape = Fields(config.to_dict()).shape()
    return shape | {
        "pattern": config.index_share_pattern,
        "experts": [kind == "sparse" for kind in config.mlp_layer_types],
        "router": ("sigmoid", True, config.norm_topk_prob, config.routed_scaling_factor),
        "groups": (config.n_group, config.topk_group),
        "router_fp32": True,
        "indexer_interleaved": config.indexer_rope_interleave,
        "rope": config.rope_parameters,
        "length": config.max_position_embeddings,
        "mtp": (0, False),
        "tied": False,
        "dtype": "float32",
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports a tiny model as transformers saves one: IndexCacheConfig's defaults are left out of its config.json."""
    made = {}

    def make(engine, pattern="FSFS", **changes):
        key = (engine, pattern, repr(changes))
        if key not in made:
            folder = tmp_path_factory.mktemp("export")
            model = tiny_model(num_hidden_layers=len(pattern), index_share_pattern=pattern, **changes)
            model.save_pretrained(folder / "checkpoint")
            written = export(folder / "checkpoint", folder / "out", engine)
            made[key] = json.loads((written / "config.json").read_text()), model.config
        fields, config = made[key]
        return dict(fields), config

    return make


@pytest.mark.parametrize("family", [GLM, DEEPSEEK], ids=["glm", "deepseek"])
@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
@pytest.mark.parametrize("rope", [None, YARN], ids=["plain", "yarn"])
def test_servers_read_the_model_that_was_exported(exported, engine, family, rope):
    changes = {"rope_parameters": rope} if rope else {}
    # Values that are nobody's default, and layers with experts at 2 and 4.
    fields, config = exported(
        engine, "FSSFS", routed_scaling_factor=1.7, rms_norm_eps=3e-6, moe_layer_freq=2, **family, **changes
    )
    ask = Fields(fields)
    assert READERS[engine](ask) == as_ours(config)
    assert ask.asked == ENGINES[engine].reads


@pytest.mark.parametrize("pattern", ["FFFF", "FSSS", "FFSSS", "FFFSSSFSSSFS"])
def test_megatron_reads_the_model_that_was_exported(exported, pattern):
    fields, config = exported("megatron", pattern, routed_scaling_factor=1.7, **GLM)
    ask = Fields(fields)
    assert megatron(ask) == as_ours(config)
    assert ask.asked == ENGINES["megatron"].reads
    # Its bridge reads through transformers' config class.
    assert "".join(kind[0].upper() for kind in GlmMoeDsaConfig(**fields).indexer_types) == pattern


@pytest.mark.parametrize(
    ("engine", "field"), [(engine, field) for engine in READERS for field in sorted(ENGINES[engine].reads)]
)
def test_a_field_that_is_taken_out_is_missed(exported, engine, field):
    fields, config = exported(engine, **GLM)
    assert READERS[engine](Fields(fields)) == as_ours(config)
    del fields[field]
    with pytest.raises(LeftToDefault, match=field):
        READERS[engine](Fields(fields))
    with pytest.raises(ConversionError, match=f"{ENGINES[engine].title} reads {field}, which would be left to"):
        ENGINES[engine].check_complete(fields, "here")


@pytest.mark.parametrize(
    ("family", "module", "reader"),
    [(GLM, modeling_glm_moe_dsa, GlmMoeDsaConfig), (DEEPSEEK, modeling_deepseek_v32, DeepseekV32Config)],
    ids=["glm", "deepseek"],
)
def test_transformers_model_code_reads_only_what_is_written(exported, family, module, reader):
    """Its classes are here: every field that the installed model's code names is in the export, with our value."""
    fields, config = exported("transformers", "FFFF", routed_scaling_factor=1.7, rms_norm_eps=3e-6, **family)
    declared = {entry.name for entry in dataclasses.fields(reader)}
    named = set(re.findall(r"config\.(\w+)", inspect.getsource(module))) & declared
    assert len(named) > 25
    assert named <= fields.keys()
    assert named - {"indexer_types"} <= ENGINES["transformers"].reads
    native = reader(**fields)
    for name in named:
        assert getattr(native, name) == getattr(config, name), name


@pytest.mark.parametrize("field", sorted(ENGINES["transformers"].reads))
def test_a_field_of_transformers_that_is_taken_out_is_missed(exported, field):
    fields, _ = exported("transformers", **GLM)
    del fields[field]
    with pytest.raises(ConversionError, match=f"transformers reads {field}, which would be left to its defaults"):
        ENGINES["transformers"].check_complete(fields, "here")


def test_a_config_without_the_fields_fails_or_errs_in_each_server(exported):
    """Why they are written: the engines' defaults are other models, or an AttributeError."""
    fields, config = exported("vllm", **DEEPSEEK)
    for name in ("scoring_func", "topk_method", "moe_layer_freq", "moe_router_dtype", "index_topk_pattern"):
        del fields[name]
    read, ours = vllm(Fields(fields, strictly=False)), as_ours(config)
    assert {name for name in ours if read[name] != ours[name]} == {"pattern", "router", "router_fp32"}
    assert read["router"][:2] == ("softmax", False)
    for reader in (sglang, trtllm):
        with pytest.raises(LeftToDefault, match="moe_layer_freq"):
            reader(Fields({**fields, "rope_scaling": None, "rope_theta": 10000.0}, strictly=False))


@pytest.mark.parametrize(
    ("engines", "changes", "complaint"),
    [
        (("vllm", "sglang", "trtllm", "megatron"), {"attention_bias": True}, "attention_bias=true, and its attention"),
        (("vllm", "sglang", "trtllm"), {"hidden_act": "gelu"}, "hidden_act='gelu', and it has 'silu' alone"),
        (("vllm", "megatron"), {"tie_word_embeddings": True}, "store lm_head.weight and set it false"),
        (("trtllm", "megatron"), {"norm_topk_prob": False}, "norm_topk_prob=false, and it normalises"),
        (
            ("vllm", "sglang", "trtllm", "megatron"),
            {"mlp_layer_types": ["dense", "sparse", "dense", "dense"]},
            "mlp_layer_types, and it has only",
        ),
        (("megatron",), {"moe_layer_freq": 2}, "only leading dense layers"),
        (("megatron",), {"rope_parameters": YARN}, "rope_type='yarn', and its bridge"),
        (
            ("vllm",),
            {"rope_parameters": {**YARN, "attention_factor": 1.0}},
            "attention_factor=1.0, which it takes for",
        ),
        (
            ("vllm", "sglang", "trtllm"),
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
            "rope_type='linear', and it takes every scaling for yarn",
        ),
    ],
)
def test_what_an_engine_would_compute_otherwise_is_refused(tmp_path, engines, changes, complaint):
    model = tiny_model(index_share_pattern="FSFS", **GLM, **changes)
    model.save_pretrained(tmp_path / "checkpoint")
    for engine in ENGINES:
        if engine in engines:
            reason = f"cannot be exported for {ENGINES[engine].title}: .*{complaint}"
            with pytest.raises(ConversionError, match=reason):
                export(tmp_path / "checkpoint", tmp_path / engine, engine)
            assert not (tmp_path / engine).exists()
        elif engine != "megatron" or "rope_parameters" not in changes:
            export(tmp_path / "checkpoint", tmp_path / engine, engine)


def test_megatron_has_no_bridge_for_deepseek(tmp_path):
    tiny_model(index_share_pattern="FFFF", **DEEPSEEK).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ConversionError, match="has no bridge for deepseek_v32 in its release"):
        export(tmp_path / "checkpoint", tmp_path / "out", "megatron")


@pytest.mark.parametrize("engine", READERS)
@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_read_as_what_they_are(name, engine):
    fields = convert_config(RELEASED[name], None, None, AUTO_MAP, name)
    config, native = load_config(fields, name), _native_fields(fields, name)
    contents = Contents((), mtp_layers=1, is_quantised="quantization_config" in fields, dtype="bfloat16")
    if engine == "megatron" and (contents.is_quantised or native["model_type"] == "deepseek_v32"):
        with pytest.raises(ConversionError, match=r"has no bridge for deepseek_v32|quantised weights, which"):
            ENGINES[engine].config(native, config, contents, name)
        return
    read = READERS[engine](Fields(ENGINES[engine].config(native, config, contents, name)))
    ours = as_ours(config) | {"dtype": "bfloat16", "tied": False}
    share = fields.get("index_share_for_mtp_iteration", False)
    ours["mtp"] = (0, False) if engine == "megatron" else (1, share)
    ours["rope"], read["rope"] = as_one_rope(ours["rope"]), as_one_rope(read["rope"])
    assert read == ours


@pytest.mark.parametrize(
    ("kinds", "written"),
    [("DSSS", (1, 1)), ("DDDS", (3, 1)), ("DDDD", (4, 1)), ("SSSS", (0, 1)), ("SDSD", (0, 2)), ("DDSD", (2, 2))],
)
@pytest.mark.parametrize("own", [{}, {"first_k_dense_replace": 0, "moe_layer_freq": 0}])
def test_layers_with_experts_are_spelled_for_engines_that_read_no_list(exported, kinds, written, own):
    layers = [{"D": "dense", "S": "sparse"}[kind] for kind in kinds]
    fields, _ = exported("vllm", mlp_layer_types=layers, **GLM, **own)
    assert (fields["first_k_dense_replace"], fields["moe_layer_freq"]) == written
    assert layers_with_experts(Fields(fields), fields["moe_layer_freq"]) == [kind == "S" for kind in kinds]


def test_no_choice_of_groups_is_spelled_as_one_group(exported):
    for engine in ENGINES:
        fields, _ = exported(engine, n_group=None, topk_group=None, **GLM)
        assert (fields["n_group"], fields["topk_group"]) == (1, 1)
