"""What each engine's weight loader does with an export's tensors: absent and surplus indexers, MTP layers.

The loaders' rules are restated from the sources that test_export_engines.py names; bf16 weights. Each takes the names
in an export's shards and its config.json, and returns the parameters that no tensor reached.
"""

import json

import pytest
import torch
from safetensors import safe_open
from testing.checkpoints import build, edit_json, tiny_config, tiny_tensors, write_checkpoint
from transformers import GlmMoeDsaForCausalLM

from indexcache import IndexCacheForCausalLM, SharePattern
from indexcache.conversion.convert.convert import ConvertOptions, convert
from indexcache.conversion.convert.families import convert_dense_config
from indexcache.conversion.io.sources import ConversionError, FolderSource
from indexcache.conversion.publish.bundle import AUTO_MAP
from indexcache.conversion.publish.export import ENGINES, export

STACKED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
LATENTS = {"q_a_proj": "fused_qkv_a_proj", "kv_a_proj_with_mqa": "fused_qkv_a_proj"}
INDEXER_KEYS = {"wk": "wk_weights_proj", "weights_proj": "wk_weights_proj"}


def parameters(fields, full, fused):
    """The parameters that an engine builds, with its fused names for `{theirs: its own}`."""

    def own(name):
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        return f"{parent}.{fused.get(last, last)}.{kind}"

    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        names = ["input_layernorm.weight", "post_attention_layernorm.weight"]
        attention = "q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj"
        names += [f"self_attn.{name}.weight" for name in attention.split()]
        if layer in full:
            indexer = "wq_b.weight wk.weight weights_proj.weight k_norm.weight k_norm.bias"
            names += [f"self_attn.indexer.{name}" for name in indexer.split()]
        mlp = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
        if layer >= fields["first_k_dense_replace"] and layer % fields.get("moe_layer_freq", 1) == 0:
            names += ["mlp.gate.weight", "mlp.gate.e_score_correction_bias"]
            names += [f"mlp.shared_experts.{name}" for name in mlp]
            names += [f"mlp.experts.{expert}.{name}" for expert in range(fields["n_routed_experts"]) for name in mlp]
        else:
            names += [f"mlp.{name}" for name in mlp]
        yield from (own(prefix + name) for name in names)
    yield from ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def full_by_pattern(fields):
    return {layer for layer, letter in enumerate(fields["index_topk_pattern"]) if letter == "F"}


def load_into_vllm(names, fields, *, cuda=True):
    """vLLM 0.33.0: models/deepseek_v32/nvidia/model.py `DeepseekV32Model.load_weights` (the same in amd/model.py).

    A name that is no parameter is a KeyError. Elsewhere than on CUDA and ROCm, model_executor/models/deepseek_v2.py
    `DeepseekV2Model.load_weights` passes over indexers of layers that have none. What is not reached is a ValueError
    of model_loader/default_loader.py.
    """
    fused = STACKED | LATENTS | INDEXER_KEYS
    params = set(parameters(fields, full_by_pattern(fields), fused))
    depth = fields["num_hidden_layers"]
    mtp = tuple(f"model.layers.{depth + extra}." for extra in range(fields.get("num_nextn_predict_layers", 0)))
    reached = set()
    for name in names:
        if mtp and name.startswith(mtp):
            continue
        holder = name.rpartition(".indexer.")[0]
        if not cuda and holder and not any(param.startswith(f"{holder}.indexer.") for param in params):
            continue
        for theirs, its_own in fused.items():
            if f".{theirs}." in name:
                name = name.replace(theirs, its_own)
                break
        if name.endswith(".bias") and name not in params:
            continue
        if name not in params:
            raise KeyError(name)
        reached.add(name)
    return params - reached


def load_into_sglang(names, fields):
    """SGLang 0.5.23: srt/models/deepseek_common/deepseek_weight_loader.py `do_load_weights`.

    Indexers of layers without one are passed over, layers behind the last too, other unknown names are warnings.
    """
    full = {layer for layer, kind in enumerate(fields["indexer_types"]) if kind != "shared"}
    fused = STACKED | LATENTS | INDEXER_KEYS
    params = set(parameters(fields, full, fused))
    reached = set()
    for name in names:
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= fields["num_hidden_layers"]:
            continue
        for theirs, its_own in fused.items():
            if f".{theirs}." in name:
                name = name.replace(theirs, its_own)
                break
        reached.add(name)
    return params - reached


def load_into_trtllm(names, fields):
    """TensorRT-LLM: `DeepseekV3WeightLoader.load_weights` walks over its modules and takes each one's tensors."""
    return set(parameters(fields, full_by_pattern(fields), {})) - set(names)


def load_into_megatron(names, fields):
    """Megatron-Bridge 0.6.2: conversion/model_bridge.py `build_conversion_tasks`, by `GLM5Bridge.mapping_registry`.

    It walks over Megatron's parameters; one whose tensors are not there is a warning, and stays random.
    """
    freq, offset = fields.get("index_topk_freq", 1), fields.get("index_skip_topk_offset", 0)
    depth = fields["num_hidden_layers"]
    full = {layer for layer in range(depth) if max(layer + 1 - max(offset, 1), 0) % freq == 0}
    return set(parameters(fields, full, {})) - set(names)


LOADERS = {
    "vllm": load_into_vllm,
    "sglang": load_into_sglang,
    "trtllm": load_into_trtllm,
    "megatron": load_into_megatron,
}


def opened(folder):
    names = []
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as tensors:
            names += tensors.keys()
    return names, json.loads((folder / "config.json").read_text())


def converted(folder, *, pattern="FSFS", family="glm_moe_dsa", keep=False, **changes):
    source = build(folder / "source", family=family, index_n_heads=32, **changes)
    options = ConvertOptions(SharePattern(pattern), keep_shared_indexers=keep)
    convert(FolderSource(source), folder / "checkpoint", options)
    return folder / "checkpoint"


