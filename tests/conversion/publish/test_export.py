"""Exports hold the same weights and a config that the engine reads as the same schedule."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.tiny_models import GATES, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AXK2ForCausalLM,
    DeepseekV32ForCausalLM,
    GlmMoeDsaForCausalLM,
)

from indexcache import IndexCacheForCausalLM, SharePattern
from indexcache.conversion.io.sources import ConversionError
from indexcache.conversion.publish.export import ENGINES, export, export_pattern

# So many indexer heads that no two keys score exactly zero: which of them is selected would be a matter of taste.
GLM = {"source_model_type": "glm_moe_dsa", "indexer_rope_interleave": True, "index_n_heads": 32}
DEEPSEEK = {"source_model_type": "deepseek_v32", "index_n_heads": 32}
SERVING = ("vllm", "sglang", "trtllm")


@pytest.fixture
def checkpoint(tmp_path):
    """Saves a tiny IndexCache model with the given pattern and switches."""

    def save(pattern, shard_size="50GB", **changes):
        folder = tmp_path / "checkpoint"
        model = tiny_model(num_hidden_layers=len(pattern), index_share_pattern=pattern, **changes)
        model.save_pretrained(folder, max_shard_size=shard_size)
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "README.md").write_text("---\nlicense: mit\nbase_model: lab/base\ntags: [dsa, custom_code]\n---\n")
        return folder

    return save


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(60)[None] % 97).logits


@pytest.mark.parametrize("pattern", ["FFFF", "FSFS", "FFSSS"])
def test_transformers_runs_the_glm_export_with_equal_logits(checkpoint, tmp_path, pattern):
    source = checkpoint(pattern, **GLM)
    out = export(source, tmp_path / "out", "transformers")
    assert config_of(out)["indexer_types"] == SharePattern(pattern).indexer_types
    native, loading = GlmMoeDsaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert torch.allclose(logits(native), logits(IndexCacheForCausalLM.from_pretrained(source)), atol=1e-4)


def test_transformers_runs_the_all_full_deepseek_export(checkpoint, tmp_path):
    source = checkpoint("FFFF", **DEEPSEEK)
    native = DeepseekV32ForCausalLM.from_pretrained(export(source, tmp_path / "out", "transformers"))
    assert torch.allclose(logits(native), logits(IndexCacheForCausalLM.from_pretrained(source)), atol=1e-4)


def test_transformers_cannot_share_in_deepseek(checkpoint, tmp_path):
    with pytest.raises(ConversionError, match="deepseek_v32 runs an indexer in every layer and cannot share"):
        export(checkpoint("FFSS", **DEEPSEEK), tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", SERVING)
@pytest.mark.parametrize(
    ("family", "architecture"), [(GLM, "GlmMoeDsaForCausalLM"), (DEEPSEEK, "DeepseekV32ForCausalLM")]
)
def test_serving_engines_get_the_whole_list_under_the_source_architecture(
    checkpoint, tmp_path, engine, family, architecture
):
    config = config_of(export(checkpoint("FSSF", **family), tmp_path / "out", engine))
    assert config["model_type"] == family["source_model_type"]
    assert config["architectures"] == [architecture]
    assert config["index_topk_pattern"] == "FSSF"
    assert config["indexer_types"] == ["full", "shared", "shared", "full"]
    assert config["use_index_cache"] is True
    assert config["indexer_rope_interleave"] is (family is GLM)
    ours = {"auto_map", "index_share_pattern", "source_model_type", "layer_types", "index_topk_freq", "indexer_fp8"}
    assert not ours & config.keys()


@pytest.mark.parametrize("family", [GLM, DEEPSEEK])
def test_the_config_holds_what_transformers_would_write(checkpoint, tmp_path, family):
    """Neither class labels and the like, which every config has by default, nor switches that only ours has."""
    exported = config_of(export(checkpoint("FFFF", **family), tmp_path / "out", "transformers"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
    assert (
        not exported.keys()
        - config_of(tmp_path / "saved").keys()
        - {
            "indexer_rope_interleave",
            "rope_interleave",
            "moe_layer_freq",
        }
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_every_setting_survives_for_the_family(checkpoint, tmp_path, engine):
    """A saved IndexCache config leaves its own defaults out; GLM's defaults are others, so they must be spelled."""
    source = checkpoint("FFFF", **GLM, routed_scaling_factor=2.5, max_position_embeddings=163840, rms_norm_eps=1e-6)
    ours = AutoConfig.from_pretrained(source)
    native = AutoConfig.from_pretrained(export(source, tmp_path / "out", engine))
    assert native.model_type == "glm_moe_dsa"
    for name in native.to_dict().keys() & ours.to_dict().keys() - {"model_type", "architectures", "_name_or_path"}:
        assert getattr(native, name) == getattr(ours, name), name


