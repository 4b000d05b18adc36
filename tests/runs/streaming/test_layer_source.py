"""Layers that come from the shards one by one: bit for bit those of a model loaded whole, two in memory at most."""

import gc
import time
import weakref
from pathlib import Path

import pytest
import torch
from testing.checkpoints import build

from indexcache.conversion.io.load_source import load_source
from indexcache.conversion.io.open_checkpoint import open_checkpoint
from indexcache.conversion.io.sources import ConversionError
from indexcache.runs.streaming.layer_source import LayerSource

DEMO = Path(__file__).parents[3] / "demo" / "dsa_demo"


def checkpoint(kind, folder):
    if kind == "demo":
        return DEMO
    if kind == "axk2":
        return build(folder / "axk2", family="axk2", fp8=True)
    return build(folder / kind, fp8=kind == "fp8", mtp=1, qk_rope_head_dim=16, moe_intermediate_size=32)


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        found = other[name]
        assert (tensor.dtype, tensor.shape, tensor.device) == (found.dtype, found.shape, found.device), name
        assert torch.equal(tensor.contiguous().view(torch.uint8), found.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["demo", "fp8", "bf16", "axk2"])
def test_every_layer_is_what_loading_the_whole_gives(kind, dtype, tmp_path):
    opened = open_checkpoint(checkpoint(kind, tmp_path))
    whole = load_source(opened, dtype=dtype).eval()
    source = LayerSource(opened, dtype=dtype, device="cpu")
    seen = []
    for number in source.sweep():
        layer = source.model.model.layers[number]
        same(whole.model.layers[number].state_dict(), layer.state_dict())
        assert type(layer.self_attn.kv_b_proj) is type(whole.model.layers[number].self_attn.kv_b_proj)
        assert layer.self_attn.config is source.model.config
        assert not any(module.training for module in layer.modules())
        seen.append(number)
    assert seen == list(range(whole.config.num_hidden_layers))
    for part in ("embed_tokens", "norm"):
        same(getattr(whole.model, part).state_dict(), getattr(source.model.model, part).state_dict())
    same(whole.lm_head.state_dict(), source.model.lm_head.state_dict())
    same(dict(whole.model.rotary_emb.named_buffers()), dict(source.model.model.rotary_emb.named_buffers()))
    assert source.model.device == whole.device and source.model.dtype == whole.dtype
    source.close()


def test_two_layers_are_alive_at_most_and_none_in_the_end():
    source = LayerSource(open_checkpoint(DEMO), dtype=torch.float32, device="cpu")
    made, most = [], 0
    make = source._make

    def counted(number):
        nonlocal most
        layer = make(number)
        made.append(weakref.ref(layer.self_attn.o_proj.weight))
        most = max(most, sum(one() is not None for one in made))
        return layer

    source._make = counted
    gc.disable()  # layers must go without help
    try:
        for sweep in range(2):
            for number in source.sweep():
                # As if the layer ran for longer than the next one is read.
                due = sweep * source.num_layers + min(number + 2, source.num_layers)
                while len(made) < due:
                    time.sleep(0.001)
                assert source.model.model.layers[number].self_attn.o_proj.weight.device.type == "cpu"
    finally:
        gc.enable()
    assert len(made) == 2 * source.num_layers == source.layers_read
    assert most == source.most_alive == 2 and source.alive == 0
    assert {weight.device.type for weight in source.model.model.layers.parameters()} == {"meta"}
    source.close()


def test_a_sweep_counts_its_bytes_and_may_be_left(tmp_path):
    opened = open_checkpoint(checkpoint("fp8", tmp_path))
    source = LayerSource(opened, dtype=torch.bfloat16, device="cpu")
    before, tensors = source.bytes_read, opened.checkpoint.tensors
    assert before == sum(info.nbytes for name, info in tensors.items() if ".layers." not in name)
    for number in source.sweep([2]):
        assert number == 2
    stored = sum(info.nbytes for name, info in tensors.items() if name.startswith("model.layers.2."))
    assert source.bytes_read - before == stored
    for _ in source.sweep():
        break
    assert source.alive == 0 and source.sweeps == 2
    assert list(source.sweep([3, 0])) == [3, 0]
    source.close()


def test_a_shard_that_was_cut_meanwhile_is_named(tmp_path):
    folder = build(tmp_path / "cut", shards=1)
    source = LayerSource(open_checkpoint(folder), dtype=torch.float32, device="cpu")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) // 2)
    with pytest.raises(ConversionError, match=r"model\.safetensors became shorter"):
        list(source.sweep())
    source.close()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["demo", "fp8"])
def test_on_a_gpu_the_layers_are_the_same(kind, tmp_path):
    opened = open_checkpoint(checkpoint(kind, tmp_path))
    whole = load_source(opened, dtype=torch.bfloat16).to("cuda")
    source = LayerSource(opened, dtype=torch.bfloat16, device="cuda")
    for number in source.sweep():
        same(whole.model.layers[number].state_dict(), source.model.model.layers[number].state_dict())
    assert source.most_alive == 2
    source.close()