@pytest.mark.parametrize(
    ("engine", "family"),
    [(engine, family) for engine in LOADERS for family in ("glm_moe_dsa", "deepseek_v32")][:-1],
)
@pytest.mark.parametrize("mtp", [0, 1])
def test_every_parameter_is_reached_and_every_name_has_one(tmp_path, engine, family, mtp):
    out = export(converted(tmp_path, family=family, mtp=mtp), tmp_path / "out", engine)
    assert LOADERS[engine](*opened(out)) == set()


@pytest.mark.parametrize("engine", LOADERS)
def test_an_absent_indexer_is_noticed_by_the_restated_loader(tmp_path, engine):
    """Had the pattern not been understood, shared layers would be built with indexers that no tensor fills."""
    names, fields = opened(export(converted(tmp_path), tmp_path / "out", engine))
    fields |= {"index_topk_pattern": "FFFF", "indexer_types": ["full"] * 4, "index_topk_freq": 1}
    unfilled = LOADERS[engine](names, fields)
    assert {name.split(".")[2] for name in unfilled} == {"1", "3"}
    assert all(".indexer." in name for name in unfilled)


def test_megatron_s_own_names_would_leave_indexers_random(tmp_path):
    """`dsa_indexer_topk_freq` is Megatron-LM's flag: its bridge reads `index_topk_freq`."""
    names, fields = opened(export(converted(tmp_path), tmp_path / "out", "megatron"))
    fields["dsa_indexer_topk_freq"] = fields.pop("index_topk_freq")
    fields["dsa_indexer_skip_topk_offset"] = fields.pop("index_skip_topk_offset")
    assert any(".layers.1.self_attn.indexer." in name for name in load_into_megatron(names, fields))


def test_surplus_indexers_stop_vllm_and_nobody_else(tmp_path):
    checkpoint = converted(tmp_path, keep=True)
    with pytest.raises(ConversionError, match=r"shared layers \(1, 3\), for which its loader has no parameter"):
        export(checkpoint, tmp_path / "vllm", "vllm")
    for engine in ("sglang", "trtllm", "megatron"):
        names, fields = opened(export(checkpoint, tmp_path / engine, engine))
        assert any(".layers.1.self_attn.indexer." in name for name in names)
        assert LOADERS[engine](names, fields) == set()
    names, fields = opened(tmp_path / "trtllm")
    with pytest.raises(KeyError, match=r"layers\.1\.self_attn\.indexer"):
        load_into_vllm(names, fields)
    assert load_into_vllm(names, fields, cuda=False) == set()


@pytest.mark.parametrize("claimed", [None, 0, 3])
@pytest.mark.parametrize("held", [0, 1, 2])
def test_the_number_of_mtp_layers_is_counted_in_the_weights(tmp_path, claimed, held):
    checkpoint = converted(tmp_path, mtp=held)
    edit_json(checkpoint / "config.json", num_nextn_predict_layers=claimed)
    for engine in ("vllm", "sglang", "trtllm", "megatron"):
        names, fields = opened(export(checkpoint, tmp_path / engine, engine))
        assert fields["num_nextn_predict_layers"] == held
        assert any(".layers.4." in name for name in names) == bool(held), "they come along"
        assert LOADERS[engine](names, fields) == set()
    if held:
        names, fields = opened(tmp_path / "vllm")
        with pytest.raises(KeyError, match=r"model\.layers\.4\."):
            load_into_vllm(names, fields | {"num_nextn_predict_layers": 0})


def test_megatron_gets_no_quantised_weights(tmp_path):
    checkpoint = converted(tmp_path, fp8=True)
    with pytest.raises(ConversionError, match="quantised weights, which its bridge of this family copies without"):
        export(checkpoint, tmp_path / "out", "megatron")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_distilled_dense_model_routes_by_sigmoid(tmp_path, engine):
    """GLM-4.7-Flash's config.json does not say how its router scores; vLLM would take softmax."""
    dense = tiny_config("glm4_moe_lite")
    for name in ("index_topk", "index_n_heads", "index_head_dim"):
        del dense[name]
    new = {"index_topk": 8, "index_n_heads": 8, "index_head_dim": 16}
    fields = convert_dense_config(dense, SharePattern("FSFS"), new, AUTO_MAP, "here")
    assert not {"scoring_func", "topk_method"} & fields.keys()
    write_checkpoint(tmp_path / "distilled", fields, tiny_tensors({**dense, **new}, lacking=(1, 3)))
    names, written = opened(export(tmp_path / "distilled", tmp_path / "out", engine))
    assert (written["scoring_func"], written["topk_method"]) == ("sigmoid", "noaux_tc")
    assert engine not in LOADERS or LOADERS[engine](names, written) == set()


@pytest.mark.parametrize(("keep", "mtp"), [(False, 0), (True, 0), (False, 1), (True, 1)])
def test_transformers_own_class_gives_equal_logits(tmp_path, keep, mtp):
    """Its loader reports surplus indexers and MTP layers as unexpected, and computes the same without them."""
    checkpoint = converted(tmp_path, keep=keep, mtp=mtp)
    out = export(checkpoint, tmp_path / "out", "transformers")
    native, loading = GlmMoeDsaForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"]
    surplus = {name.split(".")[2] for name in loading["unexpected_keys"]}
    assert surplus == ({"1", "3"} if keep else set()) | ({"4"} if mtp else set())
    ours = IndexCacheForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = torch.arange(48)[None] % 64
    with torch.no_grad():
        torch.testing.assert_close(native.eval()(tokens).logits, ours.eval()(tokens).logits, atol=1e-4, rtol=0)
