import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from testing.tiny_models import SIZES, tiny_config
from transformers import AutoConfig

import indexcache
from indexcache import IndexCacheConfig


def test_without_a_spelling_every_layer_is_full():
    assert tiny_config().index_share_pattern == "FFFF"


@pytest.mark.parametrize(
    "spelling",
    [
        {"index_share_pattern": "FFSS"},
        {"indexer_types": ["full", "full", "shared", "shared"]},
        {"index_topk_pattern": "FFSS"},
        {"index_topk_pattern": ["F", "F", "S", "S"]},
        {"index_topk_freq": 3},
        {"index_topk_freq": 3, "index_skip_topk_offset": 2, "index_topk_pattern": None},
        {"index_share_pattern": "FFSS", "indexer_types": ["full", "full", "shared", "shared"], "index_topk_freq": 3},
    ],
)
def test_every_accepted_spelling_becomes_the_pattern(spelling):
    config = tiny_config(**spelling)
    assert config.index_share_pattern == "FFSS"
    assert config.indexer_types == ["full", "full", "shared", "shared"]


@pytest.mark.parametrize(
    ("spellings", "message"),
    [
        ({"index_share_pattern": "FSSS", "indexer_types": ["full"] * 4}, "disagree from layer 1 on"),
        ({"index_topk_pattern": "FFSS", "index_topk_freq": 4}, "index_topk_pattern and index_topk_freq=4 .* disagree"),
    ],
)
def test_disagreeing_spellings_are_refused(spellings, message):
    if "index_topk_freq" in spellings:
        spellings["index_topk_pattern"] = "FSFS"
    with pytest.raises(ValueError, match=message):
        tiny_config(**spellings)


def test_saved_config_reads_back_and_names_both_spellings(tmp_path):
    config = tiny_config(index_share_pattern="FSFS", indexer_rope_interleave=True, source_model_type="glm_moe_dsa")
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["index_share_pattern"] == "FSFS"
    assert saved["indexer_types"] == ["full", "shared", "full", "shared"]
    assert "index_topk_freq" not in saved
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, IndexCacheConfig)
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        ({"index_share_pattern": "FSSS"}, "FSSS"),
        ({"indexer_types": ["full", "shared", "shared", "full"]}, "FSSF"),
        ({"index_topk_freq": 2}, "FFSF"),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, "FSFS"),
    ],
)
def test_a_pattern_given_at_load_replaces_the_one_on_file(tmp_path, override, pattern):
    tiny_config(index_share_pattern="FFFS").save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, **override).index_share_pattern == pattern


def test_a_wrong_pattern_given_at_load_is_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 2 characters for num_hidden_layers=4"):
        AutoConfig.from_pretrained(tmp_path, index_share_pattern="FS")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_topk": 0}, "index_topk must be at least 1"),
        ({"q_lora_rank": None}, "the indexer reads the query latent"),
        ({"index_head_dim": 4}, "index_head_dim .* must be at least qk_rope_head_dim"),
        ({"qk_rope_head_dim": 7}, "even rotary dimension"),
        ({"n_group": 3}, "n_group .* must divide"),
        ({"routed_scaling_factor": 1e308}, "routed_scaling_factor must be a finite number of fp32 .got 1e.308"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number of fp32 .got nan"),
        ({"gated_norm_rank": 0}, "gated_norm_rank must be at least 1, or None"),
        ({"attention_output_gate": True, "q_lora_rank": None, "index_topk": None}, "is made of the query latent"),
        ({"topk_group": 3}, "topk_group must lie in"),
        ({"n_group": 8, "topk_group": 1}, "at most the 1 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be at least 1 "),
        ({"n_group": None, "num_experts_per_tok": 9}, "at most n_routed_experts=8 .got 9"),
        ({"index_topk": None, "index_share_pattern": "FSSS"}, "makes every layer dense"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**changes)


def test_mlp_layer_types_follow_first_k_dense_and_frequency():
    assert tiny_config(first_k_dense_replace=2).mlp_layer_types == ["dense", "dense", "sparse", "sparse"]
    assert tiny_config(first_k_dense_replace=1, moe_layer_freq=2).mlp_layer_types == [
        "dense",
        "dense",
        "sparse",
        "dense",
    ]


def test_deepseek_release_config_is_understood():
    release = {**SIZES, "rope_theta": 10000, "moe_layer_freq": 1, "head_dim": 192, "num_nextn_predict_layers": 1}
    release.pop("rope_parameters")
    release["rope_scaling"] = {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    }
    config = IndexCacheConfig(**release)
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["rope_theta"] == 10000
    assert config.head_dim == config.qk_rope_head_dim


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("indexer_fp8", "no"),
        ("hidden_size", "7168"),
        ("index_topk", 2048.5),
        ("index_topk", True),
        ("index_share_pattern", ["F", "S"]),
        ("rope_interleave", 1),
        ("mlp_layer_types", "dense"),
        ("n_group", "8"),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_by_name(field, value):
    with pytest.raises((StrictDataclassError, ValueError), match=field):
        IndexCacheConfig(**{field: value})


def test_saving_notes_the_release_that_wrote_it(tmp_path):
    IndexCacheConfig(num_hidden_layers=4, indexcache_version="0.0.1").save_pretrained(tmp_path)
    assert IndexCacheConfig.from_pretrained(tmp_path).indexcache_version == indexcache.__version__
