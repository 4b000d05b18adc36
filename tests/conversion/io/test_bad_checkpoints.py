"""Each way in which a source can be broken or unfit, with the message that the person meets."""

import json
import os
import re

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from testing.checkpoints import build, edit_json, edit_shard, tiny_config, tiny_tensors, write_checkpoint

from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.convert.plan import build_plan
from indexcache.conversion.io.checkpoint import read_checkpoint, read_header
from indexcache.conversion.io.sources import ConversionError, FolderSource
from indexcache.conversion.io.strict_json import parse_json

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00003.safetensors"


def refused(folder, pattern="FSFS"):
    """The message with which a checkpoint is refused."""
    with pytest.raises(ConversionError) as caught:
        build_plan(read_checkpoint(FolderSource(folder)), pattern and SharePattern.parse(pattern))
    return str(caught.value)


def rebuilt(folder, change, fp8=False, **fields):
    """A checkpoint whose tensors were changed before it was saved, so that headers and index agree."""
    config = tiny_config(fp8=fp8, **fields)
    tensors = tiny_tensors(config, fp8=fp8)
    change(tensors)
    return write_checkpoint(folder, config, tensors)


# ---- tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "model.embed_tokens.weight", "lm_head.weight", "model.layers.2.self_attn.kv_b_proj.weight",
    "model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias",
    "model.layers.2.self_attn.indexer.k_norm.bias", "model.layers.1.self_attn.indexer.wk.weight",
])  # fmt: skip
def test_missing_tensor(tmp_path, name):
    message = refused(rebuilt(tmp_path / "s", lambda tensors: tensors.pop(name)))
    assert f"{name} is missing" in message and "fetch it again" in message


def test_missing_biases(tmp_path):
    message = refused(rebuilt(tmp_path / "s", lambda tensors: None, attention_bias=True))
    assert "model.layers.0.self_attn.q_a_proj.bias is missing" in message


@pytest.mark.parametrize("name", [
    "model.layers.1.mlp.experts.4.up_proj.weight", "model.layers.0.self_attn.indexer.extra", "visual.proj.weight",
    "model.layers.1.mlp.experts.gate_up_proj", "model.layers.01.input_layernorm.weight", "model.norm.bias",
])  # fmt: skip
def test_unknown_tensor(tmp_path, name):
    message = refused(rebuilt(tmp_path / "s", lambda tensors: tensors.update({name: torch.zeros(2, 3)})))
    assert f"{name} (F32 [2, 3] in model-00003-of-00003.safetensors) is not known to this family" in message


def test_wrong_shape(tmp_path):
    name = "model.layers.3.self_attn.indexer.wq_b.weight"
    message = refused(rebuilt(tmp_path / "s", lambda tensors: tensors.update({name: torch.zeros(64, 32)})))
    assert re.search(rf"{name} in model-.* has shape \[64, 32\], and the config asks for \[128, 32\]", message)


def test_wrong_dtype(tmp_path):
    name = "model.layers.3.self_attn.o_proj.weight"
    message = refused(rebuilt(tmp_path / "s", lambda t: t.update({name: t[name].to(torch.int8)})))
    assert re.search(rf"{name} in model-.* has dtype I8, and BF16 or F16 or F32 or F8_E4M3 is accepted here", message)
    norm = "model.layers.3.input_layernorm.weight"
    message = refused(rebuilt(tmp_path / "n", lambda t: t.update({norm: t[norm].to(torch.float8_e4m3fn)}), fp8=True))
    assert re.search(rf"{norm} in model-.* has dtype F8_E4M3, and BF16 or F16 or F32 is accepted here", message)


def test_many_problems_are_listed_up_to_a_dozen(tmp_path):
    def halve(tensors):
        for name in [name for name in tensors if "experts" in name]:
            del tensors[name]

    message = refused(rebuilt(tmp_path / "s", halve))
    assert message.count("is missing") == 12 and "and 33 more" in message and "(45 tensors)" in message


def test_layer_beyond_the_config_that_is_no_mtp_layer(tmp_path):
    folder = build(tmp_path / "s")
    edit_json(folder / "config.json", num_hidden_layers=3)
    assert "layer 3 is beyond num_hidden_layers=3 and no MTP layer" in refused(folder, "FSF")


