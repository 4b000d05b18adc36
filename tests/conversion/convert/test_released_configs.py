"""Every released DSA config converts without a changed field, and verifies; what is then changed by hand does not."""

import json

import pytest
from testing.checkpoints import edit_json, edit_shard, tiny_tensors, write_checkpoint
from testing.released_configs import GLM_SHARED_PATTERN, RELEASED, shrunk

from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.check.verify import verify
from indexcache.conversion.convert.convert import ConvertOptions, convert
from indexcache.conversion.io.sources import FolderSource

REPLACED = {"model_type", "architectures", "index_topk_freq", "index_skip_topk_offset", "index_topk_pattern",
            "indexer_types"}  # fmt: skip


def released(folder, name):
    """A checkpoint with the released config; shared layers have no indexers, as GLM-5.2's have none."""
    config = shrunk(name)
    pattern = GLM_SHARED_PATTERN if "indexer_types" in config else "F" * 8
    lacking = [layer for layer, letter in enumerate(pattern) if letter == "S"]
    tensors = tiny_tensors(config, fp8="quantization_config" in config, mtp=1, lacking=lacking)
    return write_checkpoint(folder, config, tensors)


def sparser(name):
    return "FFSSSSFS" if "index_topk_freq" in RELEASED[name] else "FSFSFFSS"


@pytest.fixture(params=RELEASED)
def converted(request, tmp_path):
    """A released checkpoint's name, source and conversion."""
    source = released(tmp_path / "s", request.param)
    options = ConvertOptions(SharePattern(sparser(request.param)), copy=True)
    convert(FolderSource(source), tmp_path / "o", options)
    return request.param, source, tmp_path / "o"


def check(source, output, logits=False):
    return verify(FolderSource(source), FolderSource(output), compare_logits=logits)


def test_fields_pass_as_they_are_and_the_logits_are_those_of_transformers(converted):
    name, source, output = converted
    written = json.loads((output / "config.json").read_text())
    for field, value in json.loads((source / "config.json").read_text()).items():
        if field not in REPLACED:
            assert written[field] == value, field
    found = check(source, output, logits=True)
    assert found.ok and found.verdict == "verified", found.differences + found.warnings
    native = "DeepseekV32ForCausalLM" if "DeepSeek" in name else "GlmMoeDsaForCausalLM"
    assert found.logits["reference"] == native and "reference_note" not in found.logits
    assert found.logits["index_topk_lowered_from"] == 2048 and found.logits["tokens"] > found.logits["index_topk"]
    assert any("lowered from 2048" in warning for warning in found.warnings)


def test_one_changed_indexer_weight_fails(converted):
    name, source, output = converted
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    weight = f"model.layers.{SharePattern(sparser(name)).full_layers[-1]}.self_attn.indexer.wk.weight"

    def change(tensors):
        tensors[weight].view(-1)[5] = 1.0 if float(tensors[weight].view(-1)[5]) != 1.0 else 2.0

    edit_shard(output / index[weight], change)
    assert [difference.split()[0] for difference in check(source, output).differences] == [weight]


@pytest.mark.parametrize("name", RELEASED)
def test_a_swapped_letter_fails(tmp_path, name):
    """With all indexers kept, so that no missing weight gives it away."""
    source, output, letters = released(tmp_path / "s", name), tmp_path / "o", sparser(name)
    convert(FolderSource(source), output, ConvertOptions(SharePattern(letters), keep_shared_indexers=True))
    swapped = SharePattern(letters[0] + letters[2] + letters[1] + letters[3:])
    edit_json(output / "config.json", index_share_pattern=swapped.letters, indexer_types=swapped.indexer_types)
    assert check(source, output).differences == [
        f"the pattern is {letters} in the recipe of the conversion and {swapped} in config.json"
    ]


def test_a_changed_rope_value_fails(converted):
    name, source, output = converted
    config = json.loads((output / "config.json").read_text())
    field, inner = ("rope_scaling", "factor") if "DeepSeek" in name else ("rope_parameters", "rope_theta")
    edit_json(output / "config.json", **{field: {**config[field], inner: 20}})
    assert check(source, output).differences == [
        f"config.json: rope_parameters.{inner} is {config[field][inner]} in the source and 20 now"
    ]
