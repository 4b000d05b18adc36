"""Bytes of weights that a plan reads off the headers are those of the loaded model's parameters."""

import pytest
import torch
from testing.checkpoints import build, edit_shard, read_all, tiny_tensors, write_checkpoint
from testing.released_configs import GLM_SHARED_PATTERN, RELEASED, shrunk
from testing.tiny_models import tiny_model

from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.io.load_source import load_source
from indexcache.conversion.io.open_checkpoint import open_checkpoint
from indexcache.planning.loaded_weights import (
    EMBEDDINGS,
    EXPERTS,
    INDEXERS,
    WEIGHT_KINDS,
    StoredTensor,
    described_tensors,
    loaded_tensors,
    multi_token_bytes,
)


def stored_of(opened):
    return [StoredTensor(info.name, info.shape, info.dtype) for info in opened.checkpoint.tensors.values()]


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def in_memory(model):
    """Parameters and what is saved beside them: the router's bias."""
    return bytes_of([*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("correction_bias"))])


def compare(folder, pattern=None):
    opened = open_checkpoint(folder, pattern)
    planned = loaded_tensors(stored_of(opened), opened.config)
    model = load_source(opened, dtype="auto")
    assert sum(tensor.nbytes for tensor in planned) == in_memory(model)
    by_kind = {kind: sum(t.nbytes for t in planned if t.kind == kind) for kind in WEIGHT_KINDS}
    named = list(model.named_parameters())
    assert by_kind[EXPERTS] == bytes_of(p for name, p in named if ".mlp.experts." in name)
    assert by_kind[INDEXERS] == bytes_of(p for name, p in named if ".indexer." in name)
    assert by_kind[EMBEDDINGS] == bytes_of(p for name, p in named if "embed_tokens" in name or "lm_head" in name)
    return planned, model


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "axk2"])
def test_tiny_models(tmp_path, family, fp8):
    planned, model = compare(build(tmp_path, family=family, fp8=fp8, mtp=1))
    assert any(tensor.narrow for tensor in planned) == fp8
    assert any(p.dtype == torch.float8_e4m3fn for p in model.parameters()) == fp8


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs(tmp_path, name):
    """With every dtype of a release, ragged blocks and shared layers that have no indexers."""
    config = shrunk(name)
    letters = GLM_SHARED_PATTERN if "indexer_types" in config else "F" * 8
    lacking = [layer for layer, letter in enumerate(letters) if letter == "S"]
    tensors = tiny_tensors(config, fp8="quantization_config" in config, mtp=1, lacking=lacking)
    compare(write_checkpoint(tmp_path, config, tensors))


def test_scales_of_one_byte(tmp_path):
    build(tmp_path, fp8=True, shards=1)

    def change(tensors):
        for name in tensors:
            if name.endswith("_scale_inv"):
                tensors[name] = tensors[name].to(torch.float8_e8m0fnu)

    edit_shard(tmp_path / "model.safetensors", change)
    planned, _ = compare(tmp_path)
    assert {tensor.bits for tensor in planned if tensor.is_scale} == {8}


def test_biases_and_a_layer_left_in_bf16(tmp_path):
    build(tmp_path, fp8=True, shards=1, attention_bias=True)
    name = "model.layers.1.self_attn.o_proj.weight"

    def change(tensors):
        del tensors[f"{name}_scale_inv"]
        tensors[name] = tensors[name].bfloat16()
        for layer in range(4):
            prefix = f"model.layers.{layer}.self_attn."
            for part in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
                tensors[f"{prefix}{part}.bias"] = torch.zeros(tensors[f"{prefix}{part}.weight"].shape[0]).bfloat16()

    edit_shard(tmp_path / "model.safetensors", change)
    compare(tmp_path)


def test_a_pattern_leaves_out_the_indexers_of_shared_layers(tmp_path):
    build(tmp_path)
    every, _ = compare(tmp_path)
    some, _ = compare(tmp_path, SharePattern("FSSS"))
    assert sum(t.nbytes for t in every if t.kind == INDEXERS) == 4 * sum(t.nbytes for t in some if t.kind == INDEXERS)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_models_in_fp32(tmp_path, tied):
    tiny_model(index_share_pattern="FSFS", tie_word_embeddings=tied).save_pretrained(tmp_path)
    compare(tmp_path)


def test_a_config_describes_what_a_checkpoint_of_it_holds(tmp_path):
    opened = open_checkpoint(build(tmp_path))
    described = {(t.name, t.shape) for t in described_tensors(opened.config)}
    assert described == {(t.name, t.shape) for t in stored_of(opened)}


def test_layers_for_multi_token_prediction_are_counted_apart(tmp_path):
    opened = open_checkpoint(build(tmp_path, fp8=True, mtp=1))
    behind = bytes_of(tensor for name, tensor in read_all(tmp_path).items() if name.startswith("model.layers.4."))
    assert multi_token_bytes(stored_of(opened), 4) == behind > 0