# ---- fp8 ------------------------------------------------------------------------------------------------------------

WEIGHT = "model.layers.1.mlp.experts.0.up_proj.weight"


def test_fp8_without_scales(tmp_path):
    message = refused(rebuilt(tmp_path / "s", lambda t: t.pop(f"{WEIGHT}_scale_inv"), fp8=True))
    assert f"{WEIGHT} in model-0" in message and f"without its scales: {WEIGHT}_scale_inv is missing" in message


def test_scales_without_fp8(tmp_path):
    message = refused(rebuilt(tmp_path / "s", lambda t: t.update({WEIGHT: t[WEIGHT].bfloat16()}), fp8=True))
    assert f"{WEIGHT}_scale_inv" in message and f"{WEIGHT} is BF16" in message
    message = refused(rebuilt(tmp_path / "m", lambda t: t.pop(WEIGHT), fp8=True))
    assert f"{WEIGHT} is missing" in message


def test_scales_of_the_wrong_shape(tmp_path):
    name = f"{WEIGHT}_scale_inv"
    message = refused(rebuilt(tmp_path / "s", lambda t: t.update({name: torch.ones(1, 3)}), fp8=True))
    assert re.search(
        rf"{name} .* has shape \[1, 3\].* of shape \[24, 48\] in blocks of 16 x 16 needs \[2, 3\]", message
    )


def test_fp8_that_the_config_does_not_declare(tmp_path):
    folder = build(tmp_path / "s", fp8=True)
    edit_json(folder / "config.json", quantization_config=None)
    assert "config.json has no quantization_config: add the one it was published with" in refused(folder)


@pytest.mark.parametrize("quantisation, message", [
    ({"quant_method": "awq"}, "quant_method 'awq': only block-scaled fp8"),
    ("int4", "quant_method 'int4'"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\]: it must be two numbers"),
    ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size None: it must be two numbers"),
])  # fmt: skip
def test_other_quantisation(tmp_path, quantisation, message):
    folder = build(tmp_path / "s", quantization_config=quantisation)
    assert re.search(message, refused(folder))


# ---- shards and index -----------------------------------------------------------------------------------------------


def test_truncated_shard(tmp_path):
    folder = build(tmp_path / "s")
    size = (folder / SHARD).stat().st_size
    os.truncate(folder / SHARD, size - 5)
    assert f"{SHARD} is truncated: {size} bytes were due and the file has {size - 5}" in refused(folder)
    os.truncate(folder / SHARD, 100)
    assert f"{SHARD} is truncated: its header alone needs" in refused(folder)
    os.truncate(folder / SHARD, 3)
    assert f"{SHARD} is no safetensors file" in refused(folder)


def test_shard_with_bytes_to_spare(tmp_path):
    folder = build(tmp_path / "s")
    with open(folder / SHARD, "ab") as stream:
        stream.write(b"xx")
    assert f"{SHARD} is longer than its header says" in refused(folder)


@pytest.mark.parametrize("header, reason", [
    (b"{]", "Expecting"),
    (b"[]", "damaged"),
    (b'{"a": 3}', "a is no JSON object"),
    (b'{"a": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 1]}}', "a has the unknown dtype 'Q7'"),
    (b'{"a": {"dtype": {}, "shape": [1], "data_offsets": [0, 1]}}', "a has the unknown dtype {}"),
    (b'{"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}', r"a has shape \[-1\]"),
    (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]}}', r"a has data_offsets \[1, 0\]"),
    (b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}}', "a has 1 bytes, which U8"),
    (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}', "a begins at byte"),
    (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
     b' "b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', "b begins at byte"),
    (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
     b' "a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}', "'a' is there twice"),
])  # fmt: skip
def test_damaged_header(tmp_path, header, reason):
    folder = build(tmp_path / "s")
    (folder / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    message = refused(folder)
    assert re.search(reason, message) and SHARD in message and "damaged safetensors header" in message


def test_absurd_header_length(tmp_path):
    folder = build(tmp_path / "s")
    (folder / SHARD).write_bytes(b"\xff" * 4096)
    assert f"{SHARD} is no safetensors file" in refused(folder)


def test_index_names_an_absent_shard(tmp_path):
    folder = build(tmp_path / "s")
    (folder / SHARD).unlink()
    message = refused(folder)
    assert "names shards that are not there" in message and SHARD in message


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "a\\x.safetensors"]
)
def test_index_names_a_file_outside(tmp_path, file):
    folder = build(tmp_path / "s")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (folder / INDEX).write_text(json.dumps(index))
    assert re.search(r"\(tensor model.norm.weight\).*(points outside the checkpoint|is no file name)", refused(folder))


