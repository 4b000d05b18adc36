"""On a GPU: a first prefill compiles ahead what decoding launches, and a warmed cache leaves nothing to compile."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROGRAM = """
import json, os, sys, torch
import triton
from indexcache.benchmarks.bench.speed_models import prompt, random_model
from indexcache.modeling_indexcache import compile_ahead
misses = []
def note(src, cache_hit, **rest):
    if not cache_hit:
        misses.append(src.name)
triton.knobs.compilation.listener = note
model = random_model("30b", 8, 3, torch.device("cuda"), torch.bfloat16)
for parameter in model.parameters():
    parameter.requires_grad_(False)
for name, parameter in model.named_parameters():
    if name.endswith("e_score_correction_bias"):
        parameter.data = parameter.data.float()
if sys.argv[1] == "config":
    model.config.save_pretrained(sys.argv[2])
found, ids = [], {}
for length in (1000, 8000, 20001):
    out = model.generate(prompt(model, length, "drift"), attention_mask=torch.ones(1, length, device="cuda").long(),
                         max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    ids[length] = out[0, length:].tolist()
    compile_ahead.finish_compiling()
    found.append(len(misses))
print(json.dumps({"misses": found, "names": misses[found[0]:], "missed": misses, "ids": ids}))
"""


def run(cache, ahead, *arguments, processes="0"):
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "INDEXCACHE_COMPILE_AHEAD": ahead}
    environment["INDEXCACHE_COMPILE_PROCESSES"] = processes
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_comes_after_the_first_prompt_is_compiled_already(tmp_path):
    ahead = run(tmp_path / "ahead", "16", "config", tmp_path / "model")
    assert ahead["misses"][0] > 40 and ahead["names"] == []
    alone = run(tmp_path / "alone", "0", "nothing")
    assert alone["misses"][1] > alone["misses"][0] and alone["ids"] == ahead["ids"]
    assert run(tmp_path / "ahead", "16", "nothing")["missed"] == []


def test_what_processes_compile_is_found_here(tmp_path):
    threads = run(tmp_path / "threads", "3", "nothing")
    processes = run(tmp_path / "processes", "3", "nothing", processes="8")
    # Threads begin before processes are there, and compile fewer.
    assert processes["misses"][0] < threads["misses"][0] and processes["names"] == []
    assert processes["ids"] == threads["ids"]
    assert run(tmp_path / "processes", "3", "nothing", processes="8")["missed"] == []


@pytest.mark.parametrize("how", [[], ["--target", "sm_{}{}"]])
def test_a_cache_of_warm_up_leaves_nothing_to_compile(tmp_path, how):
    run(tmp_path / "first", "0", "config", tmp_path / "model")
    arguments = [part.format(*torch.cuda.get_device_capability()) for part in how]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    if how:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "indexcache.cli", "warm-up", str(tmp_path / "model"), "--dtype", "bfloat16"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(tmp_path / "cache", "0", "nothing")["missed"] == []
