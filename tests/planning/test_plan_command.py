"""`indexcache plan`: what it prints, what fits, how it is run, and what it refuses."""

import json
import math

import pytest
import torch
from accelerate.utils import check_device_map
from testing.checkpoints import build, edit_json
from testing.released_configs import RELEASED, shrunk
from typer.testing import CliRunner

from indexcache.cli import app
from indexcache.configuration.configuration_indexcache import IndexCacheConfig
from indexcache.conversion.io.open_checkpoint import open_checkpoint
from indexcache.modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM
from indexcache.planning.known_gpus import GIB


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "160"})


def document_of(*arguments, code=0):
    done = run(*arguments, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def way(document, name, pattern=0):
    return next(entry for entry in document["patterns"][pattern]["placements"] if entry["way"] == name)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return build(tmp_path_factory.mktemp("plan") / "s", fp8=True, mtp=1, num_attention_heads=8,
                 n_routed_experts=8, moe_intermediate_size=64, intermediate_size=128)  # fmt: skip


def test_tables_of_memory_and_time_and_the_commands(source):
    done = run(source, "--gpus", 4, "--length", 500, "--batch", 2)
    assert done.exit_code == 0, done.output
    for part in (
        "block fp8, of it",
        "4 x NVIDIA H200 SXM, 131.3 GiB each",
        "2 x 500 tokens, static cache",
        "Memory with all F: 4 of 4 layers have indexers",
        "Memory with 1/4: 1 of 4 layers have indexers",
        "one GPU",
        "device_map x 4",
        "TP x 4",
        "EP x 4",
        "routed experts",
        "absorbed kv_b_proj",
        "index-key cache",
        "prefill workspace",
        "longest, batch 2",
        "most of 500 tokens",
        "note: products with fp8 weights have not been measured",
        "rates: benchmarks/results/kernels_h100.json",
        "torchrun --nproc-per-node 4 run.py",
        f"indexcache convert {source} ./s-indexcache --pattern FSSS",
    ):
        assert part in done.stdout, part
    assert "error" not in done.output


def test_json_is_all_of_it(source):
    document = document_of(source, "--gpus", 4, "--length", 500, "--batch", 2, "--cache", "dynamic")
    assert (document["gpus"], document["length"], document["batch"], document["cache"]) == (4, 500, 2, "dynamic")
    assert document["fp8"] and document["fits"] and not document["is_indexcache"]
    assert [part["pattern"] for part in document["patterns"]] == ["FFFF", "FSSS"]
    for part in document["patterns"]:
        for entry in part["placements"]:
            assert sum(entry["memory"].values()) == entry["total"]
            assert entry["fits"] == (entry["total"] <= document["gpu"]["bytes"])
            for figure, value in (("prefill", "seconds"), ("decode", "tokens_per_second")):
                assert entry[figure]["label"] == "bound" and math.isfinite(entry[figure][value])
    assert document["bytes"] > document["mtp_bytes"] > 0


def test_limits_are_the_last_that_fit(source):
    """Found by halving, compared with plans of the length and the batch themselves."""
    small = ["--gpus", 2, "--memory", 0.02]
    document = document_of(source, *small, "--length", 100, "--batch", 2)
    for name in ("one GPU", "device_map", "tensor parallel", "expert parallel"):
        entry = way(document, name)
        length, batch = entry["largest_length"], entry["largest_batch"]
        assert 0 < length < 512 and 0 < batch < 1000
        for options, fits in (
            (["--length", length, "--batch", 2], True),
            (["--length", length + 1, "--batch", 2], False),
            (["--length", 100, "--batch", batch], True),
            (["--length", 100, "--batch", batch + 1], False),
        ):
            done = run(source, *small, *options, "--json")
            assert way(json.loads(done.stdout), name)["fits"] == fits, (name, options)


def test_nothing_fits_is_exit_code_one_behind_the_tables(source):
    done = run(source, "--gpus", 2, "--memory", 0.0001)
    assert done.exit_code == 1 and "Memory with all F" in done.stdout
    assert "nothing fits 2 x NVIDIA H200 SXM of 0.0 GiB" in " ".join(done.stderr.split())
    assert document_of(source, "--gpus", 2, "--memory", 0.0001, code=1)["fits"] is False


def test_a_larger_memory_makes_room(source):
    entry = way(document_of(source, "--gpus", 1, "--memory", 0.03), "one GPU")
    more = way(document_of(source, "--gpus", 1, "--memory", 0.06), "one GPU")
    assert more["largest_batch"] > entry["largest_batch"] and more["memory"] == entry["memory"]
    assert document_of(source, "--gpus", 1, "--memory", 0.06)["gpu"]["bytes"] == int(0.06 * GIB)


def test_prompts_in_chunks_need_less(source):
    """And no more than their chunk would alone, beside the whole cache."""
    whole, chunked, chunk = (
        way(document_of(source, "--gpus", 1, *options), "one GPU")["memory"]
        for options in (["--length", 512], ["--length", 512, "--prefill-chunk", 64], ["--length", 64])
    )
    assert chunked["latents cache"] == whole["latents cache"] > chunk["latents cache"]
    assert chunked["prefill workspace"] < whole["prefill workspace"] / 4
    assert chunked["prefill workspace"] >= chunk["prefill workspace"]
    done = run(source, "--prefill-chunk", 64)
    assert "for prompts in chunks of 64 tokens" in " ".join(done.stdout.split())


def test_patterns_beside_all_full(source):
    document = document_of(source, "--pattern", "FSFS", "--pattern", "1/2", "--pattern", "1/4")
    # Evenly spaced 1/2 is FSFS too.
    assert [(part["name"], part["pattern"]) for part in document["patterns"]] == [
        ("all F", "FFFF"), ("FSFS", "FSFS"), ("1/4", "FSSS"),
    ]  # fmt: skip
    keys = [way(document, "one GPU", number)["memory"]["index-key cache"] for number in range(3)]
    assert keys[0] == 2 * keys[1] == 4 * keys[2]


def test_a_pattern_of_the_checkpoint_s_own_comes_first_and_what_it_lacks_is_left_out(tmp_path):
    build(tmp_path, family="glm_moe_dsa", layers=4, lacking=(1, 2), indexer_types=["full", "shared", "shared", "full"])
    document = document_of(tmp_path, "--gpus", 1)
    assert [(part["name"], part["pattern"]) for part in document["patterns"]] == [("own", "FSSF"), ("1/4", "FSSS")]
    assert document["skipped"] == {"all F": "the checkpoint has no indexers in layers 1-2"}
    done = run(tmp_path, "--pattern", "FFSS")
    assert done.exit_code == 2 and "no indexers in layers 1, which it makes full" in " ".join(done.stderr.split())


def test_a_model_that_was_measured_says_so(tmp_path):
    """Its shape, by config and headers; sparse shards stand for 30B parameters."""
    from testing.sparse_releases import write_release

    from indexcache.planning.rates import measured_rates

    entry = next(e for e in measured_rates().document["whole"] if e["pattern"].count("F") == 12)
    fields = {**measured_rates().document["models"][entry["model"]], "n_group": 1, "topk_group": 1}
    write_release(tmp_path / "s", "GLM-5", shards=3, **fields)
    document = document_of(
        tmp_path / "s", "--gpus", 1, "--gpu", "h100", "--length", 200000, "--pattern", entry["pattern"]
    )
    one = way(document, "one GPU", 1)
    assert (one["prefill"]["label"], one["prefill"]["seconds"]) == ("measured", 7.5744)
    assert (one["decode"]["label"], one["decode"]["tokens_per_second"]) == ("measured", 181.55)
    assert "long_context_h100.json (NVIDIA H100 80GB HBM3, 2026-11-25)" in one["prefill"]["source"]
    assert (
        way(document_of(tmp_path / "s", "--gpus", 1, "--length", 150000), "one GPU")["prefill"]["label"] == "reckoned"
    )


@pytest.mark.parametrize("gpus", [1, 2, 3, 4])
def test_the_device_map_of_the_script_covers_the_model(source, gpus):
    document = document_of(source, "--gpus", gpus)
    found = {"one GPU": 1} if gpus == 1 else {"device_map": gpus}
    (name,) = found
    lines = way(document, name)["commands"]["load"].splitlines()
    space = {}
    exec("\n".join(line for line in lines if not line.startswith(("import", "from", "model ="))), space)
    device_map = space.get("device_map", {"": 0})
    with torch.device("meta"):
        model = IndexCacheForCausalLM(open_checkpoint(source).config)
    check_device_map(model, device_map)
    assert set(device_map.values()) == set(range(found[name]))
    placed = [device_map[f"model.layers.{layer}"] for layer in range(4)] if gpus > 1 else [0]
    assert placed == sorted(placed)


def test_scripts_load_with_the_pattern_and_the_split(source, tmp_path):
    document = document_of(source, "--gpus", 4)
    load = way(document, "expert parallel", 1)["commands"]["load"]
    assert "DistributedConfig(tp_size=4, ep_size=4)" in load and "'./s-indexcache'" in load
    assert way(document, "tensor parallel")["commands"]["load"].endswith("DistributedConfig(tp_size=4))")
    for part in document["patterns"]:
        for entry in part["placements"]:
            compile(entry["commands"]["load"], "run.py", "exec")
    from indexcache.configuration.share_pattern import SharePattern
    from indexcache.conversion.convert.convert import ConvertOptions, convert
    from indexcache.conversion.io.sources import FolderSource

    convert(FolderSource(source), tmp_path / "o", ConvertOptions(SharePattern("FSFS")))
    converted = document_of(tmp_path / "o", "--gpus", 1)
    assert converted["is_indexcache"] and way(converted, "one GPU")["commands"]["convert"] is None
    assert 'index_share_pattern="FSSS"' in way(converted, "one GPU", 1)["commands"]["load"]
    assert "index_share_pattern" not in way(converted, "one GPU", 0)["commands"]["load"]


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_planned(tmp_path, name):
    """Of eight layers; in full width see tests/conversion/convert/test_sparse_releases.py."""
    from testing.sparse_releases import write_release

    fields = {field: value for field, value in shrunk(name).items() if RELEASED[name].get(field) != value}
    fields.pop("indexer_types", None)
    write_release(tmp_path / "s", name, shards=2, **fields)
    document = document_of(tmp_path / "s", "--gpus", 2, "--length", 4096)
    assert document["fits"] and document["fp8"] == ("quantization_config" in RELEASED[name])


UPLOAD = """
from huggingface_hub import HfApi
HfApi().create_repo("tester/base")
HfApi().upload_folder(repo_id="tester/base", folder_path=sys.argv[1])
"""
PLAN = "from indexcache.cli import app\nsys.argv = ['indexcache', 'plan', *sys.argv[1:]]\napp()"


def test_a_hub_repository_is_planned_by_its_headers(source, hub, run_python):
    run_python(UPLOAD, source, installed=True, hub=hub)
    hub.requests.clear()
    done = run_python(PLAN, "tester/base", "--gpus", "2", "--json", installed=True, hub=hub)
    found, folder = json.loads(done.stdout), document_of(source, "--gpus", 2)
    commands = way(found, "one GPU")["commands"]
    assert commands["convert"] == "indexcache convert tester/base ./base-indexcache --pattern FFFF"
    for document in (found, folder):
        del document["location"]
        for part in document["patterns"]:
            for entry in part["placements"]:
                del entry["commands"]
    assert found == folder
    # Of each of three shards the length of its header, and the header.
    read = [request for request in hub.requests if request.endswith(".safetensors")]
    assert len(read) == 6 and all(request.startswith("GET ") for request in read)


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, message", [
    (["--gpu", "h300"], "--gpu 'h300' is not known: did you mean h200? known are h100"),
    (["--gpu", "tpu"], "--gpu 'tpu' is not known: known are h100"),
    (["--gpus", "0"], "Invalid value for '--gpus': Input should be greater than or equal to 1"),
    (["--gpus", "-1"], "Invalid value for '--gpus'"),
    (["--batch", "0"], "Invalid value for '--batch': Input should be greater than or equal to 1"),
    (["--length", "0"], "Invalid value for '--length': Input should be greater than or equal to 1"),
    (["--length", "513"], "--length 513 is beyond the model's max_position_embeddings, 512"),
    (["--memory", "0"], "--memory must be a positive number of GiB (got 0)"),
    (["--memory", "nan"], "Invalid value for '--memory'"),
    (["--memory", "inf"], "inf is not a finite number"),
    (["--pattern", "FS"], "--pattern 'FS': index_share_pattern has 2 characters for num_hidden_layers=4"),
    (["--pattern", "SFFF"], "--pattern 'SFFF': index_share_pattern must start with 'F'"),
    (["--pattern", "half"], "--pattern 'half': keep must be a count such as 4 or a share such as 1/4"),
    (["--cache", "offloaded"], "'offloaded' is not one of"),
])  # fmt: skip
def test_bad_usage_ends_with_two(source, arguments, message):
    done = run(source, *arguments)
    assert done.exit_code == 2 and message in " ".join(done.output.replace("│", " ").split()), done.output


