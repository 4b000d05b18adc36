"""Where an engine is installed, its own functions are asked what an export means to them; nothing of it is imported.

The wheels want other versions of torch than ours, and GPUs: so single functions are taken out of their files. An
engine that is not installed is skipped. `PYTHONPATH` may also name a folder of unpacked wheels.
"""

import ast
import importlib.util
import json
import re
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import safe_open
from testing.checkpoints import build

from indexcache import SharePattern
from indexcache.conversion.convert.convert import ConvertOptions, convert
from indexcache.conversion.io.sources import FolderSource
from indexcache.conversion.publish.export import ENGINES, export

PATTERNS = ["FFFF", "FSSS", "FFSSS", "FFFSSSFSSSFS"]
# The files of an engine that read the config of these families; and what of it they read for other models alone, what
# is derived from other fields, and what stands in for the pattern where that is absent.
SOURCES = {
    "vllm": (
        "models/deepseek_v32/attention.py models/deepseek_v32/nvidia/model.py models/deepseek_v32/nvidia/mtp.py",
        "index_topk_freq index_skip_topk_offset",
    ),
    "sglang": (
        "srt/models/deepseek_v2.py srt/models/deepseek_nextn.py srt/models/deepseek_common/deepseek_weight_loader.py",
        "json llama_4_scaling mla_nope num_hash_layers quantization_config rope_scaling rope_theta router_fp32 "
        "routing_method_type swiglu_limit",
    ),
    "megatron": ("bridge/models/glm_moe_dsa/glm5_bridge.py", "num_experts qk_head_dim"),
}


def source_of(package, file):
    """The text of an installed engine's file; else the test is skipped."""
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / file).is_file():
            return (Path(folder) / file).read_text(encoding="utf-8")
    pytest.skip(f"{package} is not installed")


def function_of(package, file, name, **known):
    """The first function of that name in an installed engine's file, with the names that it uses."""
    nodes = ast.walk(ast.parse(source_of(package, file)))
    function = next(node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name)
    function.returns = None
    for argument in function.args.args:
        argument.annotation = None
    exec(compile(ast.Module([function], []), file, "exec"), known)
    return known[name]


