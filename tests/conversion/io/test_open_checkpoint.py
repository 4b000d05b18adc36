"""One way to open a checkpoint for every verb: what is not whole is refused before a tensor is loaded."""

import json
import os
from pathlib import Path

import pytest
import torch
from testing.checkpoints import build, edit_json, tiny_config, tiny_tensors, write_checkpoint

from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.convert.convert import ConvertOptions, convert
from indexcache.conversion.io.load_source import load_source
from indexcache.conversion.io.open_checkpoint import open_checkpoint
from indexcache.conversion.io.sources import ConversionError, FolderSource

DEMO = Path(__file__).parents[3] / "demo" / "dsa_demo"


def refused(folder, *args, **kwargs):
    with pytest.raises(ConversionError) as caught:
        open_checkpoint(folder, *args, **kwargs)
    return str(caught.value)


def dense(folder):
    """A GLM-4.7-Flash as released: MLA without indexers."""
    config = tiny_config("glm4_moe_lite", layers=3)
    for name in [name for name in config if name.startswith("index_")]:
        del config[name]
    tensors = tiny_tensors({**tiny_config(layers=3), **config}, lacking=range(3))
    return write_checkpoint(folder, config, tensors)


def test_a_whole_checkpoint_is_opened_with_its_own_pattern_or_another(tmp_path):
    source = build(tmp_path / "s", fp8=True, mtp=1)
    opened = open_checkpoint(source)
    assert opened.config.index_share_pattern == "FFFF" and opened.checkpoint.config["model_type"] == "deepseek_v32"
    assert opened.fields["model_type"] == "indexcache" and opened.source.location == str(source)
    assert open_checkpoint(FolderSource(source), SharePattern("FSFS")).config.index_share_pattern == "FSFS"
    convert(FolderSource(source), tmp_path / "o", ConvertOptions(SharePattern("FSSF")))
    assert open_checkpoint(tmp_path / "o").config.index_share_pattern == "FSSF"
    assert "no indexer weights in layers 1" in refused(tmp_path / "o", SharePattern("FFSF"))
    assert open_checkpoint(DEMO).config.num_hidden_layers == 12


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.kv_b_proj.weight", "lm_head.weight"])
def test_a_weight_that_neither_index_nor_shards_hold_is_missed(tmp_path, name):
    config = tiny_config()
    tensors = tiny_tensors(config)
    del tensors[name]
    assert f"{name} is missing" in refused(write_checkpoint(tmp_path / "s", config, tensors))


def test_a_stale_index_and_a_truncated_shard_are_refused(tmp_path):
    source = build(tmp_path / "s")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    shard = source / index["weight_map"].pop("model.norm.weight")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "holds model.norm.weight, which the index does not name" in refused(source)
    os.truncate(shard, shard.stat().st_size - 1)
    assert f"{shard.name} is truncated" in refused(source)


@pytest.mark.parametrize("fields, message", [
    ({"num_hidden_layers": 2**31}, "num_hidden_layers=2147483648, and the weights hold 4 layers"),
    ({"num_hidden_layers": 5}, "num_hidden_layers=5, and the weights hold 4 layers"),
    ({"n_routed_experts": 2**31}, "n_routed_experts=2147483648"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True: it must be a number"),
])  # fmt: skip
def test_numbers_that_the_weights_contradict_are_not_walked_through(tmp_path, fields, message):
    source = build(tmp_path / "s")
    edit_json(source / "config.json", **fields)
    assert message in refused(source)


def test_new_indexers_are_for_dense_models_and_for_layers_that_lack_theirs(tmp_path):
    source = dense(tmp_path / "dense")
    assert "model_type 'glm4_moe_lite' cannot be converted" in refused(source)
    opened = open_checkpoint(source, SharePattern("FSF"), new_indexers=True)
    assert opened.config.index_share_pattern == "FSF" and opened.config.source_model_type == "glm_moe_dsa"
    part = build(tmp_path / "part", lacking=(1,))
    assert "no indexer weights in layers 1" in refused(part)
    assert open_checkpoint(part, new_indexers=True).config.index_share_pattern == "FFFF"
    config, tensors = tiny_config(), tiny_tensors(tiny_config(), lacking=(1,))
    del tensors["model.norm.weight"]
    assert "model.norm.weight is missing" in refused(
        write_checkpoint(tmp_path / "less", config, tensors), new_indexers=True
    )


def test_weights_quantised_otherwise_are_compared_by_module(tmp_path):
    config = tiny_config(quantization_config={"quant_method": "compressed-tensors"})
    tensors = tiny_tensors(config)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    tensors[f"{name}_packed"] = torch.zeros(24, 6, dtype=torch.int32)
    tensors[f"{name}_scale"] = torch.zeros(24, 3)
    del tensors[name]
    assert open_checkpoint(write_checkpoint(tmp_path / "s", config, tensors)).config.num_hidden_layers == 4
    del tensors[f"{name}_packed"], tensors[f"{name}_scale"]
    message = refused(write_checkpoint(tmp_path / "t", config, tensors))
    assert "model.layers.1.mlp.experts.0.up_proj is missing" in message


@pytest.mark.parametrize("fields", [{"activation_scheme": "[2Jred"}, {"scale_fmt": "x"}, {"activation_scheme": 7}])
def test_what_transformers_says_of_a_quantisation_names_the_file(tmp_path, fields):
    source = build(tmp_path / "s", fp8=True)
    config = json.loads((source / "config.json").read_text())
    edit_json(source / "config.json", quantization_config={**config["quantization_config"], **fields})
    with pytest.raises(ConversionError, match=r"config\.json has a quantization_config that transformers cannot use"):
        load_source(source, device_map="cpu")
