"""Shares of tensor and expert parallelism are those that transformers' plans make; layers are spread evenly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from testing.checkpoints import build
from testing.time_limits import PROCESS_SECONDS
from testing.tiny_models import tiny_config, tiny_model

from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.convert.convert import ConvertOptions, convert
from indexcache.conversion.io.fp8 import fp8_block_size
from indexcache.conversion.io.open_checkpoint import open_checkpoint
from indexcache.conversion.io.sources import FolderSource
from indexcache.modeling_indexcache.attention.absorbed_weights import kept_of
from indexcache.modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from indexcache.planning.cache_memory import layer_cache_bytes
from indexcache.planning.loaded_weights import EXPERTS, WEIGHT_KINDS, StoredTensor, loaded_tensors, model_dtype
from indexcache.planning.placement import (
    ABSORBED,
    INDEX_KEYS,
    LATENTS,
    WORKSPACE,
    LoadedModel,
    Placement,
    placements,
    why_not,
)

SPLIT = dict(n_routed_experts=8, num_attention_heads=8, moe_intermediate_size=64, intermediate_size=128)


def converted(folder, fp8, **fields):
    source = build(folder / "source", fp8=fp8, mtp=1, **fields)
    convert(FolderSource(source), folder / "out", ConvertOptions(SharePattern("FSFS")))
    return folder / "out"


def model_of(folder):
    opened = open_checkpoint(folder)
    stored = [StoredTensor(info.name, info.shape, info.dtype) for info in opened.checkpoint.tensors.values()]
    dtype = model_dtype(opened.config, stored)
    narrow = "quantization_config" in opened.checkpoint.config
    return LoadedModel(opened.config, loaded_tensors(stored, opened.config), dtype, narrow)


def weights(need):
    return sum(need.by_kind[kind] for kind in WEIGHT_KINDS)


@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_are_those_that_transformers_loads(tmp_path, ranks):
    folders = [
        converted(tmp_path / "bf16", False, **SPLIT),
        # 65 rows of embeddings and head leave the last rank one fewer.
        converted(tmp_path / "fp8", True, **SPLIT, vocab_size=65),
    ]
    script = Path(__file__).with_name("local_shares.py")
    finished = subprocess.run(
        [sys.executable, str(script), str(ranks), *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=PROCESS_SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    planned = []
    for folder in folders:
        for way in ("tensor parallel", "expert parallel"):
            need = model_of(folder).need(Placement(way, ranks), 1, 16)
            experts = need.by_kind[EXPERTS]
            planned.append({"weights": weights(need), "experts": experts, "absorbed": need.by_kind[ABSORBED]})
    assert found == planned
    assert all(share["absorbed"] for share in planned)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_one_gpu_keeps_absorbed_copies_of_fp8_alone(tmp_path, fp8):
    folder = converted(tmp_path, fp8)
    model = IndexCacheForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        model(torch.arange(40)[None])
    kept = [kept_of(module) for module in model.modules()]
    held = sum(made[1].untyped_storage().nbytes() for made in kept if made is not None)
    assert model_of(folder).need(Placement("one GPU", 1), 1, 16).by_kind[ABSORBED] == held
    assert bool(held) == fp8


def test_layers_one_behind_another_hold_together_what_one_gpu_holds(tmp_path):
    model = model_of(converted(tmp_path, True))
    one = model.need(Placement("one GPU", 1), 3, 50)
    spread = model.need(Placement("device_map", 3), 3, 50)
    # Embeddings, four layers, and norm with head.
    assert sum(spread.layers) == 6 and len(spread.layers) == 3
    parts = [sum(part.values()) for part in model.weights_by_layer]
    assert sum(parts) == weights(one) + one.by_kind[ABSORBED]
    # No way to cut the row in three leaves less on the fullest.
    caches = [0, *(sum_of_caches(model, layer) for layer in range(4)), 0]
    sizes = [part + cached for part, cached in zip(parts, caches)]
    cuts = [(a, b) for a in range(1, 5) for b in range(a + 1, 6)]
    least = min(max(sum(sizes[:a]), sum(sizes[a:b]), sum(sizes[b:])) for a, b in cuts)
    assert spread.total - spread.by_kind[WORKSPACE] == least


def sum_of_caches(model, layer):
    return sum(layer_cache_bytes(model.config, layer, 3, 50, model.dtype))


def test_every_rank_caches_everything(tmp_path):
    model = model_of(converted(tmp_path, False, **SPLIT))
    one, split = (model.need(p, 2, 100) for p in (Placement("one GPU", 1), Placement("tensor parallel", 4)))
    assert split.by_kind[LATENTS] == one.by_kind[LATENTS] and split.by_kind[INDEX_KEYS] == one.by_kind[INDEX_KEYS]


@pytest.mark.parametrize("placement, changes, reason", [
    (Placement("tensor parallel", 3), {}, "2 attention heads cannot be divided over 3 GPUs"),
    (Placement("expert parallel", 8), SPLIT | {"n_routed_experts": 4}, "4 experts cannot be divided over 8 GPUs"),
    (Placement("tensor parallel", 2), {}, "q_b_proj: 48 rows over 2 GPUs are no whole fp8 blocks of 16"),
    (Placement("device_map", 5), {}, "4 layers are fewer than 5 GPUs"),
])  # fmt: skip
def test_what_cannot_be_is_said(tmp_path, placement, changes, reason):
    opened = open_checkpoint(converted(tmp_path, True, **changes))
    model = model_of(opened.source.folder)
    block = fp8_block_size(opened.checkpoint.config, "here")
    assert reason in why_not(placement, model.config, model.tensors, block)


def test_dense_models_have_no_experts_to_spread():
    config = tiny_config(first_k_dense_replace=4, num_attention_heads=4)
    assert "no layer has experts" in why_not(Placement("expert parallel", 2), config, [], None)
    assert why_not(Placement("tensor parallel", 2), config, [], None) is None


def test_one_gpu_has_one_placement():
    assert [p.name for p in placements(1)] == ["one GPU"]
    assert [p.name for p in placements(8)] == ["one GPU", "device_map x 8", "TP x 8", "EP x 8"]


def test_saved_models_of_this_package_are_planned(tmp_path):
    tiny_model(index_share_pattern="FSFS").save_pretrained(tmp_path)
    assert model_of(tmp_path).dtype == "F32"
