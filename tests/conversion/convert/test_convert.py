"""Converted checkpoints hold the source's bytes, leave the source alone, and refuse to trample on other folders."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from testing.checkpoints import BLOCK, INDEXER, as_bytes, build, edit_json, edit_shard, hashes, read_all

from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.convert import convert as convert_module
from indexcache.conversion.convert.convert import ConvertOptions, convert
from indexcache.conversion.io import shard_writer
from indexcache.conversion.io.checkpoint import read_checkpoint
from indexcache.conversion.io.sources import ConversionError, FolderSource


def run(source, output, pattern="FSFS", **options):
    return convert(FolderSource(source), Path(output), ConvertOptions(SharePattern.parse(pattern), **options))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "axk2"])
def test_every_kept_tensor_is_byte_identical(tmp_path, family, fp8):
    source = build(tmp_path / "s", family=family, fp8=fp8, mtp=1)
    before = hashes(source)
    run(source, tmp_path / "o")
    old, new = read_all(source), read_all(tmp_path / "o")
    gone = {name for name in old if any(f"layers.{i}.self_attn.indexer" in name for i in (1, 3))}
    assert set(new) == set(old) - gone and len(gone) == 2 * (7 if fp8 else 5)
    for name, tensor in new.items():
        assert tensor.dtype == old[name].dtype and tensor.shape == old[name].shape
        assert as_bytes(tensor) == as_bytes(old[name]), name
    assert hashes(source) == before
    index = json.loads((tmp_path / "o" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(new)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in new.values())


@settings(max_examples=25, deadline=None)
@given(
    letters=st.text("FS", min_size=3, max_size=3),
    shards=st.integers(1, 6),
    fp8=st.booleans(),
    limit=st.none() | st.integers(2_000, 80_000),
    keep=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_layout_converts_losslessly(tmp_path_factory, letters, shards, fp8, limit, keep, seed):
    folder = tmp_path_factory.mktemp("layout")
    source = build(folder / "s", fp8=fp8, shards=shards, seed=seed)
    run(source, folder / "o", "F" + letters, max_shard_size=limit, keep_shared_indexers=keep)
    old, new = read_all(source), read_all(folder / "o")
    for name, tensor in old.items():
        dropped = not keep and any(
            f"layers.{i + 1}.self_attn.indexer" in name for i, x in enumerate(letters) if x == "S"
        )
        assert (name not in new) if dropped else as_bytes(new[name]) == as_bytes(tensor), name
    assert set(new) <= set(old)
    read_checkpoint(FolderSource(folder / "o"))
    shutil.rmtree(folder)


def test_written_shards_keep_their_metadata_and_align_every_tensor(tmp_path):
    source = build(tmp_path / "s", fp8=True)
    run(source, tmp_path / "o", "FSSS", copy=True)
    for path in (tmp_path / "o").glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
    sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
    infos = read_checkpoint(FolderSource(tmp_path / "o")).tensors.values()
    assert all(info.begin % sizes[info.dtype] == 0 for info in infos)


def test_unchanged_shards_are_linked_and_copies_are_asked_for(tmp_path):
    source = build(tmp_path / "s")
    linked, copied = run(source, tmp_path / "a", "FFFF"), run(source, tmp_path / "b", "FFFF", copy=True)
    for shard in linked.plan.shards:
        inodes = [(folder / shard.file).stat().st_ino for folder in (source, tmp_path / "a", tmp_path / "b")]
        assert linked.how[shard.file] in ("linked", "cloned") and copied.how[shard.file] == "copied"
        assert inodes[2] != inodes[0] and (linked.how[shard.file] == "cloned" or inodes[1] == inodes[0])
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_a_link_to_another_disk_falls_back_to_a_copy(tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(shard_writer.os, "link", no_link)
    monkeypatch.setattr(shard_writer, "_clone", no_link)
    source = build(tmp_path / "s")
    done = run(source, tmp_path / "o", "FFFF")
    assert set(done.how.values()) == {"copied"}
    assert all((tmp_path / "o" / f).read_bytes() == (source / f).read_bytes() for f in done.how)


def test_one_file_stays_one_file(tmp_path):
    source = build(tmp_path / "s", shards=1)
    run(source, tmp_path / "o")
    assert (tmp_path / "o" / "model.safetensors").exists()
    assert not (tmp_path / "o" / "model.safetensors.index.json").exists()


def test_what_comes_along_and_what_stays_behind(tmp_path):
    source = build(tmp_path / "s")
    (source / "pytorch_model.bin").write_bytes(b"x")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("t")
    done = run(source, tmp_path / "o")
    out = {path.relative_to(tmp_path / "o").as_posix() for path in (tmp_path / "o").rglob("*") if path.is_file()}
    assert {"LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"} <= out
    assert {"encoding/encoding_dsv32.py", "additional_chat_templates/tool.jinja", "modeling_indexcache.py"} <= out
    assert not {"modeling_deepseek.py", "pytorch_model.bin", ".indexcache_convert.json"} & out
    assert not [name for name in out if name.endswith(".partial")]
    assert any("pytorch_model.bin" in note for note in done.warnings)
    recipe = json.loads((tmp_path / "o" / "indexcache_recipe.json").read_text())
    assert set(recipe["files"]) == out
    assert str(tmp_path) not in json.dumps(recipe) and recipe["index_share_pattern"] == "FSFS"
    found = hashes(tmp_path / "o")
    assert {file: entry["sha256"] for file, entry in recipe["shards"].items()} == {
        f: found[f] for f in recipe["shards"]
    }


def test_the_same_conversion_gives_the_same_bytes(tmp_path):
    source = build(tmp_path / "s", fp8=True)
    for name in "ab":
        run(source, tmp_path / name, dtype="bfloat16")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


# ---- casting --------------------------------------------------------------------------------------------------------


def by_hand(tensors, name, dtype):
    tensor = tensors[name]
    if tensor.dtype == torch.float8_e4m3fn:
        rows, columns = tensor.shape
        scale = tensors[f"{name}_scale_inv"]
        wide = torch.empty(rows, columns)
        for row in range(rows):
            for column in range(columns):
                wide[row, column] = tensor[row, column].float() * scale[row // BLOCK[0], column // BLOCK[1]]
        return wide.to(dtype)
    return tensor.to(dtype)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_fp8_becomes_what_an_independent_dequantisation_gives(tmp_path, name):
    source = build(tmp_path / "s", fp8=True, layers=2, mtp=1)
    run(source, tmp_path / "o", "FS", dtype=name)
    old, new, dtype = read_all(source), read_all(tmp_path / "o"), getattr(torch, name)
    kept = {n for n in old if not n.endswith("_scale_inv") and "layers.1.self_attn.indexer" not in n}
    assert set(new) == kept
    for tensor in kept:
        stays = tensor.endswith("e_score_correction_bias") or (name == "float16" and "weights_proj" in tensor)
        want = old[tensor] if stays else by_hand(old, tensor, dtype)
        assert new[tensor].dtype == want.dtype and as_bytes(new[tensor]) == as_bytes(want), tensor
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert config["dtype"] == name and "quantization_config" not in config and "torch_dtype" not in config


def test_a_cast_that_changes_nothing_passes_shards_whole(tmp_path):
    source = build(tmp_path / "s")
    for path in source.glob("*.safetensors"):
        edit_shard(path, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    assert all(shard.is_whole for shard in run(source, tmp_path / "o", "FFFF", dtype="bfloat16").plan.shards)


def test_values_beyond_float16_are_refused(tmp_path):
    source = build(tmp_path / "s", shards=1)
    edit_shard(source / "model.safetensors", lambda tensors: tensors["lm_head.weight"].fill_(1e6))
    with pytest.raises(ConversionError, match=r"lm_head.weight in model.safetensors holds values beyond float16"):
        run(source, tmp_path / "o", dtype="float16")
    assert not (tmp_path / "o" / "config.json").exists()


# ---- IndexCache sources ---------------------------------------------------------------------------------------------


def test_an_indexcache_source_takes_a_sparser_pattern(tmp_path):
    source = build(tmp_path / "s")
    run(source, tmp_path / "a", "FSFF")
    run(tmp_path / "a", tmp_path / "b", "FSFS")
    run(source, tmp_path / "c", "FSFS")
    direct, twice = read_all(tmp_path / "c"), read_all(tmp_path / "b")
    assert set(direct) == set(twice) and all(as_bytes(direct[n]) == as_bytes(twice[n]) for n in direct)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "bc"]
    assert configs[0] == configs[1]
    with pytest.raises(
        ConversionError, match=r"has no indexer weights in layers 1, which the pattern FFFF makes full"
    ):
        run(tmp_path / "a", tmp_path / "d", "FFFF")


def test_kept_shared_indexers_can_be_made_full_again(tmp_path):
    run(build(tmp_path / "s"), tmp_path / "a", "FSSS", keep_shared_indexers=True)
    run(tmp_path / "a", tmp_path / "b", "FFSS")
    layers = {name.split(".")[2] for name in read_all(tmp_path / "b") if name.endswith(f"indexer.{INDEXER[0]}")}
    assert layers == {"0", "1"}


# ---- the output folder ----------------------------------------------------------------------------------------------


def test_an_existing_output_is_refused(tmp_path):
    source = build(tmp_path / "s")
    (tmp_path / "o").mkdir()
    run(source, tmp_path / "o")
    with pytest.raises(ConversionError, match=r"not empty \(it holds an earlier conversion\): .*--overwrite"):
        run(source, tmp_path / "o")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for options in ({}, {"resume": True}):
        with pytest.raises(ConversionError, match="is not empty"):
            run(source, tmp_path / "mine", **options)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConversionError, match="is no folder"):
        run(source, tmp_path / "file")


def test_overwrite_replaces_a_conversion_and_touches_nothing_else(tmp_path):
    source = build(tmp_path / "s")
    before = hashes(source)
    run(source, tmp_path / "o", "FFFF", max_shard_size=9_000)
    (tmp_path / "o" / "thesis.txt").write_text("mine")
    run(source, tmp_path / "o", "FSFS", overwrite=True)
    run(source, tmp_path / "fresh", "FSFS")
    assert hashes(tmp_path / "o") == {**hashes(tmp_path / "fresh"), "thesis.txt": hashes(tmp_path / "o")["thesis.txt"]}
    assert hashes(source) == before, "linked shards were written through"


def test_overwrite_never_leaves_the_output_folder(tmp_path):
    source = build(tmp_path / "s")
    run(source, tmp_path / "o")
    (tmp_path / "precious").write_text("x")
    edit_json(tmp_path / "o" / "indexcache_recipe.json", files=["../precious", str(tmp_path / "precious")])
    run(source, tmp_path / "o", "FFSS", overwrite=True)
    assert (tmp_path / "precious").exists()


def test_the_output_must_lie_apart_from_the_source(tmp_path):
    source = build(tmp_path / "s")
    before = hashes(source)
    (tmp_path / "link").symlink_to(source)
    for output, message in (
        (source, "is the source itself"),
        (tmp_path / "link", "is the source itself"),
        (source / "out", "lies inside the source"),
        (tmp_path, "lies inside the output"),
    ):
        with pytest.raises(ConversionError, match=message):
            run(source, output, overwrite=True)
    assert hashes(source) == before


# ---- full disks -----------------------------------------------------------------------------------------------------


def test_too_little_space_is_seen_beforehand(tmp_path, monkeypatch):
    source = build(tmp_path / "s")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage._replace(free=1_000))
    with pytest.raises(ConversionError, match=r"has 1,000 bytes free and the conversion needs \d\d"):
        run(source, tmp_path / "o", copy=True)
    run(source, tmp_path / "linked", "FFFF")  # needs none


def test_a_disk_that_fills_up_leaves_a_conversion_to_resume(tmp_path, monkeypatch):
    source = build(tmp_path / "s", shards=6)
    run(source, tmp_path / "undisturbed", "FSSS")
    write, left = os.write, [40_000]

    def write_until_full(descriptor, block):
        left[0] -= len(block)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, block)

    monkeypatch.setattr(shard_writer.os, "write", write_until_full)
    with pytest.raises(ConversionError, match=r"the disk is full: .* could not be written .*--resume"):
        run(source, tmp_path / "o", "FSSS")
    names = {path.name for path in (tmp_path / "o").iterdir()}
    assert "config.json" not in names and ".indexcache_convert.json" in names
    assert not [name for name in names if name.endswith(".partial")]
    monkeypatch.undo()
    run(source, tmp_path / "o", "FSSS", resume=True)
    assert hashes(tmp_path / "o") == hashes(tmp_path / "undisturbed")