def test_folders_that_are_no_checkpoints_end_with_one(tmp_path, source):
    (tmp_path / "empty").mkdir()
    build(tmp_path / "headerless", shards=1)
    (tmp_path / "headerless" / "model.safetensors").unlink()
    build(tmp_path / "unconfigured", shards=1)
    (tmp_path / "unconfigured" / "config.json").unlink()
    build(tmp_path / "damaged", shards=1)
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\x07" * 64)
    build(tmp_path / "other", shards=1)
    edit_json(tmp_path / "other" / "config.json", model_type="llama")
    build(tmp_path / "dense", shards=1)
    edit_json(tmp_path / "dense" / "config.json", model_type="deepseek_v3")
    for folder, message in (
        ("absent", "is no folder here, nor a Hub id"),
        ("empty", "config.json is missing"),
        ("headerless", "holds neither model.safetensors nor model.safetensors.index.json"),
        ("unconfigured", "config.json is missing"),
        ("damaged", "is no safetensors file"),
        ("other", "model_type 'llama' cannot be converted"),
        ("dense", "it has no lightning indexers to share"),
    ):
        done = run(tmp_path / folder)
        assert done.exit_code == 1 and message in " ".join(done.stderr.split()), (folder, done.output)
        assert "Traceback" not in done.output


@pytest.mark.parametrize("changes, message", [
    ({"max_position_embeddings": 0}, "config.json has max_position_embeddings=0: fix it"),
    ({"num_experts_per_tok": 10**400, "n_group": 1}, "config.json"),
])  # fmt: skip
def test_numbers_that_no_weight_contradicts(tmp_path, changes, message):
    build(tmp_path, shards=1)
    edit_json(tmp_path / "config.json", **changes)
    done = run(tmp_path)
    assert done.exit_code == 1 and message in " ".join(done.stderr.split()), done.output


def test_a_longer_context_needs_the_config_to_say_so(tmp_path):
    build(tmp_path, shards=1, max_position_embeddings=100000)
    assert document_of(tmp_path, "--gpus", 1)["length"] == 100000
    edit_json(tmp_path / "config.json", max_position_embeddings=200000)
    assert document_of(tmp_path, "--gpus", 1)["length"] == 131072
    assert IndexCacheConfig().max_position_embeddings == 163840