@pytest.mark.parametrize("file", ["sub/x.safetensors", "pytorch_model.bin", 7, None])
def test_index_names_no_shard(tmp_path, file):
    folder = build(tmp_path / "s")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (folder / INDEX).write_text(json.dumps(index))
    assert "model.norm.weight" in refused(folder)


def test_shard_that_is_a_link_out_of_the_folder(tmp_path):
    folder = build(tmp_path / "s")
    (folder / SHARD).rename(tmp_path / "elsewhere.safetensors")
    (folder / SHARD).symlink_to(tmp_path / "elsewhere.safetensors")
    assert f"{SHARD} is a link to" in refused(folder)


def test_links_of_the_hub_s_cache_are_followed(tmp_path):
    plain = build(tmp_path / "plain")
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(path for path in plain.iterdir() if path.is_file()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    source = FolderSource(snapshot)
    assert build_plan(read_checkpoint(source), SharePattern("FSFS")).dropped
    assert (source.id, source.revision) == ("org/name", commit)


def test_index_and_shards_disagree(tmp_path):
    folder = build(tmp_path / "s")
    index = json.loads((folder / INDEX).read_text())
    gone, added = "model.norm.weight", "model.ghost.weight"
    del index["weight_map"][gone]
    index["weight_map"][added] = SHARD
    (folder / INDEX).write_text(json.dumps(index))
    message = refused(folder)
    assert f"{added} is said to be in {SHARD}, which does not hold it" in message
    assert f"holds {gone}, which the index does not name" in message


def test_tensor_in_two_shards(tmp_path):
    folder = build(tmp_path / "s")
    edit_shard(folder / SHARD, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(48)}))
    assert f"model.norm.weight is in two shards, {SHARD} and model-00003-of-00003.safetensors" in refused(folder)


def test_index_that_is_no_index(tmp_path):
    folder = build(tmp_path / "s")
    (folder / INDEX).write_text("{")
    assert f"{INDEX} is not valid JSON" in refused(folder)
    (folder / INDEX).write_text("[]")
    assert f"{INDEX} holds a list where a JSON object belongs" in refused(folder)
    (folder / INDEX).write_text('{"weight_map": {}}')
    assert f"{INDEX} has no weight_map" in refused(folder)
    (folder / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert "'a' is there twice" in refused(folder)


def test_no_weights_or_too_many(tmp_path):
    folder = build(tmp_path / "s")
    (folder / "model.safetensors").write_bytes((folder / SHARD).read_bytes())
    assert "holds both model.safetensors and model.safetensors.index.json" in refused(folder)
    (folder / "model.safetensors").unlink()
    (folder / INDEX).unlink()
    assert "holds 3 .safetensors files" in refused(folder) and "fetch the index" in refused(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert "holds neither" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights: save the checkpoint as safetensors first" in refused(folder)


# ---- config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type, reason", [
    ("llama", "it is not known"),
    ("glm4_moe_lite", "it has no lightning indexers to share: .* distilled into it first"),
    ("deepseek_v4", "another method"),
    ("hy_v4", "attention that IndexCacheForCausalLM does not have"),
    (None, "it is not known"),
])  # fmt: skip
def test_unknown_family(tmp_path, model_type, reason):
    folder = build(tmp_path / "s")
    edit_json(folder / "config.json", model_type=model_type)
    message = refused(folder)
    assert re.search(reason, message) and "(accepted: deepseek_v32, glm_moe_dsa, axk2, indexcache)" in message


def test_a_dense_checkpoint_under_a_dsa_name(tmp_path):
    folder = build(tmp_path / "s", lacking=range(4))
    assert "holds no indexer weights at all: it is no DSA checkpoint" in refused(folder)


