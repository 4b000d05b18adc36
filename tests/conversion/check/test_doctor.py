"""`inspect --check` finds each planted disagreement, and says nothing about sound checkpoints of any family."""

import json

import pytest
import torch
from testing.checkpoints import INDEXER, build, edit_json, edit_shard, tiny_config, tiny_tensors, write_checkpoint
from testing.released_configs import GLM_SHARED_PATTERN, RELEASED, shrunk
from typer.testing import CliRunner

from indexcache.cli import app
from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.check.doctor import diagnose
from indexcache.conversion.check.doctor_schedule import READERS
from indexcache.conversion.convert.convert import ConvertOptions, convert
from indexcache.conversion.io.open_checkpoint import open_source
from indexcache.conversion.io.sources import ConversionError, FolderSource
from indexcache.conversion.publish.export import ENGINES, export

ROUTER = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
GLM = {"family": "glm_moe_dsa", "indexer_rope_interleave": True, **ROUTER}
DEEPSEEK = {"family": "deepseek_v32", **ROUTER}
SERVING = ("vllm", "sglang", "trtllm")


def glm(folder, weights="FFSSSF", **fields):
    """A GLM checkpoint whose weights hold the indexers of `weights`, and whose config spells what `fields` say."""
    lacking = [layer for layer, letter in enumerate(weights) if letter == "S"]
    return build(folder, layers=len(weights), lacking=lacking, **{**GLM, **fields})


def types(letters):
    return SharePattern(letters).indexer_types if letters[0] == "F" else ["shared", *types("F" + letters[1:])[1:]]


def both(letters):
    return {"indexer_types": types(letters), "index_topk_pattern": letters}


def check(folder, *engines, probe=False):
    return diagnose(FolderSource(folder), engines or None, probe=probe)


def codes(diagnosis, severity=None):
    return [found.code for found in diagnosis.findings if severity in (None, found.severity)]


def only(diagnosis, code, severity="error"):
    """The one finding, which must be of that code and severity."""
    assert codes(diagnosis) == [code], diagnosis.findings
    assert diagnosis.findings[0].severity == severity
    assert diagnosis.ok is (severity != "error")
    return diagnosis.findings[0]