def test_weights_are_the_same_files_and_companions_come_along(checkpoint, tmp_path):
    source = checkpoint("FSFS", shard_size="100KB", **GLM)
    out = export(source, tmp_path / "out", "vllm")
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(path.name for path in out.glob("*.safetensors")) == shards
    for name in shards:
        assert (out / name).read_bytes() == (source / name).read_bytes()
        assert os.stat(out / name).st_nlink > 1 or os.stat(out / name).st_ino != os.stat(source / name).st_ino
    assert (out / "tokenizer_config.json").exists()
    assert (out / "generation_config.json").exists()
    assert not list(out.glob("*.py")), "the engine brings its own code"
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "base_model: lab/base" in card
    assert "custom_code" not in card


@pytest.mark.parametrize(
    ("pattern", "freq", "offset"),
    [("FSSSFSSS", 4, 1), ("FFFSSSFSSSFS", 4, 3), ("FFFF", 1, 1), ("FSSS", 4, 1), ("FFSSS", 4, 2)],
)
def test_megatron_gets_the_schedule_that_its_formula_gives(checkpoint, tmp_path, pattern, freq, offset):
    source = checkpoint(pattern, **GLM)
    config = config_of(export(source, tmp_path / "out", "megatron"))
    assert (config["index_topk_freq"], config["index_skip_topk_offset"]) == (freq, offset)
    assert config["indexer_types"] == SharePattern(pattern).indexer_types
    assert not {"index_topk_pattern", "dsa_indexer_topk_freq"} & config.keys()
    full = [max(n - max(offset, 1), 0) % freq == 0 for n in range(1, len(pattern) + 1)]
    assert "".join("F" if is_full else "S" for is_full in full) == pattern


def test_megatron_refuses_what_it_cannot_spell(checkpoint, tmp_path):
    with pytest.raises(ConversionError, match=r"only a frequency and an offset .* FSSFSF is no such schedule"):
        export(checkpoint("FSSFSF", **GLM), tmp_path / "out", "megatron")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({**GLM, "mla_norm_eps": 1e-5}, "mla_norm_eps=1e-05 cannot be exported: glm_moe_dsa has 1e-06 built in"),
        ({**GLM, "indexer_rope_interleave": False}, "indexer_rope_interleave=False cannot be exported"),
        ({"source_model_type": "llama"}, "model_type 'llama' cannot be converted"),
    ],
)
def test_switches_that_no_engine_has_are_refused(checkpoint, tmp_path, changes, complaint):
    with pytest.raises(ConversionError, match=complaint):
        export(checkpoint("FSFS", **changes), tmp_path / "out", "vllm")


def test_bad_use_is_refused(checkpoint, tmp_path):
    source = checkpoint("FSFS", **GLM)
    with pytest.raises(ConversionError, match="choose one of vllm, sglang, trtllm, transformers, megatron"):
        export(source, tmp_path / "out", "ollama")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    with pytest.raises(ConversionError, match="exists and is not empty"):
        export(source, tmp_path / "taken", "vllm")
    with pytest.raises(ConversionError, match="is the source itself"):
        export(source, source, "vllm")
    out = export(source, tmp_path / "out", "vllm")
    with pytest.raises(ConversionError, match="is no IndexCache checkpoint: convert it first"):
        export(out, tmp_path / "again", "vllm")


@pytest.mark.parametrize("engine", SERVING)
@pytest.mark.parametrize("family", [GLM, DEEPSEEK])
def test_the_router_is_spelled_for_engines_that_default_to_softmax(checkpoint, tmp_path, engine, family):
    source = checkpoint("FSFS", **family)
    assert not {"scoring_func", "topk_method"} & config_of(source).keys()
    config = config_of(export(source, tmp_path / "out", engine))
    assert (config["scoring_func"], config["topk_method"]) == ("sigmoid", "noaux_tc")