def test_unreadable_config(tmp_path):
    folder = build(tmp_path / "s")
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refused(folder)
    (folder / "config.json").unlink()
    assert "config.json is missing" in refused(folder)


@pytest.mark.parametrize("fields, message", [
    ({"num_hidden_layers": "four"}, "num_hidden_layers='four'"),
    ({"hidden_size": "wide"}, "hidden_size"),
    ({"index_head_dim": 4}, r"index_head_dim \(4\) must be at least qk_rope_head_dim \(8\)"),
    ({"q_lora_rank": None}, "q_lora_rank"),
    ({"n_group": 3}, r"n_group \(3\) must divide"),
    ({"rope_theta": [0] * 20_000}, r"config\.json cannot be used: rope_theta=\[0, 0.{,300}\.\.\. is no number"),
    ({"rope_theta": None}, "rope_theta=None is no number"),
    ({"rope_theta": True}, "rope_theta=True is no number"),
    ({"rope_theta": "10000"}, "rope_theta='10000' is no number"),
    ({"rope_theta": -1}, "give angles that are not finite"),
    ({"rope_theta": 0}, "give angles that are not finite"),
    ({"rope_scaling": {"type": "of my own", "factor": 2.0}}, "rope_parameters=.*of my own.* cannot be used"),
    ({"rope_scaling": {"type": "yarn", "factor": "x"}}, "rope_parameters=.*'factor': 'x'.* cannot be used"),
    ({"hidden_act": "no"}, "hidden_act='no' is no activation"),
    ({"torch_dtype": True}, "dtype=True is no type of floats"),
    ({"dtype": "int8"}, "dtype=torch.int8 is no type of floats"),
])  # fmt: skip
def test_config_that_does_not_validate(tmp_path, fields, message):
    folder = build(tmp_path / "s")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    assert re.search(message, refused(folder))


def test_index_topk_null_is_dense(tmp_path):
    folder = build(tmp_path / "s")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "index_topk": None}))
    assert "index_topk=null" in refused(folder)


def test_pattern_for_another_depth(tmp_path):
    assert "has 3 characters for num_hidden_layers=4" in refused(build(tmp_path / "s"), "FSS")


def test_a_checkpoint_that_transformers_saved_is_accepted(tmp_path):
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

    fields = {k: v for k, v in tiny_config().items() if k not in ("architectures", "model_type", "auto_map")}
    config = GlmMoeDsaConfig(**{**fields, "indexer_types": ["full", "shared", "full", "full"]})
    GlmMoeDsaForCausalLM(config).save_pretrained(tmp_path / "s")
    plan = build_plan(read_checkpoint(FolderSource(tmp_path / "s")), SharePattern("FSFS"))
    assert len(plan.dropped) == 5 and plan.config["indexer_rope_interleave"] is True


