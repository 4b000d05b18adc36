"""On the trained demo checkpoint: the loss is transformers' own, and the choice of layers matters as its card says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from testing.time_limits import PROCESS_SECONDS
from transformers import AutoModelForCausalLM

from indexcache.conversion.io.load_source import load_source
from indexcache.evaluation.perplexity import evaluate_windows
from indexcache.kernels.lightning_indexer.lightning_indexer_reference import indexer_scores, visible_keys

DEMO = Path(__file__).parents[2] / "demo"


@pytest.fixture(scope="module")
def model():
    return load_source(DEMO / "dsa_demo", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def windows():
    tensors = load_file(DEMO / "sample_windows.safetensors")
    ids = next(value for name, value in tensors.items() if name.endswith("ids"))
    recall = next(value for name, value in tensors.items() if name.endswith("recall"))
    return ids[:1].long(), recall[:1]


def with_the_ties_of_torch_topk(q, k, weights, topk, scale, query_start, key_mask, key_start=None, fp8=False):
    """The selection as transformers makes it: among equal scores, whichever `torch.topk` happens to take."""
    num_keys = k.shape[1]
    seen = visible_keys(query_start.expand(q.shape[0]), q.shape[1], num_keys, key_mask, key_start)
    scores = indexer_scores(q, k, weights, scale).masked_fill(~seen, float("-inf"))
    best = scores.topk(min(topk, num_keys), dim=-1)
    return best.indices.masked_fill(best.values == float("-inf"), -1).to(torch.int32)


def test_loss_equals_transformers_once_ties_are_broken_alike(model, windows, monkeypatch):
    """Scores of exactly zero (all heads' ReLU shut) tie at the edge of the top-k in a few rows of ten thousand."""
    ids, _ = windows
    theirs = AutoModelForCausalLM.from_pretrained(DEMO / "dsa_demo", dtype=torch.float32).eval()
    op_module = sys.modules["indexcache.kernels.lightning_indexer.lightning_indexer"]
    monkeypatch.setattr(op_module, "lightning_indexer_reference", with_the_ties_of_torch_topk)
    assert evaluate_windows(model, ids).loss == pytest.approx(evaluate_windows(theirs, ids).loss, abs=1e-4)


def test_the_searched_pattern_keeps_recall_that_the_uniform_one_loses(model, windows):
    scores = {}
    for pattern in ("FFFFFFFFFFFF", "FFSSSSFFSSSS", "FSSFSSFSSFSS"):
        model.set_index_share_pattern(pattern)
        scores[pattern] = evaluate_windows(model, *windows)
    model.set_index_share_pattern("FFFFFFFFFFFF")
    full, searched, uniform = scores.values()
    assert searched.loss < full.loss + 0.08
    assert searched.recall_accuracy > 0.95
    assert uniform.loss > full.loss + 0.4
    assert uniform.recall_accuracy < 0.3


def test_the_probe_holds(model):
    """What transformers' own class chose after each token when the probe was made, in fp32."""
    probe = json.loads((DEMO / "dsa_demo" / "probe.json").read_text())
    ids, argmax = (torch.tensor(probe[name]) for name in ("ids", "argmax"))
    theirs = AutoModelForCausalLM.from_pretrained(DEMO / "dsa_demo", dtype=torch.float32).eval()
    with torch.inference_mode():
        for net in (theirs, model):
            assert (net(ids[None]).logits[0].argmax(-1) == argmax).float().mean() > 0.99


def test_a_prefill_of_8k_tokens_stays_within_bounded_memory():
    """Measured in a process of its own: the peak beyond the loaded model, far under one [S, T] mask a head."""
    command = [sys.executable, "-m", "indexcache.benchmarks.studies.cpu_prefill", "--one", "8192", "FFSSSSFFSSSS"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_SECONDS)
    assert finished.returncode == 0, finished.stderr
    record = json.loads(finished.stdout.splitlines()[-1])
    assert record["peak_mib"] - record["loaded_mib"] < 400
