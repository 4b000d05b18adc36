"""Planning on headers: every key is accounted for, patterns are resolved, shards are laid out."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from testing.checkpoints import INDEXER, build, tiny_config

from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.check.drawing import draw_plan, human_bytes
from indexcache.conversion.convert.families import convert_config, load_config, source_pattern
from indexcache.conversion.convert.pattern_file import choose_pattern, read_pattern_file
from indexcache.conversion.convert.plan import build_plan
from indexcache.conversion.io.checkpoint import read_checkpoint
from indexcache.conversion.io.sources import ConversionError, FolderSource


def plan_of(folder, pattern=None, **options):
    return build_plan(read_checkpoint(FolderSource(folder)), pattern and SharePattern.parse(pattern), **options)


def test_every_key_is_kept_dropped_or_folded(tmp_path):
    source = build(tmp_path / "s", fp8=True, mtp=1)
    for dtype in ("auto", "bfloat16"):
        plan = plan_of(source, "FSFS", dtype=dtype)
        kept, dropped, folded = set(plan.weight_map), {i.name for i in plan.dropped}, {i.name for i in plan.folded}
        assert kept | dropped | folded == set(plan.checkpoint.tensors)
        assert len(kept) + len(dropped) + len(folded) == len(plan.checkpoint.tensors)
        scales = {
            f"model.layers.{i}.self_attn.indexer.{n}_scale_inv" for i in (1, 3) for n in ("wk.weight", "wq_b.weight")
        }
        assert dropped == scales | {f"model.layers.{i}.self_attn.indexer.{n}" for i in (1, 3) for n in INDEXER}
        assert bool(folded) == (dtype != "auto") and all(name.endswith("_scale_inv") for name in folded)
        assert any(name.startswith("model.layers.4.self_attn.indexer") for name in kept), "MTP layers stay whole"


def test_a_shard_that_loses_nothing_passes_whole_and_an_emptied_one_vanishes(tmp_path):
    source = build(tmp_path / "s", shards=3)
    whole = plan_of(source, "FFFF")
    assert [shard.is_whole for shard in whole.shards] == [True] * 3 and not whole.vanished_files
    # put the indexers of layer 3 into a file of their own
    import torch
    from safetensors.torch import load_file, save_file

    index = json.loads((source / "model.safetensors.index.json").read_text())
    moved = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(source / file)
        mine = {name: tensors.pop(name) for name in list(tensors) if "layers.3.self_attn.indexer" in name}
        if mine:
            moved |= mine
            (source / file).unlink()
            save_file({name: torch.clone(value) for name, value in tensors.items()}, source / file)
    save_file(moved, source / "model-indexers.safetensors")
    index["weight_map"] |= dict.fromkeys(moved, "model-indexers.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    plan = plan_of(source, "FFFS")
    assert plan.vanished_files == ["model-indexers.safetensors"]
    assert all(shard.is_whole for shard in plan.shards) and len(plan.shards) == 3


def test_what_is_written_anew_only_to_drop_indexers_is_counted_and_shown(tmp_path):
    source = build(tmp_path / "s", shards=3)
    plan = plan_of(source, "FFFS")
    anew = [shard for shard in plan.shards if not shard.is_whole]
    assert 0 < len(anew) < 3 and plan.rewritten_to_drop == sum(shard.nbytes for shard in anew)
    drawn = Console(width=200, file=io.StringIO())
    drawn.print(draw_plan(plan))
    said = f"{human_bytes(plan.rewritten_to_drop)} are written anew only to drop indexers: with --keep-shared-indexers"
    assert said in drawn.file.getvalue()
    assert plan_of(source, "FFFS", keep_shared_indexers=True).rewritten_to_drop == 0
    assert plan_of(source, "FFFS", dtype="float32").rewritten_to_drop == 0, "the cast rewrites them anyway"
    assert plan_of(source, "FFFS", max_shard_size=9_000).rewritten_to_drop == 0


def test_keep_shared_indexers_drops_nothing(tmp_path):
    plan = plan_of(build(tmp_path / "s"), "FSSS", keep_shared_indexers=True)
    assert not plan.dropped and all(shard.is_whole for shard in plan.shards)
    assert plan.config["index_share_pattern"] == "FSSS"


@settings(max_examples=40, deadline=None)
@given(limit=st.integers(1, 60_000), letters=st.text("FS", min_size=3, max_size=3))
def test_resharding_keeps_every_tensor_once_and_respects_the_limit(tmp_path_factory, limit, letters):
    source = tmp_path_factory.getbasetemp() / "reshard"
    if not source.exists():
        build(source)
    plan = plan_of(source, "F" + letters, max_shard_size=limit)
    names = [tensor.name for shard in plan.shards for tensor in shard.tensors]
    assert len(names) == len(set(names)) and set(names) | {i.name for i in plan.dropped} == set(
        plan.checkpoint.tensors
    )
    assert all(shard.nbytes <= limit or len(shard.tensors) == 1 for shard in plan.shards)
    assert plan.has_index == (len(plan.shards) > 1)


def test_shared_layers_may_already_lack_their_indexers(tmp_path):
    source = build(
        tmp_path / "s", family="glm_moe_dsa", lacking=(1, 2), indexer_types=["full", "shared", "shared", "full"]
    )
    assert plan_of(source).pattern.letters == "FSSF"
    assert not plan_of(source).dropped
    assert len(plan_of(source, "FSSS").dropped) == len(INDEXER)
    with pytest.raises(ConversionError, match=r"no indexer weights in layers 1, 2, which the pattern FFFS makes full"):
        plan_of(source, "FFFS")


def test_reviving_a_shared_indexer_is_noted(tmp_path):
    source = build(tmp_path / "s", family="glm_moe_dsa", indexer_types=["full", "shared", "shared", "full"])
    assert any("layers 1" in warning for warning in plan_of(source, "FFSF").warnings)
    assert not plan_of(source, "FSSF").warnings


# ---- the config -----------------------------------------------------------------------------------------------------


def test_config_keeps_every_field_and_replaces_the_pattern(tmp_path):
    source = tiny_config(index_topk_freq=2, index_skip_topk_offset=1, num_nextn_predict_layers=1, fp8=True)
    written = convert_config(source, SharePattern("FSSF"), None, {"AutoConfig": "a.B"}, "here")
    assert written["model_type"] == "indexcache" and written["architectures"] == ["IndexCacheForCausalLM"]
    assert written["auto_map"] == {"AutoConfig": "a.B"} and written["source_model_type"] == "deepseek_v32"
    assert written["index_share_pattern"] == "FSSF" and written["indexer_types"] == [
        "full",
        "shared",
        "shared",
        "full",
    ]
    assert not {"index_topk_freq", "index_skip_topk_offset", "index_topk_pattern"} & set(written)
    changed = {"model_type", "architectures", "auto_map", "index_topk_freq", "index_skip_topk_offset"}
    assert {k: written[k] for k in source if k not in changed} == {k: v for k, v in source.items() if k not in changed}
    cast = convert_config(source, SharePattern("FSSF"), "float16", {}, "here")
    assert cast["dtype"] == "float16" and not {"torch_dtype", "quantization_config"} & set(cast)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "axk2"])
def test_defaults_of_the_family_hold_where_the_source_is_silent(family):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    native = CONFIG_MAPPING[family](num_hidden_layers=5)
    source = {"model_type": family, "num_hidden_layers": 5}
    ours = load_config(convert_config(source, None, None, {}, "here"), "here")
    for name in ("rms_norm_eps", "n_group", "topk_group", "v_head_dim", "vocab_size", "index_n_heads", "q_lora_rank",
                 "mlp_layer_types", "rope_parameters", "hidden_size", "max_position_embeddings"):  # fmt: skip
        assert getattr(ours, name) == getattr(native, name), name
    assert ours.indexer_rope_interleave is (family == "glm_moe_dsa")


@pytest.mark.parametrize("spelling, letters", [
    ({"index_topk_pattern": "FSFS"}, "FSFS"),
    ({"index_topk_freq": 2}, "FFSF"),
    ({"index_topk_freq": 4, "index_skip_topk_offset": 3, "indexer_types": ["full", "full", "full", "shared"]}, "FFFS"),
    ({}, "FFFF"),
])  # fmt: skip
def test_the_source_s_own_pattern_is_read_in_every_spelling(spelling, letters):
    assert source_pattern(tiny_config("glm_moe_dsa", **spelling), "here").letters == letters


def test_disagreeing_spellings_in_the_source_are_refused():
    config = tiny_config("glm_moe_dsa", index_topk_pattern="FSFS", indexer_types=["full"] * 4)
    with pytest.raises(ConversionError, match="disagree from layer 1"):
        source_pattern(config, "here")


# ---- choosing a pattern ---------------------------------------------------------------------------------------------


def test_pattern_options(tmp_path):
    plain, shared = tiny_config(), tiny_config("glm_moe_dsa", index_topk_pattern="FSSS")
    assert choose_pattern(plain, pattern="FSFS").letters == "FSFS"
    assert choose_pattern(plain, keep="1/4").letters == "FSSS"
    assert choose_pattern(shared) is None
    with pytest.raises(ConversionError, match="give --pattern, --pattern-file or --keep"):
        choose_pattern(plain)
    with pytest.raises(ConversionError, match="--pattern stands alone"):
        choose_pattern(plain, pattern="FSFS", keep="1/4")


@pytest.mark.parametrize("letters, message", [
    ("FSS", "has 3 characters for num_hidden_layers=4"),
    ("SFFF", "must start with 'F'"),
    ("FSXS", "layer 2 has 'X'"),
    ("", "is empty"),
])  # fmt: skip
def test_bad_patterns_are_refused(letters, message):
    with pytest.raises(ConversionError, match=message):
        choose_pattern(tiny_config(), pattern=letters)


def test_pattern_files(tmp_path):
    one, many = tmp_path / "one.json", tmp_path / "many.json"
    one.write_text('{"index_share_pattern": "FSSF"}')
    many.write_text('{"patterns": {"1": "FSSS", "2": "FSFS", "4": "FFFF"}}')
    assert read_pattern_file(one, 4).letters == "FSSF" and read_pattern_file(one, 4, "2").letters == "FSSF"
    assert read_pattern_file(many, 4, "1/2").letters == "FSFS" and read_pattern_file(many, 4, "1").letters == "FSSS"
    with pytest.raises(ConversionError, match="choose one with --keep"):
        read_pattern_file(many, 4)
    with pytest.raises(ConversionError, match="no pattern for 3 full layers"):
        read_pattern_file(many, 4, "3")
    with pytest.raises(ConversionError, match="keeps 2 indexers, and 3 was asked for"):
        read_pattern_file(one, 4, "3")
    one.write_text('{"pattern": 1}')
    with pytest.raises(ConversionError, match="it needs"):
        read_pattern_file(one, 4)
    one.write_text("{")
    with pytest.raises(ConversionError, match="no readable JSON"):
        read_pattern_file(one, 4)
    with pytest.raises(ConversionError, match="no readable JSON"):
        read_pattern_file(tmp_path / "absent.json", 4)