def test_save_file_is_what_these_tests_take_it_for(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert list(FolderSource(tmp_path).list_files()) == ["a.safetensors"]


# ---- JSON of unknown origin -----------------------------------------------------------------------------------------


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("text, reason", [
    (b'\xef\xbb\xbf{"a": 1}', "byte-order mark"),
    ('{"a": 1}'.encode("utf-16"), "codec can't decode"),
    (b'{"a": "\\ud800"}', r"half a surrogate pair \('\\ud800'\)"),
    (b'{"\\udfff": 1}', "half a surrogate pair"),
    (b'{"a": "\xed\xa0\x80"}', "codec can't decode"),
    (f'{{"a": {nested(70)}}}'.encode(), "nested deeper than 64 levels"),
    (f'{{"a": {nested(100_000)}}}'.encode(), "nested too deeply"),
    (b'{"a": NaN}', "NaN is no JSON number"),
    (b'{"a": 1, "b": 2, "a": 3}', "'a' is there twice"),
    (b'{"a": ' + b"9" * 5000 + b"}", "integer string conversion"),
])  # fmt: skip
@pytest.mark.parametrize("file", ["config.json", INDEX, "generation_config.json", "tokenizer_config.json"])
def test_json_that_others_would_trip_over(tmp_path, file, text, reason):
    folder = build(tmp_path / "s")
    (folder / file).write_bytes(text)
    message = refused(folder)
    assert f"{file} is not valid JSON" in message and re.search(reason, message)


def test_whole_surrogate_pairs_and_other_escapes_are_text():
    assert parse_json(b'{"\\ud83d\\ude00": "\\u00e9"}') == {"\U0001f600": "\u00e9"}


def test_a_key_that_is_there_twice_is_found_at_once_in_a_large_index():
    pairs = "".join(f'"model.layers.{i}.mlp.experts.weight": "a", ' for i in range(90_000))
    with pytest.raises(ValueError, match=r"'model\.layers\.89999\.mlp\.experts\.weight' is there twice"):
        parse_json(f'{{{pairs}"model.layers.89999.mlp.experts.weight": "a"}}'.encode())


_ENTRY = b'"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}'


@pytest.mark.parametrize("header", [
    b"{" + _ENTRY + b"}",
    b" {" + _ENTRY + b"} ",
    b'{"__metadata__": null, ' + _ENTRY + b"}",
    b'{"__metadata__": {"format": "pt"}, ' + _ENTRY + b"}",
    b"\xef\xbb\xbf{" + _ENTRY + b"}",
    b'{"__metadata__": [1], ' + _ENTRY + b"}",
    b'{"__metadata__": "pt", ' + _ENTRY + b"}",
    b'{"__metadata__": {"a": 1}, ' + _ENTRY + b"}",
    b'{"__metadata__": {"a": "\\ud800"}, ' + _ENTRY + b"}",
    b"{" + _ENTRY.replace(b'"a"', b'"a\\ud800"') + b"}",
    b"{" + _ENTRY + b"}\0",
    b"{" + _ENTRY.replace(b"[2]", b"[2.0]") + b"}",
    b"{" + _ENTRY.replace(b"]}", b'], "x": NaN}') + b"}",
    b"{" + _ENTRY.replace(b"]}", b'], "dtype": "U8"}') + b"}",
    b"{" + _ENTRY.replace(b'"U8", "shape": [2]', b'"F6_E2M3", "shape": [2]') + b"}",
    b'{"z": {"dtype": "U8", "shape": [9223372036854775808, 4, 0], "data_offsets": [0, 0]}, ' + _ENTRY + b"}",
    b'{"z": {"dtype": "U8", "shape": [18446744073709551616, 0], "data_offsets": [0, 0]}, ' + _ENTRY + b"}",
    b'{"z": {"dtype": "F64", "shape": [2305843009213693952, 0], "data_offsets": [0, 0]}, ' + _ENTRY + b"}",
])  # fmt: skip
def test_a_header_is_accepted_only_if_the_safetensors_library_accepts_it(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    try:
        with safe_open(path, "pt") as shard:
            theirs = sorted(shard.keys())
    except SafetensorError:
        theirs = None
    try:
        ours = sorted(read_header(FolderSource(tmp_path), "a.safetensors").tensors)
    except ConversionError as error:
        assert "has a damaged safetensors header" in str(error)
        ours = None
    assert ours == theirs


# ---- what would be computed as another model ------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"scoring_func": "softmax"}, {"topk_method": "greedy"}, {"topk_method": 7}])
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_another_router_is_not_taken_for_sigmoid_with_bias(tmp_path, family, fields):
    message = refused(build(tmp_path / "s", family=family, **fields))
    (name, value), = fields.items()  # fmt: skip
    assert f"config.json has {name}={value!r}, and IndexCacheForCausalLM routes by" in message


def test_the_known_router_may_be_spelled_out_or_not(tmp_path):
    fields = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    for name, given in (("s", fields), ("t", dict.fromkeys(fields))):
        plan = build_plan(read_checkpoint(FolderSource(build(tmp_path / name, **given))), SharePattern("FSFS"))
        assert {field: plan.config[field] for field in fields} == given


@pytest.mark.parametrize("fields", [
    {"model_type": ["deepseek_v32"]}, {"moe_layer_freq": 0}, {"dtype": ["sparse"] * 4}, {"rope_scaling": "yarn"},
    {"eos_token_id": {}}, {"mlp_layer_types": 3}, {"n_routed_experts": "many"}, {"index_topk_pattern": {"F": 1}},
])  # fmt: skip
def test_config_fields_of_a_wrong_kind_are_a_message(tmp_path, fields):
    folder = build(tmp_path / "s")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    refused(folder, None)