def test_a_null_router_is_spelled_too(checkpoint, tmp_path):
    source = checkpoint("FSFS", **DEEPSEEK)
    set_config(source, scoring_func=None, topk_method=None)
    config = config_of(export(source, tmp_path / "out", "vllm"))
    assert (config["scoring_func"], config["topk_method"]) == ("sigmoid", "noaux_tc")


@pytest.mark.parametrize("field", [{"scoring_func": "softmax"}, {"topk_method": "greedy"}])
def test_another_router_than_ours_is_not_exported_as_ours(checkpoint, tmp_path, field):
    source = checkpoint("FSFS", **DEEPSEEK)
    set_config(source, **field)
    with pytest.raises(ConversionError, match=rf"config\.json has {next(iter(field))}="):
        export(source, tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()


def set_config(folder, **fields):
    (folder / "config.json").write_text(json.dumps(config_of(folder) | fields))


class Killed(BaseException):
    pass


def raise_killed():
    raise Killed


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("copy_companions", OSError(28, "No space left on device")),
        ("pass_whole", OSError(13, "Permission denied")),
        ("write_export_card", KeyboardInterrupt()),
        ("sync_folder", OSError(5, "Input/output error")),
    ],
)
def test_a_failed_export_leaves_nothing_and_can_be_repeated(checkpoint, tmp_path, monkeypatch, name, error, there):
    source, out = checkpoint("FSFS", **GLM), tmp_path / "out"
    if there:
        out.mkdir()

    def fails(*arguments, **options):
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(f"indexcache.conversion.publish.export.{name}", fails)
        with pytest.raises(type(error)):
            export(source, out, "vllm")
    assert out.exists() == there
    assert not there or not any(out.iterdir())
    whole = export(source, out, "vllm")
    assert {path.name for path in whole.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer_config.json"
    }  # fmt: skip


def test_a_full_disk_is_told_without_a_flag_that_export_lacks(checkpoint, tmp_path, monkeypatch):
    from indexcache.conversion.io import shard_writer

    def full(descriptor, block):
        raise OSError(28, "No space left on device")

    source = checkpoint("FSFS", **GLM)
    monkeypatch.setattr(shard_writer, "write_all", full)
    with pytest.raises(ConversionError, match="is full and nothing of the export is left: make room") as refusal:
        export(source, tmp_path / "out", "vllm")
    assert "--resume" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("after", [0, 2, 100])
def test_what_a_killed_export_left_is_undone_by_the_next(checkpoint, tmp_path, monkeypatch, after):
    """Killed for good, so that nothing could clean up: before, amid and after the files took their places."""
    from indexcache.conversion.publish import export as module

    source, out = checkpoint("FSFS", **GLM), tmp_path / "out"
    (source / "encoding").mkdir()
    (source / "encoding/encoding_dsv32.py").write_text("FORMAT = 1\n")
    real, done = os.replace, []

    def breaks(old, new):
        if ".indexcache_export" in str(old) and ".partial" not in str(old):
            if len(done) == after:
                raise Killed
            done.append(new)
        real(old, new)

    with monkeypatch.context() as killed:
        killed.setattr(module.os, "replace", breaks)
        killed.setattr(module, "_undo_killed_export", lambda output: None)
        if after == 100:
            killed.setattr(module.shutil, "rmtree", lambda path: raise_killed())
        with pytest.raises(Killed):
            export(source, out, "vllm")
    assert (out / "config.json").exists() == (after == 100)
    export(source, out, "sglang")
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {
        "config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer_config.json",
        "encoding/encoding_dsv32.py",
    }  # fmt: skip


def test_killed_while_the_list_is_written_an_export_is_repeated_whole(checkpoint, tmp_path, monkeypatch):
    from indexcache.conversion.publish import export as module

    source, out = checkpoint("FSFS", **GLM), tmp_path / "out"
    write = module.write_json

    def half(path, content):
        if isinstance(content, list):
            path.with_name(f"{path.name}.partial").write_text("[")
            raise_killed()
        write(path, content)

    with monkeypatch.context() as killed:
        killed.setattr(module, "_undo_killed_export", lambda output: None)
        killed.setattr(module, "write_json", half)
        with pytest.raises(Killed):
            export(source, out, "vllm")
    export(source, out, "sglang")
    assert not [path.name for path in out.iterdir() if path.name.startswith(".indexcache")]


