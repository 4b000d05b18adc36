"""Layers taken from a checkpoint one by one: those of a resident load, two of them alive at most."""

import gc
import time
import weakref
from pathlib import Path

import pytest
import torch
from testing.checkpoints import as_bytes, build

from indexcache.conversion.io.load_source import load_source
from indexcache.conversion.io.open_checkpoint import open_checkpoint
from indexcache.conversion.io.sources import ConversionError
from indexcache.runs.fingerprint import model_sha256, state_sha256
from indexcache.runs.streaming.layer_source import LayerSource, stream_layers

DEMO = Path(__file__).parents[3] / "demo" / "dsa_demo"
LAYOUTS = {
    "bf16": {},
    "glm": {"family": "glm_moe_dsa"},
    "axk2": {"family": "axk2", "fp8": True},
    "fp8": {"fp8": True, "mtp": 1, "qk_rope_head_dim": 16, "moe_intermediate_size": 32},
    "ragged": {"fp8": True},
}


@pytest.fixture(scope="module", params=["demo", *LAYOUTS])
def folder(request, tmp_path_factory):
    if request.param == "demo":
        return DEMO
    return build(tmp_path_factory.mktemp("checkpoint") / request.param, **LAYOUTS[request.param])


def wait_for_layers(source, count):
    end = time.monotonic() + 20
    while source.reading.layers < count:
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_that_of_a_resident_load(folder, dtype):
    resident = load_source(folder, dtype=dtype)
    expected = dict(sorted(resident.state_dict().items()))
    with stream_layers(open_checkpoint(folder), dtype, "cpu") as source:
        assert source.model.config._attn_implementation == resident.config._attn_implementation
        assert source.model.dtype == resident.dtype
        assert state_sha256(source.model, source.state_items()) == model_sha256(resident)
        names = []
        for name, value in source.state_items():
            names.append(name)
            assert value.dtype == expected[name].dtype, name
            assert as_bytes(value) == as_bytes(expected[name]), name
        assert names == list(expected)
        kinds = {name: type(module) for name, module in resident.named_modules()}
        assert {name: type(module) for name, module in source.model.named_modules()} == kinds
        for name, buffer in source.model.model.rotary_emb.named_buffers():
            assert torch.equal(buffer, resident.model.rotary_emb.get_buffer(name))


def test_two_layers_are_alive_at_most_and_bytes_are_counted(folder, monkeypatch):
    opened = open_checkpoint(folder)
    alive = weakref.WeakSet()
    most = 0
    load = LayerSource._load

    def counting(self, layer):
        nonlocal most
        made = load(self, layer)
        alive.add(made)
        most = max(most, len(alive))
        return made

    monkeypatch.setattr(LayerSource, "_load", counting)
    gc.disable()  # Layers must go without the collector's help.
    try:
        with stream_layers(opened, torch.float32, "cpu") as source:
            skeletons, depth = list(source.model.model.layers), source.num_layers
            for sweep in range(2):
                for layer in source.layers():
                    for other, module in enumerate(source.model.model.layers):
                        assert all(weight.is_meta == (other != layer) for weight in module.parameters())
                    del module
                    # The next one is on its way before this one is gone.
                    wait_for_layers(source, min(sweep * depth + layer + 2, (sweep + 1) * depth))
                assert list(source.model.model.layers) == skeletons
                assert source.reading.sweeps == sweep + 1
    finally:
        gc.enable()
    assert most == 2
    layers = opened.config.num_hidden_layers
    own = [info for name, info in opened.checkpoint.tensors.items() if name.startswith("model.layers.")]
    stored = sum(info.nbytes for info in own if int(info.name.split(".")[2]) < layers)
    assert source.reading.layers == 2 * layers
    assert source.reading.nbytes == 2 * stored
    assert source.reading.seconds_waited > 0


def test_a_sweep_that_is_left_leaves_nothing_behind(folder):
    with stream_layers(open_checkpoint(folder), torch.float32, "cpu") as source:
        sweep = source.layers(1)
        assert next(sweep) == 1
        sweep.close()
        assert all(weight.is_meta for weight in source.model.model.layers.parameters())
        assert list(source.layers(2, 3)) == [2]


def test_a_file_that_became_shorter_is_named(tmp_path):
    folder = build(tmp_path / "cut", shards=1)
    opened = open_checkpoint(folder)
    with stream_layers(opened, torch.float32, "cpu") as source:
        (shard,) = folder.glob("*.safetensors")
        shard.write_bytes(shard.read_bytes()[:-20_000])
        with pytest.raises(ConversionError, match=r"cannot be read.*ends within"):
            list(source.layers())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_layer_stays_whole_until_its_queued_work_is_done(folder):
    """What is queued behind a long wait reads a layer's weights when the next ones are long there."""
    resident = load_source(folder, dtype=torch.bfloat16).state_dict()
    with stream_layers(open_checkpoint(folder), torch.bfloat16, "cuda") as source:
        for sweep in range(2):
            seen = {}
            for layer in source.layers():
                torch.cuda._sleep(50_000_000)
                for name, value in (
                    source.model.model.layers[layer].state_dict(prefix=f"model.layers.{layer}.").items()
                ):
                    seen[name] = value.clone()
                wait_for_layers(source, min(sweep * source.num_layers + layer + 2, (sweep + 1) * source.num_layers))
            for name, value in seen.items():
                assert as_bytes(value.cpu()) == as_bytes(resident[name]), name