def exported(folder, engine, pattern="FSFS", *, family="glm_moe_dsa", keep=False, mtp=1):
    """The names of an export's tensors, and its config.json."""
    source = build(folder / "source", family=family, layers=len(pattern), mtp=mtp)
    options = ConvertOptions(SharePattern(pattern), keep_shared_indexers=keep)
    convert(FolderSource(source), folder / "checkpoint", options)
    out = export(folder / "checkpoint", folder / "out", engine)
    names = []
    for shard in sorted(out.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as tensors:
            names += tensors.keys()
    return names, json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("engine", SOURCES)
def test_it_reads_no_field_that_is_not_written(engine):
    files, others = map(str.split, SOURCES[engine])
    text = "".join(source_of(engine, file) for file in files)
    named = set(re.findall(r"(?<![\w.])(?:hf_|self\.|hf_text_)?config\.(\w+)", text))
    named |= set(re.findall(r"(?:getattr|hasattr)\(\s*(?:self\.)?(?:hf_)?config,\s*\"(\w+)\"", text))
    assert len(named) > 12
    assert named - ENGINES[engine].reads == set(others)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_megatron_core_shares_the_layers_of_the_pattern(tmp_path, pattern):
    shares = function_of(
        "megatron", "core/transformer/experimental_attention_variant/dsa.py", "is_dsa_skip_topk_layer"
    )
    _, fields = exported(tmp_path, "megatron", pattern)
    freq, offset = fields["index_topk_freq"], fields["index_skip_topk_offset"]
    numbers = range(1, len(pattern) + 1)
    assert "".join("S" if shares(number, offset, freq) else "F" for number in numbers) == pattern


@pytest.mark.parametrize("family", ["glm_moe_dsa", "deepseek_v32"])
@pytest.mark.parametrize("pattern", [*PATTERNS, "FSFFSSF"])
def test_sglang_shares_the_layers_of_the_pattern(tmp_path, pattern, family):
    shares = function_of(
        "sglang", "srt/configs/model_config.py", "dsa_layer_skips_topk", is_deepseek_dsa=lambda config: True
    )
    config = SimpleNamespace(**exported(tmp_path, "sglang", pattern, family=family)[1])
    assert "".join("S" if shares(config, layer) else "F" for layer in range(len(pattern))) == pattern
    assert not shares(config, len(pattern)), "the MTP layer"


class VllmModel:
    """As much of vLLM's model as its loader looks at: parameters by name."""

    num_redundant_experts = 0
    is_fused_shared_expert_enabled = False

    def __init__(self, fields):
        self.config = SimpleNamespace(**fields)
        self.filled = set()

    def named_parameters(self):
        def parameter(name):
            fill = lambda *_, **__: self.filled.add(name) or True
            return name, SimpleNamespace(weight_loader=fill)

        c = self.config
        names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
        for layer in range(c.num_hidden_layers):
            names += [f"model.layers.{layer}.{norm}_layernorm.weight" for norm in ("input", "post_attention")]
            attention = ["fused_qkv_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_layernorm", "kv_b_proj", "o_proj"]
            if c.index_topk_pattern[layer] == "F":
                attention += ["indexer.wq_b", "indexer.wk_weights_proj", "indexer.k_norm"]
                names += [f"model.layers.{layer}.self_attn.indexer.k_norm.bias"]
            names += [f"model.layers.{layer}.self_attn.{module}.weight" for module in attention]
            mlp = ["gate_up_proj.weight", "down_proj.weight"]
            if layer >= c.first_k_dense_replace and layer % c.moe_layer_freq == 0:
                mlp = [f"shared_experts.{name}" for name in mlp]
                mlp += ["experts.w13_weight", "experts.w2_weight", "gate.weight", "gate.e_score_correction_bias"]
            names += [f"model.layers.{layer}.mlp.{name}" for name in mlp]
        return map(parameter, names)


def load_into_vllm(names, fields, file):
    model = VllmModel(fields)
    experts = [
        (f"experts.{own}_", f"experts.{number}.{theirs}.", number, shard)
        for number in range(fields["n_routed_experts"])
        for own, theirs, shard in (("w13", "gate_proj", "w1"), ("w2", "down_proj", "w2"), ("w13", "up_proj", "w3"))
    ]
    load = function_of(
        "vllm",
        file,
        "load_weights",
        typing=typing,
        Callable=typing.Callable,
        get_spec_layer_idx_from_weight_name=function_of(
            "vllm", "model_executor/models/utils.py", "get_spec_layer_idx_from_weight_name"
        ),
        fused_moe_make_expert_params_mapping=lambda *_, **__: experts,
        get_pp_missing_layer_names=lambda model: [],
        is_pp_missing_parameter=lambda name, model: False,
        _try_load_fp8_indexer_wk=lambda *_: False,
        maybe_remap_kv_scale_name=lambda name, params: name,
        default_weight_loader=None,
    )
    load(model, ((name, None) for name in names))
    return {name for name, _ in model.named_parameters()} - model.filled


@pytest.mark.parametrize("file", ["models/deepseek_v32/nvidia/model.py", "models/deepseek_v32/amd/model.py"])
@pytest.mark.parametrize("family", ["glm_moe_dsa", "deepseek_v32"])
def test_vllm_s_loader_fills_every_parameter(tmp_path, family, file):
    assert load_into_vllm(*exported(tmp_path, "vllm", family=family), file) == set()


@pytest.mark.parametrize("file", ["models/deepseek_v32/nvidia/model.py", "models/deepseek_v32/amd/model.py"])
def test_vllm_s_loader_has_no_parameter_for_surplus_indexers_and_unannounced_mtp_layers(tmp_path, file):
    # Exported for another engine: for vLLM these weights are refused.
    names, fields = exported(tmp_path, "sglang", keep=True)
    with pytest.raises(KeyError, match=r"layers\.1\.self_attn\.indexer"):
        load_into_vllm(names, fields, file)
    with pytest.raises(KeyError, match=r"layers\.4\."):
        kept = [name for name in names if ".layers.1.self_attn.indexer" not in name and ".layers.3." not in name]
        load_into_vllm(kept, fields | {"num_nextn_predict_layers": 0}, file)
