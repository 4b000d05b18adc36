"""Two processes with a GPU each: tensor and expert parallel, FSDP2, DDP and search give what one GPU gives."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.placed_models import DEMO, PATTERNS, demo_windows, means, measured, save_demo
from testing.small_run import run, run_processes
from testing.time_limits import PROCESS_SECONDS

from indexcache import IndexCacheForCausalLM

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.gpus,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

HERE = Path(__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
FSDP2 = ("-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2")
FSDP2 += ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
SPLITS = ["tensor", "expert"]
GRADIENTS = [*SPLITS, "data", "data, expert"]


def launch(*command):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "4"}
    finished = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=PROCESS_SECONDS
    )
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-6000:]
    return finished.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_demo(tmp_path_factory.mktemp("indexcache"))


@pytest.fixture(scope="module")
def one_gpu(folder):
    found = {}
    for dtype in ("bfloat16", "float32"):
        model = IndexCacheForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to("cuda:0").eval()
        for pattern in PATTERNS:
            model.set_index_share_pattern(pattern)
            found[dtype, pattern] = measured(model, demo_windows())[:2]
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("split", SPLITS)
def test_losses_and_tokens_of_shards_are_those_of_one_gpu(folder, one_gpu, tmp_path, split, dtype):
    launch(*TORCHRUN, HERE / "sharded_losses.py", folder, tmp_path / "found", split, dtype)
    first, second = (json.loads((tmp_path / f"found.{rank}").read_text()) for rank in range(2))
    assert first == second
    for pattern in PATTERNS:
        losses, tokens = one_gpu[dtype, pattern]
        found = [torch.tensor(each) for each in first[pattern]["losses"]]
        if dtype == "float32":
            assert means(found) == pytest.approx(means(losses), abs=1e-3)
            assert first[pattern]["tokens"] == tokens.tolist()
            continue
        # Sums of two halves round otherwise, and keys and experts that nearly tie change: a token's loss is as far
        # from fp32's as one GPU's, to either side.
        exact = torch.cat(one_gpu["float32", pattern][0])
        off, allowed = torch.cat(found) - exact, torch.cat(losses) - exact
        assert off.square().mean() <= 1.25 * allowed.square().mean()
        assert off.mean().abs() <= max(1e-3, 3 * off.std() / off.numel() ** 0.5)


@pytest.mark.parametrize("split", GRADIENTS)
def test_gradients_of_shards_are_those_of_one_gpu(tmp_path, split):
    from testing.tiny_models import tiny_model

    tiny_model(index_share_pattern="FSFS").save_pretrained(tmp_path)
    assert launch(*TORCHRUN, HERE / "parallel_gradients.py", tmp_path, split).count("agrees") == 2


@pytest.fixture(scope="module")
def training(folder, tmp_path_factory):
    """The demo checkpoint and its text in windows of 256 tokens, as small_run.py reads them; and one GPU's run."""
    place = tmp_path_factory.mktemp("training")
    (place / "source").symlink_to(folder)
    rows = demo_windows(4)[:, :2048].reshape(-1, 256)
    save_file({"train_ids": rows[:28].contiguous()}, place / "train.safetensors")
    save_file({"held_ids": rows[28:].contiguous()}, place / "held.safetensors")
    run(place, place / "one", **RECIPE, batch_size=2)
    return place


# As many windows a step from two processes as from one with a batch of two.
RECIPE = {"pattern": PATTERNS[1], "device": "cuda", "dtype": "float32", "accumulation": 1}


@pytest.mark.parametrize(
    ("launcher", "changes"),
    [(TORCHRUN, {}), (FSDP2, {}), (FSDP2, {"lora_rank": 2})],
    ids=["DDP", "FSDP2", "FSDP2, adapters"],
)
def test_a_run_killed_and_resumed_gives_the_weights_of_one_gpu(training, tmp_path, launcher, changes):
    one = training / "one"
    if changes:
        run(training, one := tmp_path / "one", **RECIPE, batch_size=2, **changes)
    two, options = tmp_path / "two", {**RECIPE, **changes, "launcher": launcher}
    # 4 steps of the warm-up and 3 of the sparse stage, one of them behind its checkpoint.
    killed = run_processes(training, two, kill_at=7, check=False, **options)
    assert killed.returncode != 0 and f"-{signal.SIGKILL.value}" in killed.stdout + killed.stderr
    assert (two / "training/sparse/checkpoint-2").exists()
    run_processes(training, two, **options)
    assert json.loads((two / "indexcache_recipe.json").read_text())["distillation"]["processes"] == 2
    source, trained, expected = (load_file(path / "model.safetensors") for path in (training / "source", two, one))
    assert trained.keys() == expected.keys()
    moved = off = 0.0
    for name, value in expected.items():
        off += (trained[name] - value).double().square().sum().item()
        moved += (value - source[name].float()).double().square().sum().item()
    # Adam's first steps have the sign of gradients: what is zero to rounding goes one way or the other.
    assert off <= 0.02**2 * moved, (off / moved) ** 0.5


def test_a_search_in_two_processes_finds_what_one_finds(folder, tmp_path):
    found = []
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        options = ["--keep", "1/2", "--nsamples", "4", "--seqlen", "256", "--no-pictures", "--dtype", "float32"]
        data = f"{DEMO / 'sample_windows.safetensors'}"
        command = ["-m", "indexcache.cli", "search", folder, "--data", data, "--output", tmp_path / name, *options]
        launch(*launcher, *command)
        document = json.loads((tmp_path / name / "patterns.json").read_text())
        document["cost"].pop("seconds")
        found.append(document)
    assert found[0]["patterns"] == found[1]["patterns"]
    assert found[0]["cost"] == found[1]["cost"]
