"""`verify` proves equality and names every difference; `inspect` tells what is there."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import build, edit_json, edit_shard

from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.checkpoint import ConversionError, FolderSource
from indexcache.conversion.convert import ConvertOptions, convert
from indexcache.conversion.describe import describe
from indexcache.conversion.drawing import draw_cells, human_bytes
from indexcache.conversion.verify import verify


def converted(source, output, pattern="FSFS", **options):
    convert(FolderSource(source), Path(output), ConvertOptions(SharePattern.parse(pattern), **options))
    return output


def check(source, output, logits=False):
    return verify(FolderSource(source), FolderSource(output), compare_logits=logits)


OPTIONS = [
    {},
    {"copy": True},
    {"max_shard_size": 9_000},
    {"dtype": "bfloat16"},
    {"dtype": "float16", "max_shard_size": 20_000},
    {"keep_shared_indexers": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("fp8", [False, True])
def test_a_conversion_verifies(tmp_path, fp8, options):
    source = build(tmp_path / "s", fp8=fp8, mtp=1)
    result = check(source, converted(source, tmp_path / "o", **options))
    assert result.ok and result.differences == []
    assert result.indexers_dropped == ([] if options.get("keep_shared_indexers") else [1, 3])
    assert result.tensors_equal > 100 and (result.tensors_cast > 0) == ("dtype" in options)


def shard_with(folder, name):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def test_one_flipped_bit_is_named(tmp_path):
    source = build(tmp_path / "s")
    output = converted(source, tmp_path / "o", copy=True)
    name = "model.layers.2.mlp.experts.1.up_proj.weight"

    def flip(tensors):
        tensors[name].view(torch.uint8)[3, 5] ^= 1

    edit_shard(shard_with(output, name), flip)
    result = check(source, output)
    assert not result.ok
    assert result.differences == [f"{name} differs from the source at byte {3 * 96 + 5} of {24 * 96} "
                                  f"(in {shard_with(output, name).name})"]  # fmt: skip


def test_a_wrong_cast_is_named(tmp_path):
    source = build(tmp_path / "s", fp8=True)
    output = converted(source, tmp_path / "o", dtype="float32")
    name = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"
    edit_shard(shard_with(output, name), lambda tensors: tensors[name].mul_(1.0001))
    assert [difference.split()[0] for difference in check(source, output).differences] == [name]


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_missing_added_reshaped_and_recast_tensors_are_named(tmp_path):
    source = build(tmp_path / "s")
    output = converted(source, tmp_path / "o", copy=True)
    lost, shaped, recast = "model.norm.weight", "model.layers.3.input_layernorm.weight", "lm_head.weight"
    file = shard_with(output, lost)

    def damage(tensors):
        del tensors[lost]
        tensors["model.extra.weight"] = torch.zeros(1)
        tensors[shaped] = tensors[shaped].reshape(2, -1).contiguous()
        tensors[recast] = tensors[recast].float()

    assert file == shard_with(output, shaped) == shard_with(output, recast)
    edit_shard(file, damage)
    edit_index(output, lambda index: (index.pop(lost), index.update({"model.extra.weight": file.name})))
    found = check(source, output).differences
    assert f"{lost} is missing from the converted checkpoint" in found
    assert "model.extra.weight is not in the source" in found
    assert f"{shaped} has shape [48] in the source and [2, 24] in {file.name}" in found
    assert f"{recast} has dtype BF16 in the source and F32 in {file.name}" in found and len(found) == 4


def test_an_indexer_lost_in_a_full_layer_is_named(tmp_path):
    source = build(tmp_path / "s")
    output = converted(source, tmp_path / "o", "FSFS")
    edit_json(output / "config.json", index_share_pattern="FSFF", indexer_types=None)
    found = check(source, output).differences
    assert len(found) == 5 and all("layers.3.self_attn.indexer" in difference for difference in found)


def test_a_changed_config_field_is_named(tmp_path):
    source = build(tmp_path / "s")
    output = converted(source, tmp_path / "o")
    edit_json(output / "config.json", routed_scaling_factor=1.0, ep_size=None)
    found = check(source, output).differences
    assert "config.json: routed_scaling_factor is 2.5 in the source and 1.0 now" in found
    assert "config.json: ep_size is 1 in the source and None now" in found


def test_the_two_must_be_given_in_order(tmp_path):
    source = build(tmp_path / "s")
    output = converted(source, tmp_path / "o")
    with pytest.raises(ConversionError, match="give the source first and the indexcache checkpoint second"):
        check(output, source)


def test_a_truncated_conversion_is_refused(tmp_path):
    source = build(tmp_path / "s")
    output = converted(source, tmp_path / "o", copy=True)
    shard = next(output.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ConversionError, match="is truncated"):
        check(source, output)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_logits_agree_with_transformers_own_model(tmp_path, family):
    source = build(tmp_path / "s", family=family, mtp=1, index_n_heads=32)  # so that few scores tie at zero
    same = check(source, converted(source, tmp_path / "o", "FFFF"), logits=True)
    assert same.ok and same.logits["same_pattern"] and same.logits["compared"]
    assert same.logits["max_abs_difference"] < 1e-4 and abs(same.logits["mean_kl"]) < 1e-6
    other = check(source, converted(source, tmp_path / "p", "FSSS"), logits=True)
    assert other.ok and other.logits["compared"] and not other.logits["same_pattern"]


def test_glm_with_its_own_sharing_agrees_with_transformers(tmp_path):
    types = ["full", "shared", "shared", "full"]
    source = build(tmp_path / "s", family="glm_moe_dsa", indexer_types=types, lacking=(1, 2), index_n_heads=32)
    convert(FolderSource(source), tmp_path / "o", ConvertOptions())
    result = check(source, tmp_path / "o", logits=True)
    assert result.ok and result.logits["same_pattern"] and result.logits["max_abs_difference"] < 1e-4


def test_logits_that_differ_under_the_same_pattern_fail(tmp_path):
    source = build(tmp_path / "s")
    output = converted(source, tmp_path / "o", "FFFF")
    edit_json(output / "config.json", rope_interleave=False)
    result = check(source, output, logits=True)
    assert not result.ok and "at the median token" in result.differences[0]


# ---- inspect --------------------------------------------------------------------------------------------------------


def test_description_of_source_and_conversion(tmp_path):
    source = build(tmp_path / "s", fp8=True, mtp=1)
    before = describe(FolderSource(source))
    after = describe(FolderSource(converted(source, tmp_path / "o", "FSFS")))
    assert before["pattern"] == "FFFF" and after["pattern"] == "FSFS"
    assert (before["model_type"], after["model_type"], after["source_model_type"]) == (
        "deepseek_v32",
        "indexcache",
        "deepseek_v32",
    )
    # 32 + 8 latent entries in 4 layers, 16 index entries in each full one, two bytes each
    assert after["cache"]["latents"] == 40 * 4 * 2
    assert (before["cache"]["index_keys"], after["cache"]["index_keys"]) == (16 * 4 * 2, 16 * 2 * 2)
    assert after["cache"]["saved_share"] == pytest.approx(64 / 448)
    assert [bool(entry["bytes"]) for entry in after["indexers"]] == [True, False, True, False]
    assert [entry["reads"] for entry in after["indexers"]] == [0, 0, 2, 2]
    assert after["mtp_layers"] == [4] and after["groups"] == {"0": [0, 1], "2": [2, 3]}
    assert before["bytes"] - after["bytes"] == sum(before["indexers"][layer]["bytes"] for layer in (1, 3))
    assert before["bytes"] == sum(before["bytes_by_dtype"].values())
    assert set(before["bytes_by_dtype"]) == {"BF16", "F32", "F8_E4M3"}


def test_a_pattern_is_drawn_cell_by_cell():
    drawn = draw_cells(SharePattern("FSSF" * 20))
    assert drawn.plain.splitlines()[1].split() == ["32", *"FSSF" * 8]
    assert len(drawn.plain.splitlines()) == 3


def test_sizes_for_people():
    assert [human_bytes(count) for count in (0, 999, 1500, 2.5e6, 7e9, 1.25e12)] == [
        "0 B", "999 B", "1.5 KB", "2.5 MB", "7.0 GB", "1.25 TB",
    ]  # fmt: skip


def test_a_lost_recipe_does_not_hide_a_cast(tmp_path):
    source = build(tmp_path / "s")
    output = converted(source, tmp_path / "o", dtype="float32")
    (output / "indexcache_recipe.json").unlink()
    assert any(
        "has dtype BF16 in the source and F32" in difference for difference in check(source, output).differences
    )
    shutil.rmtree(output)