def edit_indexers(folder, layers, change):
    """Let `change(name, tensor)` give new values to the indexer tensors of some layers."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in sorted(set(index.values())):

        def edit(tensors):
            for name in tensors:
                for layer in layers:
                    head = f"model.layers.{layer}.self_attn.indexer."
                    if name.startswith(head):
                        tensors[name] = change(name.removeprefix(head), tensors[name]).to(tensors[name].dtype)

        edit_shard(folder / file, edit)


# ---- sound checkpoints ----------------------------------------------------------------------------------------------


def test_every_engine_that_exports_are_made_for_is_looked_at():
    assert set(READERS) == {*ENGINES, "indexcache"}


@pytest.mark.parametrize("name", RELEASED)
def test_released_checkpoints_are_sound(tmp_path, name):
    config = shrunk(name)
    shares = "indexer_types" in config
    pattern = GLM_SHARED_PATTERN if shares else "F" * 8
    lacking = [layer for layer, letter in enumerate(pattern) if letter == "S"]
    tensors = tiny_tensors(config, fp8="quantization_config" in config, mtp=1, lacking=lacking)
    folder = write_checkpoint(tmp_path / "s", config, tensors)
    assert codes(check(folder)) == []
    for engine in READERS:
        assert codes(check(folder, engine)) == [], engine
    assert [reading.letters for reading in check(folder, "vllm", "transformers").readings] == [pattern, pattern]


@pytest.mark.parametrize("family", [DEEPSEEK, GLM])
@pytest.mark.parametrize("pattern", ["FFFFFF", "FFSSSF"])
def test_conversions_and_their_exports_are_sound(tmp_path, family, pattern):
    source = build(tmp_path / "s", layers=6, mtp=1, **family)
    convert(FolderSource(source), tmp_path / "o", ConvertOptions(SharePattern(pattern)))
    assert codes(check(tmp_path / "o")) == []
    for engine in ENGINES:
        if family is DEEPSEEK and (engine == "megatron" or (engine == "transformers" and "S" in pattern)):
            continue
        out = export(tmp_path / "o", tmp_path / engine, engine)
        assert codes(check(out, engine)) == [], engine
        assert check(out).ok, engine


def test_an_indexcache_checkpoint_is_not_for_other_engines(tmp_path):
    convert(FolderSource(glm(tmp_path / "s", "FFFF")), tmp_path / "o", ConvertOptions(SharePattern("FFSS")))
    found = only(check(tmp_path / "o", "vllm"), "engine_refuses")
    assert "does not know model_type 'indexcache'" in found.what and "export" in found.fix


# ---- the schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", ["FFFSSS", "FSSSFF"])
def test_a_schedule_that_is_off_by_one(tmp_path, spelled):
    diagnosis = check(glm(tmp_path, "FFSSSF", **both(spelled)))
    assert codes(diagnosis, "error") == ["schedule_off_by_one"]
    found = diagnosis.findings[0]
    assert set(found.engines) == {"indexcache", *SERVING, "transformers"}
    assert "FFSSSF" in found.fix and "random numbers" in found.effect


def test_a_schedule_that_fits_no_shift_is_told_as_missing_indexers(tmp_path):
    diagnosis = check(glm(tmp_path, "FFSSSF", **both("FFSFSF")))
    assert codes(diagnosis, "error") == ["indexer_missing"]
    assert "layers 3 are full" in diagnosis.findings[0].what


def test_a_frequency_without_the_offset_that_the_weights_need(tmp_path):
    weights = SharePattern.from_frequency(9, 4, 3).letters
    folder = glm(tmp_path / "a", weights, index_topk_freq=4)
    diagnosis = check(folder)
    # Megatron-Bridge takes another offset than the others where there is none.
    assert codes(diagnosis, "error") == ["wrong_offset", "indexer_missing"]
    assert diagnosis.findings[1].engines == ("megatron",)
    found = diagnosis.findings[0]
    assert found.fix.startswith("set index_skip_topk_offset to 3")
    assert set(found.engines) == {"vllm", "sglang", "trtllm", "transformers", "indexcache"}
    edit_json(folder / "config.json", index_skip_topk_offset=3)
    assert codes(check(folder, "vllm", "sglang", "trtllm", "transformers", "indexcache")) == []


@pytest.mark.parametrize("family", [DEEPSEEK, GLM])
def test_an_indexer_that_a_full_layer_lacks(tmp_path, family):
    diagnosis = check(build(tmp_path, lacking=[2], **family))
    assert codes(diagnosis, "error") == ["indexer_missing"]
    assert set(diagnosis.findings[0].engines) == set(READERS)
    assert diagnosis.held == "FFSF"


def test_a_part_of_an_indexer_is_refused_in_any_layer(tmp_path):
    for name, pattern in (("full", "FFFF"), ("shared", "FFSF")):
        config = tiny_config(layers=4, **{**GLM, **both(pattern)})
        tensors = tiny_tensors(config)
        del tensors["model.layers.2.self_attn.indexer.wk.weight"]
        diagnosis = check(write_checkpoint(tmp_path / name, config, tensors), "indexcache")
        assert "indexer_incomplete" in codes(diagnosis, "error")
        assert "lack wk" in next(f.what for f in diagnosis.findings if f.code == "indexer_incomplete")


def test_a_surplus_indexer_is_a_note_where_engines_leave_it(tmp_path):
    found = only(check(glm(tmp_path, "FFFF", **both("FFSS")), "vllm", "transformers", "indexcache"),
                 "surplus_indexer", "note")  # fmt: skip
    assert found.where == "layers 2, 3" and found.engines == ("vllm", "transformers", "indexcache")


def test_two_spellings_that_disagree(tmp_path):
    cases = {
        "types and pattern": {"indexer_types": types("FFSSSF"), "index_topk_pattern": "FSSSFF"},
        "types and frequency": {"indexer_types": types("FFSSSF"), "index_topk_freq": 2},
        "pattern and frequency": {"index_topk_pattern": "FFSSSF", "index_topk_freq": 3},
    }
    for name, fields in cases.items():
        diagnosis = check(glm(tmp_path / name, **fields))
        assert codes(diagnosis)[0] == "spellings_disagree", name
        assert set(fields) == set(diagnosis.findings[0].where.split(", "))
    agreeing = {**both("FFSSSF"), "index_topk_freq": 4, "index_skip_topk_offset": 2}
    assert codes(check(glm(tmp_path / "agreeing", **agreeing))) == []


@pytest.mark.parametrize("fields", [both("SFFFFF"), {"index_topk_freq": 4, "index_skip_topk_offset": 0}])
def test_a_schedule_that_does_not_begin_full(tmp_path, fields):
    diagnosis = check(glm(tmp_path, "FFFFFF", **fields))
    assert "first_layer_shared" in codes(diagnosis, "error")
    assert {found.where for found in diagnosis.findings if found.code == "first_layer_shared"} <= set(fields)


@pytest.mark.parametrize("fields, where", [
    ({"indexer_types": "half"}, "indexer_types"),
    ({"indexer_types": [["full"]] * 6}, "indexer_types"),
    ({"index_topk_pattern": 7}, "index_topk_pattern"),
    ({"index_topk_freq": "4"}, "index_topk_freq"),
    ({"index_topk_freq": 0}, "index_topk_freq"),
])  # fmt: skip
def test_a_spelling_that_is_none(tmp_path, fields, where):
    found = [found for found in check(glm(tmp_path, "FFFFFF", **fields)).findings if found.severity == "error"]
    assert found[0].code == "schedule_unreadable" and found[0].where == where


def test_an_engine_without_a_sharing_field_is_told_of(tmp_path):
    sharing = build(tmp_path, layers=6, lacking=[2, 3, 4], **DEEPSEEK, **both("FFSSSF"))
    diagnosis = check(sharing)
    found = only(diagnosis, "no_sharing_field", "note")
    assert found.engines == ("transformers", "megatron") and "random numbers" in found.effect
    assert "layers 2-4" in found.effect
    assert only(check(sharing, "transformers"), "no_sharing_field", "error").engines == ("transformers",)


def test_types_alone_are_read_by_transformers_and_sglang(tmp_path):
    folder = glm(tmp_path, indexer_types=types("FFSSSF"))
    deaf = ("vllm", "trtllm", "megatron")
    assert only(check(folder), "no_sharing_field", "note").engines == deaf
    assert codes(check(folder, "transformers", "sglang", "indexcache")) == []
    for engine in deaf:
        only(check(folder, engine), "no_sharing_field", "error")


def test_a_short_pattern_runs_the_rest_full(tmp_path):
    diagnosis = check(glm(tmp_path, "FFSSSF", index_topk_pattern="FFSS"))
    assert codes(diagnosis)[0] == "schedule_length"
    assert {r.engine: r.letters for r in diagnosis.readings}["vllm"] == "FFSSFF"


def test_a_schedule_that_counts_the_mtp_layer(tmp_path):
    found = only(check(glm(tmp_path, "FFSSSF", mtp=1, index_topk_pattern="FFSSSFF"), "vllm"), "schedule_length")
    assert "counts the MTP layer" in found.what


def test_a_config_that_spells_another_schedule_than_its_recipe(tmp_path):
    source = glm(tmp_path / "s", "FFFF")
    convert(FolderSource(source), tmp_path / "o", ConvertOptions(SharePattern("FSFS"), keep_shared_indexers=True))
    edit_json(tmp_path / "o" / "config.json", index_share_pattern="FFSS", indexer_types=types("FFSS"))
    diagnosis = check(tmp_path / "o")
    assert codes(diagnosis, "error") == ["schedule_not_the_recipes"]


# ---- layers ---------------------------------------------------------------------------------------------------------


def test_a_layer_count_that_includes_the_mtp_layer(tmp_path):
    folder = build(tmp_path, mtp=1, **GLM)
    edit_json(folder / "config.json", num_hidden_layers=5)
    found = only(check(folder), "layer_count_with_mtp")
    assert "counts layer 4" in found.what and found.fix.startswith("set it to 4")


@pytest.mark.parametrize("described", [3, 6])
def test_a_layer_count_that_the_weights_do_not_hold(tmp_path, described):
    folder = build(tmp_path, mtp=1, **GLM)
    edit_json(folder / "config.json", num_hidden_layers=described)
    assert {"layer_count", "layer_count_with_mtp"} & set(codes(check(folder), "error"))


def test_mtp_layers_that_are_announced_and_absent(tmp_path):
    only(check(build(tmp_path, **GLM, num_nextn_predict_layers=1)), "mtp_layers", "note")


# ---- RoPE, router, top-k --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, swapped", [(DEEPSEEK, True), (GLM, False)])
def test_the_indexers_layout_flag_swapped(tmp_path, family, swapped):
    found = only(check(build(tmp_path, **{**family, "indexer_rope_interleave": swapped})), "indexer_rope_layout")
    assert set(found.engines) == {"indexcache", *SERVING, "megatron"}


def test_the_indexers_layout_left_to_a_default(tmp_path):
    folder = build(tmp_path / "s", family="glm_moe_dsa", **ROUTER)
    assert only(check(folder), "indexer_rope_default", "note").engines == SERVING
    only(check(folder, "vllm"), "indexer_rope_default", "error")
    assert codes(check(folder, "transformers", "indexcache")) == []
    convert(FolderSource(folder), tmp_path / "o", ConvertOptions(SharePattern("FFFF")))
    edit_json(tmp_path / "o" / "config.json", indexer_rope_interleave=None)
    only(check(tmp_path / "o"), "indexer_rope_default", "error")


def test_the_main_attentions_layout_flag_swapped(tmp_path):
    only(check(build(tmp_path, **GLM, rope_interleave=False)), "main_rope_layout")


def test_top_k_beyond_the_context(tmp_path):
    only(check(build(tmp_path, **GLM, index_topk=512)), "sparse_never_runs", "note")


def test_top_k_that_is_none_beside_indexers(tmp_path):
    assert "index_topk" in codes(check(build(tmp_path, **GLM, index_topk=None)), "error")


def test_a_router_left_to_a_default(tmp_path):
    folder = build(tmp_path, family="deepseek_v32", topk_method="noaux_tc")
    found = only(check(folder), "router_default", "note")
    assert found.where == "scoring_func" and found.engines == ("vllm", "sglang")
    only(check(folder, "sglang"), "router_default", "error")
    assert codes(check(folder, "transformers")) == []


def test_another_router(tmp_path):
    assert codes(check(build(tmp_path, **{**GLM, "scoring_func": "softmax"})), "error") == ["router"]


YARN = {
    "rope_type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@pytest.mark.parametrize("fields, code, severity", [
    ({"rope_scaling": {**YARN, "mscale_all_dim": None}}, "rope_parameters", "error"),
    ({"rope_scaling": {**YARN, "mscale": None, "mscale_all_dim": None}}, "yarn_without_mscale", "note"),
    ({"rope_scaling": {**YARN, "factor": None}}, "rope_parameters", "error"),
    ({"rope_scaling": {**YARN, "factor": 2}}, "yarn_too_short", "note"),
    ({"rope_scaling": {**YARN, "type": "linear"}}, "rope_parameters", "error"),
    ({"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 8}}, "rope_parameters", "error"),
    ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "rope_parameters", "error"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_parameters", "error"),
    ({"rope_scaling": "yarn"}, "rope_parameters", "error"),
    ({"rope_scaling": YARN}, None, None),
    ({"rope_scaling": YARN, "rope_parameters": YARN}, None, None),
    ({"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, None, None),
])  # fmt: skip
def test_rope_parameters(tmp_path, fields, code, severity):
    diagnosis = check(build(tmp_path, **DEEPSEEK, **fields), "vllm")
    if code is None:
        assert codes(diagnosis) == []
    else:
        assert code in codes(diagnosis, severity)


# ---- values ---------------------------------------------------------------------------------------------------------


def fresh(name, tensor):
    """As transformers initialises a weight that it does not find."""
    if name.startswith("k_norm"):
        return torch.ones_like(tensor) if name == "k_norm.weight" else torch.zeros_like(tensor)
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * 0.02


def fresh_uniform(name, tensor):
    """As torch and MLX initialise a linear layer."""
    if name.startswith("k_norm"):
        return fresh(name, tensor)
    bound = tensor.shape[1] ** -0.5
    return (torch.rand(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * 2 - 1) * bound


@pytest.mark.parametrize("made", [fresh, fresh_uniform])
def test_indexers_of_a_fresh_initialisation(tmp_path, made):
    folder = build(tmp_path, **GLM)
    edit_indexers(folder, [1, 3], made)
    assert only(check(folder), "indexer_random").where == "layers 1, 3"


def test_trained_norms_or_another_spread_are_not_fresh(tmp_path):
    folder = build(tmp_path, **GLM)
    edit_indexers(folder, [1], lambda name, tensor: tensor if name.startswith("k_norm") else fresh(name, tensor))
    edit_indexers(folder, [2], lambda name, tensor: tensor if not name.startswith("k_norm") else fresh(name, tensor))
    assert codes(check(folder)) == []


@pytest.mark.parametrize("value, kind", [(0.0, "all zero"), (0.25, "constant"), (float("nan"), "not finite")])
@pytest.mark.parametrize("part", [name for name in INDEXER if "norm" not in name])
def test_dead_indexers(tmp_path, value, kind, part):
    folder = build(tmp_path, **GLM)
    edit_indexers(folder, [2], lambda name, tensor: torch.full_like(tensor, value) if name == part else tensor)
    found = only(check(folder), "indexer_dead")
    assert found.where == f"2.{part}" and kind in found.what


# ---- what is not this verb's, and the command line ------------------------------------------------------------------


def test_other_damage_is_found_too(tmp_path):
    config = tiny_config("glm_moe_dsa", **{name: value for name, value in GLM.items() if name != "family"})
    tensors = tiny_tensors(config)
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    found = only(check(write_checkpoint(tmp_path, config, tensors)), "not_whole")
    assert "o_proj.weight is missing" in found.what


def test_unknown_engines_and_families_are_refused(tmp_path):
    folder = build(tmp_path, **GLM)
    with pytest.raises(ConversionError, match="'llama' is no engine"):
        check(folder, "llama")
    edit_json(folder / "config.json", model_type="deepseek_v4")
    with pytest.raises(ConversionError, match="deepseek_v4"):
        check(folder)


def test_a_hub_repository_is_read_in_parts(tmp_path, hub_here):
    folder = build(tmp_path / "s", **GLM, lacking=[2])
    edit_indexers(folder, [1], fresh)
    hub_here.put(folder)
    diagnosis = diagnose(open_source("tester/base"))
    assert codes(diagnosis, "error") == ["indexer_missing", "indexer_random"] and diagnosis.held == "FFSF"


@pytest.mark.parametrize(
    "field", ["indexer_types", "index_topk_freq", "rope_parameters", "scoring_func", "index_topk"]
)
@pytest.mark.parametrize("value", [True, -1, 10**30, "S", [], [1, [2]], {"rope_type": ["x"], "type": 3}])
def test_values_of_any_kind_are_findings_or_one_message(tmp_path, field, value):
    folder = glm(tmp_path, **both("FFSSSF"))
    edit_json(folder / "config.json", **{field: value})
    try:
        diagnosis = check(folder)
    except ConversionError as error:
        assert str(folder) in str(error)
    else:
        assert diagnosis.findings and json.dumps(diagnosis.as_json())


def test_the_command_line(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["inspect", *map(str, arguments)])

    sound = build(tmp_path / "sound", **GLM)
    done = run(sound, "--check")
    assert done.exit_code == 0 and "config and weights agree" in done.stdout
    noted = build(tmp_path / "noted", **GLM, index_topk=512)
    done = run(noted, "--check")
    assert done.exit_code == 0 and "0 errors, 1 note" in done.stdout
    broken = build(tmp_path / "broken", **GLM, lacking=[2])
    done = run(broken, "--check", "--json", "--engine", "vllm", "--engine", "sglang")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and found["ok"] is False and found["held"] == "FFSF"
    assert [reading["engine"] for reading in found["readings"]] == ["vllm", "sglang"]
    assert run(broken, "--check").exit_code == 1
    assert run(sound, "--probe").exit_code == 2 and run(sound, "--engine", "vllm").exit_code == 2
    assert run(sound, "--check", "--overlap", "x").exit_code == 2
