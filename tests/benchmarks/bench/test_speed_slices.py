"""Slices of released models: their widths are the releases', and random weights in fp8 are spread as bf16 ones."""

import json

import pytest
import torch
from testing.released_configs import RELEASED
from typer.testing import CliRunner

from indexcache.benchmarks.bench.speed_models import random_config, random_model
from indexcache.benchmarks.bench.speed_slices import SLICES
from indexcache.cli import app
from indexcache.conversion.convert.families import convert_config, load_config
from indexcache.kernels.block_fp8.block_fp8_format import E4M3, dequantise
from indexcache.modeling_indexcache.layers.block_fp8_modules import BlockFp8Experts, BlockFp8Linear

RELEASE = {"v3.2": "DeepSeek-V3.2", "glm-5": "GLM-5.2"}
# What a slice has otherwise: depth, and what tokens and layers are called.
OWN = {"num_hidden_layers", "first_k_dense_replace", "mlp_layer_types", "layer_types", "index_share_pattern", "dtype"}
OWN |= {
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "source_model_type",
    "indexcache_version",
    "architectures",
}


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "--device", "cpu", *map(str, arguments)])


@pytest.mark.parametrize("name", SLICES)
def test_widths_are_those_of_the_release(name):
    released = load_config(convert_config(RELEASED[RELEASE[name]], None, None, {}, "here"), "here")
    ours = random_config(name, None, None)
    fields = [field for field in ours.__dataclass_fields__ if field not in OWN]
    assert len(fields) > 40
    different = {field for field in fields if getattr(ours, field) != getattr(released, field)}
    assert {
        field for field in different if field in RELEASED[RELEASE[name]] or field == "indexer_rope_interleave"
    } == set()
    assert ours.mlp_layer_types == ["dense", "sparse", "sparse", "sparse"]


@pytest.mark.parametrize("name", SLICES)
def test_fp8_weights_are_spread_as_bf16_ones(name):
    narrow = random_model(name, None, 3, torch.device("cpu"), torch.float32, narrow=True, block_fp8=True)
    wide = random_model(name, None, 3, torch.device("cpu"), torch.float32, narrow=True)
    assert narrow.config.quantization_config["weight_block_size"] == [128, 128]
    parameters = dict(wide.named_parameters())
    found = 0
    for path, module in narrow.named_modules():
        pairs = []
        if isinstance(module, BlockFp8Linear):
            pairs = [(module.dequantised(torch.float32), parameters[f"{path}.weight"])]
        elif isinstance(module, BlockFp8Experts):
            inner = module.gate_up_proj.shape[1] // 2
            rows = module.gate_up_proj_scale_inv.shape[1] // 2
            gate = dequantise(module.gate_up_proj[:, :inner], module.gate_up_proj_scale_inv[:, :rows], (128, 128))
            down = dequantise(module.down_proj, module.down_proj_scale_inv, (128, 128))
            pairs = [(gate, parameters[f"{path}.gate_up_proj"]), (down, parameters[f"{path}.down_proj"])]
        for made, expected in pairs:
            assert made.float().std() == pytest.approx(expected.std().item(), rel=0.1), path
            found += 1
    assert found > 20
    kept = {path for path, p in narrow.named_parameters() if p.dtype != E4M3 and not path.endswith("_scale_inv")}
    assert {"lm_head.weight", "model.layers.0.self_attn.indexer.weights_proj.weight"} <= kept
    assert not any(path.endswith(("q_a_proj.weight", "wk.weight", "gate_proj.weight")) for path in kept)
    for path, parameter in narrow.named_parameters():
        assert not parameter.is_meta and parameter.float().isfinite().all(), path
    with torch.no_grad():
        logits = narrow(torch.arange(200)[None], logits_to_keep=4).logits
    assert logits.isfinite().all() and logits.std() > 0


@pytest.mark.parametrize("dtype", ["fp8", "auto"])
@pytest.mark.parametrize("name", SLICES)
def test_slices_are_measured(tmp_path, name, dtype):
    options = ("--narrow", "--layers", 3, "--dtype", dtype, "--length", 96, "--decode-steps", 4, "--repeats", 1)
    rest = ("--pattern", "all full", "--pattern", "FSS", "--no-pictures", "--no-breakdown")
    finished = bench("--shape", name, *options, *rest, "--output", tmp_path, "--json")
    assert finished.exit_code == 0, finished.output
    document = json.loads(finished.stdout)
    assert (document["shape"], document["layers"], document["narrow"]) == (name, 3, True)
    assert document["dtype"] == {"fp8": "fp8", "auto": "float32"}[dtype]
    rows = [row for row in document["rows"] if row["kind"] == "generate"]
    assert len(rows) == 2 and all(row["prefill_seconds"] > 0 and row["tokens_per_second"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "tiny", "--narrow"), "--narrow is for --shape v3.2 and glm-5"),
        (("nowhere", "--narrow"), "leave out the checkpoint"),
        (("nowhere", "--dtype", "fp8"), "a checkpoint in fp8 runs so by itself"),
        (("--shape", "glm-5", "--narrow", "--dtype", "fp8", "--baseline", "--length", 64), "runs without fp8"),
        (("--shape", "v3.2", "--narrow", "--experts", 12), "n_group (8) must divide n_routed_experts (12)"),
        (("--shape", "v3.2", "--length", 200000), "must lie in 16 .. 163840"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    refused = bench(*arguments, "--output", tmp_path / "out")
    assert refused.exit_code == 2, refused.output
    assert message in " ".join(refused.output.split())
