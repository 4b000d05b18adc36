"""Every verb opens a checkpoint in one way: what is not whole is refused, with one message."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from indexcache import IndexCacheForCausalLM
from indexcache.cli import app
from indexcache.conversion.io.load_source import load_source, refuse_filled_weights
from indexcache.conversion.io.open_checkpoint import open_checkpoint
from indexcache.conversion.io.sources import ConversionError
from indexcache.distillation.source import load_with_new_indexers
from indexcache.runs.errors import RunError
from indexcache.runs.loading import Placement

DEMO = Path(__file__).parents[2] / "demo" / "dsa_demo"
WEIGHT = "model.layers.5.mlp.experts.0.down_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path):
    return Path(shutil.copytree(DEMO, tmp_path / "source"))


def without_a_weight(source):
    """A shard lacks a weight, and the index, made again, does not name it."""
    index = json.loads((source / INDEX).read_text())
    shard = source / index["weight_map"].pop(WEIGHT)
    tensors = load_file(shard)
    del tensors[WEIGHT]
    save_file(tensors, shard, metadata={"format": "pt"})
    (source / INDEX).write_text(json.dumps(index))


def stale_index(source):
    index = json.loads((source / INDEX).read_text())
    index["weight_map"].pop(WEIGHT)
    (source / INDEX).write_text(json.dumps(index))


def truncated(source):
    shard = source / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)


def adapter(source):
    (source / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')


FAULTS = {
    without_a_weight: f"{WEIGHT} is missing",
    stale_index: f"holds {WEIGHT}, which the index does not name",
    truncated: "is truncated",
    adapter: "holds an adapter (adapter_config.json) beside its weights",
}


def verbs(source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(Path(json.decoder.__file__).read_text())
    given = ["--data", text, "--seqlen", 80]
    return {
        "convert": [source, tmp_path / "converted", "--keep", "1/3"],
        "inspect": [source],
        "eval": [source, *given, "--nsamples", 1, "--output", tmp_path / "eval"],
        "search": [source, *given, "--nsamples", 2, "--output", tmp_path / "search"],
        "distill": [source, tmp_path / "distilled", *given, "--keep", "1/3", "--dense-steps", 1, "--sparse-steps", 1],
        "generate": [source, "import", "--max-new-tokens", 1],
        "bench": [source, "--length", 32, "--device", "cpu", "--output", tmp_path / "bench"],
    }


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_all_verbs_refuse_it_alike(source, tmp_path, spoil):
    spoil(source)
    said = {}
    for verb, arguments in verbs(source, tmp_path).items():
        finished = CliRunner().invoke(app, [verb, *map(str, arguments)])
        assert finished.exit_code == 1, (verb, finished.output, finished.exception)
        said[verb] = " ".join(finished.stderr.split())
    assert FAULTS[spoil] in said["convert"]
    assert set(said.values()) == {said["convert"]}, said
    assert {path.name for path in tmp_path.iterdir()} == {"source", "text.txt"}, "nothing was written"


def test_what_transformers_would_fill_in_is_refused_behind_it_too(source):
    """Should the headers ever be right and the loader still not find a weight."""
    opened = open_checkpoint(source)
    without_a_weight(source)
    with pytest.raises(ConversionError, match=r"lacks weights .*random numbers.*\s.*layers\.5\.mlp\.experts"):
        load_source(opened)


def test_what_transformers_stumbles_over_is_a_message(source):
    index = json.loads((source / INDEX).read_text())
    (source / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))
    with pytest.raises(ConversionError, match=r"cannot be loaded(.|\n)*generation_config\.json"):
        load_source(source)


@pytest.mark.parametrize("text", ["null", '{"eos_token_id": ' + "[" * 100_000 + "]" * 100_000 + "}", "{"])
def test_generation_settings_that_are_none_are_refused_before_the_weights(source, text):
    (source / "generation_config.json").write_text(text)
    with pytest.raises(ConversionError, match=r"generation_config\.json (is not valid JSON|holds a NoneType)"):
        load_source(source)


@pytest.mark.parametrize("value", [3e38, float("nan")])
def test_damage_that_only_numbers_show_is_no_result(source, tmp_path, value):
    """A whole file, of which some bits were flipped: no perplexity is made of its loss, and no search."""
    shard = next(path for path in sorted(source.glob("*.safetensors")))
    tensors = load_file(shard)
    name = next(name for name in tensors if "kv_b_proj" in name)
    tensors[name][:8] = value
    save_file(tensors, shard, {"format": "pt"})
    for verb in ("eval", "search"):
        finished = CliRunner().invoke(app, [verb, *map(str, verbs(source, tmp_path)[verb])])
        assert finished.exit_code == 1 and isinstance(finished.exception, SystemExit), (verb, finished.exception)
        said = " ".join(finished.stderr.split())
        assert "source" in said and ("no loss of a sound model" in said or "finite" in said), said
        assert not list(tmp_path.rglob("evaluation.json")) and not list(tmp_path.rglob("patterns.json"))


def test_what_this_machine_cannot_load_is_a_message(tmp_path):
    from testing.checkpoints import build

    other = build(tmp_path / "other", fp8=True)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"other cannot be loaded: "):
        load_source(other)
    assert load_source(build(tmp_path / "ragged", fp8=True)).config.num_hidden_layers == 4
    whole = build(tmp_path / "whole", fp8=True, mtp=1, qk_rope_head_dim=16, moe_intermediate_size=32)
    assert load_source(whole).config.num_hidden_layers == 4, "scales and MTP layers are no missing weights"


def test_a_tied_weight_is_another_s(tmp_path):
    from testing.tiny_models import tiny_model

    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    model = load_source(tmp_path / "tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    refuse_filled_weights(model, {"lm_head.weight"}, "here")
    with pytest.raises(ConversionError, match=r"here lacks weights .*\s.*model\.norm\.weight"):
        refuse_filled_weights(model, {"lm_head.weight", "model.norm.weight"}, "here")


def test_a_training_checkpoint_that_is_not_whole_is_not_gone_on_with(tmp_path):
    from testing.tiny_models import tiny_model

    tiny_model().save_pretrained(tmp_path / "checkpoint-2")
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = load_file(path)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"lacks weights .*\s.*model\.norm\.weight"):
        load_with_new_indexers(tmp_path / "checkpoint-2", dtype=torch.float32)
    save_file({**tensors, "model.norm.weight": norm}, path, metadata={"format": "pt"})
    assert load_with_new_indexers(tmp_path / "checkpoint-2", dtype=torch.float32)[1] == []
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(RunError, match="cannot be read"):
        load_with_new_indexers(tmp_path / "checkpoint-2", dtype=torch.float32)


def test_generate_runs_a_checkpoint_of_its_source_family_as_ours(source):
    finished = CliRunner().invoke(app, ["generate", str(source), "import", "--max-new-tokens", "3", "--device", "cpu"])
    assert finished.exit_code == 0 and finished.stdout.startswith("import"), finished.output
    for pattern, code, message in (("FSX", 2, "--pattern"), ("FSS", 1, "num_hidden_layers=12")):
        finished = CliRunner().invoke(app, ["generate", str(source), "import", "--pattern", pattern])
        assert finished.exit_code == code and message in finished.stderr, finished.output
    (source / "tokenizer.json").write_text("{")
    finished = CliRunner().invoke(app, ["generate", str(source), "import"])
    assert finished.exit_code == 1 and f"the tokenizer of {source} cannot be loaded" in finished.stderr
    assert isinstance(load_source(source), IndexCacheForCausalLM)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "gpu"}, "--device 'gpu' is no device"),
        ({"device": "cuda:99"}, "torch sees"),
        ({"device": "meta"}, "--device meta holds no values"),
        ({"device_map": "some"}, "--device-map 'some' is no device"),
    ],
)
def test_devices_that_are_none_are_refused_at_once(given, message):
    with pytest.raises(RunError, match=message):
        Placement(**given)
