"""`verify` proves equality and names every difference; `inspect` tells what is there."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from testing.checkpoints import build, edit_json, edit_shard

from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.check import logits_comparison
from indexcache.conversion.check.describe import describe
from indexcache.conversion.check.drawing import draw_cells, draw_verification, human_bytes
from indexcache.conversion.check.logits_comparison import compare_logits
from indexcache.conversion.check.verify import verify
from indexcache.conversion.convert.convert import ConvertOptions, convert
from indexcache.conversion.io.checkpoint import read_checkpoint
from indexcache.conversion.io.sources import ConversionError, FolderSource


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
    pattern, *found = check(source, output).differences
    assert pattern == "the pattern is FSFS in the recipe of the conversion and FSFF in config.json"
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


@pytest.mark.parametrize("pattern", ["FFFF", "FSSS"])
@pytest.mark.parametrize("family, native", [
    ("deepseek_v32", "DeepseekV32ForCausalLM"), ("glm_moe_dsa", "GlmMoeDsaForCausalLM"), ("axk2", "AXK2ForCausalLM"),
])  # fmt: skip
def test_logits_agree_with_transformers_own_model_whatever_the_pattern(tmp_path, family, native, pattern):
    source = build(tmp_path / "s", family=family, mtp=1, index_n_heads=32)  # so that few scores tie at zero
    found = check(source, converted(source, tmp_path / "o", pattern), logits=True)
    assert found.ok and found.verdict == "verified" and not found.warnings
    assert found.logits["compared"] and found.logits["reference"] == native
    assert found.logits["tokens"] > found.logits["index_topk"] == 8
    assert found.logits["max_abs_difference"] < 1e-4 and abs(found.logits["mean_kl"]) < 1e-6


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_logits_tell_one_shared_pattern_from_another(tmp_path, family):
    source = build(tmp_path / "s", family=family, index_n_heads=32)
    output = converted(source, tmp_path / "o", "FSSS")
    before, after = (read_checkpoint(FolderSource(folder)) for folder in (source, output))
    assert compare_logits(before, after, SharePattern("FSSS"))["agree"]
    assert not compare_logits(before, after, SharePattern("FFSS"))["agree"]


def test_glm_with_its_own_sharing_agrees_with_transformers(tmp_path):
    types = ["full", "shared", "shared", "full"]
    source = build(tmp_path / "s", family="glm_moe_dsa", indexer_types=types, lacking=(1, 2), index_n_heads=32)
    convert(FolderSource(source), tmp_path / "o", ConvertOptions())
    result = check(source, tmp_path / "o", logits=True)
    assert result.ok and result.logits["max_abs_difference"] < 1e-4


@pytest.mark.parametrize("family, native", [
    ("deepseek_v32", "DeepseekV32ForCausalLM"), ("axk2", "AXK2ForCausalLM"),
])  # fmt: skip
def test_a_block_fp8_checkpoint_runs_on_a_cpu(tmp_path, family, native):
    source = build(tmp_path / "s", family=family, fp8=True, mtp=1, index_n_heads=32)
    found = check(source, converted(source, tmp_path / "o", "FSSF"), logits=True)
    assert found.ok and found.logits["reference"] == native and found.verdict == "verified"


def test_an_indexcache_source_is_run_by_our_own_class_and_that_is_said(tmp_path):
    first = converted(build(tmp_path / "s", index_n_heads=32), tmp_path / "o", "FSFF")
    found = check(first, converted(first, tmp_path / "p", "FSSF"), logits=True)
    assert found.ok and found.logits["compared"] and found.logits["reference"] == "IndexCacheForCausalLM"
    assert "transformers has no class of its own" in found.warnings[0]


def test_what_is_not_compared_is_a_warning_and_no_pass(tmp_path, monkeypatch):
    source = build(tmp_path / "s")
    output = converted(source, tmp_path / "o")
    monkeypatch.setattr(logits_comparison, "free_memory", lambda: 1000)
    small = check(source, output, logits=True)
    assert small.ok and small.verdict == "verified, but NOT COMPARED: logits"
    assert small.warnings[0].startswith("logits not compared: ") and "1,000 of memory are free" in small.warnings[0]
    skipped = check(source, output)
    assert skipped.warnings == ["logits not compared: not asked for"] and "NOT COMPARED" in skipped.verdict
    drawn = Console(width=200, file=io.StringIO())
    drawn.print(draw_verification(skipped))
    assert "warning: logits not compared: not asked for" in drawn.file.getvalue()
    (output / "indexcache_recipe.json").unlink()
    unsaid = check(source, output)
    assert unsaid.warnings[0].startswith("pattern not compared: there is no indexcache_recipe.json")
    assert unsaid.verdict == "verified, but NOT COMPARED: pattern, logits"


def test_a_converted_checkpoint_that_does_not_run_is_a_difference(tmp_path, monkeypatch):
    source = build(tmp_path / "s")
    output = converted(source, tmp_path / "o")

    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(logits_comparison, "_our_logits", broken)
    found = check(source, output, logits=True)
    assert not found.ok and found.verdict == "not verified"
    assert found.differences == [
        "the converted checkpoint does not run: RuntimeError: mat1 and mat2 shapes cannot be multiplied"
    ]


@pytest.mark.parametrize("lacking", ["_native_model", "_our_logits"])
def test_memory_that_runs_out_is_not_taken_for_a_difference(tmp_path, monkeypatch, lacking):
    source = build(tmp_path / "s")
    output = converted(source, tmp_path / "o")
    monkeypatch.setattr(logits_comparison, lacking, lambda *_: torch.empty(1 << 46))
    found = check(source, output, logits=True)
    assert found.ok and found.not_compared == ["logits"] and "allocate memory" in found.warnings[0]


def test_configs_are_compared_by_meaning(tmp_path):
    """Another spelling of the same angles is no difference; another value in any spelling is."""
    yarn = {"factor": 4, "original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 1.0}
    source = build(tmp_path / "s", rope_scaling={"type": "yarn", **yarn})
    output = converted(source, tmp_path / "o")
    written = json.loads((output / "config.json").read_text())
    assert written["rope_scaling"] == {"type": "yarn", **yarn} and written["rope_theta"] == 10000
    assert "rope_parameters" not in written and check(source, output).ok
    edit_json(output / "config.json", rope_scaling=None, rope_theta=None,
              rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, **yarn})  # fmt: skip
    assert check(source, output).ok
    edit_json(output / "config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 500000, **yarn})
    assert check(source, output).differences == [
        "config.json: rope_parameters.rope_theta is 10000 in the source and 500000 now"
    ]
    edit_json(output / "config.json", rope_parameters=None, rope_scaling={"type": "yarn", **yarn}, rope_theta=10000,
              indexer_fp8=True, first_k_dense_replace=None, mlp_layer_types=["dense"] + ["sparse"] * 3)  # fmt: skip
    assert [difference.split(" is ")[0] for difference in check(source, output).differences] == [
        "config.json: first_k_dense_replace",
        "config.json: indexer_fp8",
    ]


def test_shared_indexers_that_the_recipe_dropped_are_named(tmp_path):
    source = build(tmp_path / "s")
    output = converted(source, tmp_path / "o", "FSFS", keep_shared_indexers=True)
    assert check(source, output).ok
    edit_json(output / "indexcache_recipe.json", keep_shared_indexers=None)
    recipe = json.loads((output / "indexcache_recipe.json").read_text())
    (output / "indexcache_recipe.json").write_text(json.dumps({**recipe, "keep_shared_indexers": False}))
    assert "layers 1, 3 are shared and hold indexer weights" in check(source, output).differences[0]


def test_logits_that_differ_under_the_same_pattern_fail(tmp_path):
    source = build(tmp_path / "s")
    output = converted(source, tmp_path / "o", "FFFF")
    edit_json(output / "config.json", rope_interleave=False)
    result = check(source, output, logits=True)
    assert not result.ok and any("at the median token" in difference for difference in result.differences)


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