@pytest.mark.parametrize("last", ["the folder", "the list"])
def test_killed_at_its_last_changes_an_export_is_repeated_whole(checkpoint, tmp_path, monkeypatch, last):
    from indexcache.conversion.publish import export as module

    source, out = checkpoint("FSFS", **GLM), tmp_path / "out"
    with monkeypatch.context() as killed:
        killed.setattr(module, "_undo_killed_export", lambda output: None)
        if last == "the list":
            real = module.Path.unlink
            killed.setattr(
                module.Path,
                "unlink",
                lambda path, **how: raise_killed() if path == out / ".indexcache_export.json" else real(path, **how),
            )
        else:
            killed.setattr(module.shutil, "rmtree", lambda folder: (remove_all(folder), raise_killed()))
        with pytest.raises(Killed):
            export(source, out, "vllm")
    assert (out / ".indexcache_export").exists() == (last == "the folder")
    export(source, out, "sglang")
    assert not [path.name for path in out.iterdir() if path.name.startswith(".indexcache")]


def remove_all(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else os.unlink(path)


def test_undoing_touches_no_file_of_others(checkpoint, tmp_path):
    source, out = checkpoint("FSFS", **GLM), tmp_path / "out"
    (out / ".indexcache_export").mkdir(parents=True)
    (out / ".indexcache_export.json").write_text('["config.json"]')
    (out / "config.json").write_text("{}")
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ConversionError, match="exists and is not empty"):
        export(source, out, "vllm")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_pipe_among_what_a_killed_export_left_is_not_opened(checkpoint, tmp_path):
    source, out = checkpoint("FSFS", **GLM), tmp_path / "out"
    (out / ".indexcache_export").mkdir(parents=True)
    os.mkfifo(out / ".indexcache_export.json")
    with pytest.raises(ConversionError, match=r"pipes or devices where files belong.*\n.*_export\.json"):
        export(source, out, "vllm")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.experts.3.gate_proj.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.indexer.wk.weight",
    ],
)
def test_a_checkpoint_that_lacks_a_weight_is_refused(checkpoint, tmp_path, name):
    source = checkpoint("FSFS", **GLM)
    weights = load_file(source / "model.safetensors")
    del weights[name]
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ConversionError, match=f"does not hold what its config.json describes.*\n.*{name} is missing"):
        export(source, tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_a_message(checkpoint, tmp_path):
    source = checkpoint("FSFS", **GLM)
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="Permission denied"):
        export(source, tmp_path / "out", "vllm")


@pytest.mark.parametrize(
    "content",
    [
        '{"patterns": {"2": NaN}}',
        '{"patterns": {}}',
        '{"patterns": ["FSFS"]}',
        '{"index_share_pattern": 7}',
        "[" * 100_000,
        "null",
    ],
)
def test_a_pattern_file_without_patterns_is_named(tmp_path, content):
    (tmp_path / "patterns.json").write_text(content)
    with pytest.raises(ConversionError, match=r"patterns\.json"):
        export_pattern(tmp_path / "patterns.json", tmp_path / "fields.json", "vllm")
    assert not (tmp_path / "fields.json").exists()


@pytest.mark.parametrize("family, engine", [("axk2", "vllm"), ("axk2", "megatron"), ("deepseek_v32", "megatron")])
def test_a_pattern_file_whose_family_an_engine_cannot_share_is_named(tmp_path, family, engine):
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps({"patterns": {"2": "FSFS"}, "source": {"model_type": family}}))
    with pytest.raises(ConversionError, match=rf"patterns\.json: .*{family}"):
        export_pattern(path, tmp_path / "out.json", engine)
    path.write_text(json.dumps({"patterns": {"2": "FSFS"}}))
    assert export_pattern(path, tmp_path / "out.json", engine)


def test_axk2_is_exported_for_transformers_alone_and_without_sharing(checkpoint, tmp_path):
    switches = {"source_model_type": "axk2", "index_n_heads": 32, **GATES}
    source = checkpoint("FFFF", **switches)
    native = AXK2ForCausalLM.from_pretrained(export(source, tmp_path / "out", "transformers"))
    assert torch.allclose(logits(native), logits(IndexCacheForCausalLM.from_pretrained(source)), atol=1e-4)
    with pytest.raises(ConversionError, match="serving engines read of axk2's config has not been checked"):
        export(source, tmp_path / "refused", "vllm")
    with pytest.raises(ConversionError, match="axk2 runs an indexer in every layer and cannot share"):
        export(checkpoint("FSFF", **switches), tmp_path / "refused", "transformers")
    assert not (tmp_path / "refused").exists()
