"""Releases at full width and reduced counts, with holes for weights: what reads headers runs on them as on a release.

In full size: docs/large_models.md has the commands.
"""

import json
from pathlib import Path

import pytest
import torch
from testing.sparse_releases import SHARDS, release_config, release_tensors, total_bytes, write_release
from typer.testing import CliRunner

from indexcache.cli import app
from indexcache.conversion.io.load_source import load_source
from indexcache.conversion.io.open_checkpoint import open_checkpoint
from indexcache.planning.loaded_weights import StoredTensor, loaded_tensors

# Fewer layers, experts and tokens, and experts of a quarter of their width; everything else is as released.
REDUCED = dict(n_routed_experts=8, num_experts_per_tok=4, moe_intermediate_size=512, first_k_dense_replace=1,
               vocab_size=2048, eos_token_id=1, pad_token_id=0)  # fmt: skip
LAYERS = {"DeepSeek-V3.2": 3, "GLM-5.3": 7}
PATTERNS = {"DeepSeek-V3.2": ("FFF", "FSS"), "GLM-5.3": ("FFFSSSF", "FFSSSSF")}


@pytest.fixture(scope="module", params=LAYERS)
def release(request, tmp_path_factory):
    """A release's name, folder and bytes."""
    folder = tmp_path_factory.mktemp("release") / "s"
    return request.param, *write_release(
        folder, request.param, shards=9, num_hidden_layers=LAYERS[request.param], **REDUCED
    )


def run(*arguments, code=0):
    done = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--json")])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def room(folder):
    """Bytes that a folder takes on disk, linked files not counted."""
    return sum(path.stat().st_blocks * 512 for path in Path(folder).iterdir() if path.stat().st_nlink == 1)


@pytest.mark.parametrize("name, gigabytes, tensors, shards", [
    ("DeepSeek-V3.2", 689, 92426, 163), ("GLM-5.3", 756, 118632, 141),
])  # fmt: skip
def test_in_full_size_they_are_as_large_as_the_releases(name, gigabytes, tensors, shards):
    found = release_tensors(release_config(name))
    assert total_bytes(found) / 1e9 == pytest.approx(gigabytes, rel=0.005)
    assert len(found) == tensors and SHARDS[name] == shards


def test_files_are_holes(release):
    _, folder, total = release
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) == 9
    assert sum(shard.stat().st_size for shard in shards) > total > 1e9
    assert room(folder) < 2e6


def test_inspect(release):
    name, folder, total = release
    found = run("inspect", folder)
    assert (found["bytes"], found["shards"], found["mtp_layers"]) == (total, 9, [LAYERS[name]])
    assert found["pattern"] == PATTERNS[name][0] and found["bytes_by_dtype"]["F8_E4M3"] > 0.9 * total


def test_dry_run(release, tmp_path):
    name, folder, total = release
    plan = run("convert", folder, tmp_path / "o", "--pattern", PATTERNS[name][1], "--dry-run")
    assert plan["kept_bytes"] + plan["dropped_bytes"] == total
    assert {shard["action"] for shard in plan["shards"]} == {"pass", "rewrite"} and not (tmp_path / "o").exists()


def test_conversion_links_what_loses_nothing(release, tmp_path):
    name, folder, total = release
    # A link stays on the file system of the release.
    output = folder.with_name(f"{tmp_path.name}_links")
    done = run("convert", folder, output, "--pattern", PATTERNS[name][1], "--keep-shared-indexers")
    assert set(done["how"].values()) == {"linked"} and done["kept_bytes"] == total
    assert room(output) < 2e6
    assert run("inspect", output)["pattern"] == PATTERNS[name][1]


def test_plan(release):
    name, folder, total = release
    document = run("plan", folder, "--gpus", 2, "--pattern", PATTERNS[name][1])
    assert document["fits"] and document["bytes"] == total and document["mtp_bytes"] > 0
    assert run("plan", folder, "--gpus", 2, "--memory", 0.1, code=1)["fits"] is False


def test_load_without_memory(release):
    """transformers reads the headers and makes the model on the meta device; the plan's bytes are its parameters'."""
    opened = open_checkpoint(release[1])
    model = load_source(opened, dtype="auto", device_map="meta")
    parameters = list(model.parameters())
    assert {parameter.device.type for parameter in parameters} == {"meta"}
    stored = [StoredTensor(info.name, info.shape, info.dtype) for info in opened.checkpoint.tensors.values()]
    # Some releases of transformers make routers in fp32, which are narrowed once their numbers are known.
    planned = sum(t.nbytes for t in loaded_tensors(stored, opened.config) if t.module != "mlp.gate")
    assert planned == sum(p.numel() * p.element_size() for name, p in model.named_parameters() if ".gate." not in name)
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in parameters)
