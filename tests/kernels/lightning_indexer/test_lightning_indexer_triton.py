"""The Triton kernels in Triton's interpreter, against the fp64 reference: one process for all cases.

Triton decides when it is imported whether it interprets, so the cases run in a child process. fp16 only: the
interpreter multiplies bf16 bit patterns as integers.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

# name: B, S, T, H, D, topk, first slots, padded and holed (and documents packed), keys' order, path
CASES = {
    "whole prefill": (1, 40, 200, 4, 32, 16, [160], False, "random", "prefill"),
    "split": (1, 40, 200, 4, 32, 16, [160], False, "random", "split"),
    "odd heads and width, chunk of a batch with holes": (2, 33, 130, 3, 48, 20, [50, 90], True, "random", "prefill"),
    "split of a batch with holes": (2, 5, 130, 3, 48, 20, [50, 100], True, "random", "split"),
    "equal scores": (1, 20, 90, 4, 32, 16, [70], False, "equal", "prefill"),
    "equal scores, split": (1, 20, 90, 4, 32, 16, [70], False, "equal", "split"),
    "lists are cut": (1, 8, 9000, 2, 32, 100, [8992], False, "random", "prefill"),
    "every key beats all before it": (1, 8, 9000, 2, 32, 100, [8992], False, "ascending", "prefill"),
    "guess from a sample": (1, 3, 9000, 2, 32, 100, [8900], False, "random", "split"),
    "guess fails on equal scores": (1, 2, 9000, 2, 32, 100, [8998], False, "equal", "split"),
    "one token": (1, 1, 1, 1, 16, 8, [0], False, "random", "split"),
    "topk is all that is seen": (1, 3, 30, 64, 16, 28, [27], False, "random", "split"),
    "packed documents": (2, 40, 200, 4, 32, 16, [150, 160], "packed", "random", "prefill"),
    "packed documents, holes, split": (2, 5, 190, 4, 32, 16, [150, 160], "packed", "random", "split"),
    "packed documents, long": (1, 4, 9000, 2, 32, 100, [8996], "packed", "random", "prefill"),
    "NaN and ties": (2, 40, 200, 4, 16, 60, [150, 160], False, "nan", "prefill"),
    "NaN and ties, split": (2, 5, 190, 4, 16, 60, [150, 160], False, "nan", "split"),
    "NaN and ties, lists are cut": (1, 8, 9000, 2, 16, 100, [8992], False, "nan", "prefill"),
    "NaN and ties, guess from a sample": (1, 8, 9000, 2, 16, 100, [8990], False, "nan", "split"),
    "NaN in holes, documents": (2, 40, 200, 4, 16, 60, [150, 160], "packed", "nan", "prefill"),
    "topk above 2048, a width that pads": (1, 2, 6100, 2, 80, 2100, [6098], False, "random", "split"),
}


def run(B, S, T, H, D, topk, starts, holes, order, path):
    """None, or what differs between the interpreted kernels and the reference."""
    from indexcache.kernels.lightning_indexer import lightning_indexer_triton as kernels
    from indexcache.kernels.lightning_indexer.lightning_indexer_reference import lightning_indexer_reference

    draw = torch.Generator().manual_seed(T + H)
    q = torch.randn(B, S, H, D, generator=draw)
    k = torch.randn(B, T, D, generator=draw)
    weights = torch.randn(B, S, H, generator=draw)
    if order == "equal":
        # Small integers: a processor's matrix product may round equal columns differently.
        q, k = q.round(), k[:, :1].round().expand(B, T, D)
    if order == "ascending":
        q, weights, k = q.abs(), weights.abs(), k[:, :1].abs() * torch.linspace(0.01, 1, T)[None, :, None]
    if order == "nan":
        # Every third key, of either sign, and all the scores of one query; what is left often ties, and exactly so.
        q, k, weights = q.round(), k.round().clamp(-1, 1), weights.round()
        k[:, ::3, 0] = float("nan")
        k[:, 3::6, 0] = -k[:, 3::6, 0]
        k[:, 7] = k[:, 8]
        weights[:, 1, 0] = float("nan")
    q, k, starts = q.half(), k.half().contiguous(), torch.tensor(starts)
    mask = torch.rand(B, T, generator=draw) > 0.3 if holes else None
    first_keys = None
    if holes:
        mask[:, :7] = False
    if holes == "packed":
        first_keys = torch.randint(0, T, (B, S), generator=draw, dtype=torch.int32).cummax(1).values
    wide = (x.double() for x in (q, k, weights))
    want = lightning_indexer_reference(*wide, topk, D**-0.5, starts, mask, first_keys)
    for b in range(B):
        k[b, int(starts[b]) + S :] = float("nan")
        if holes:
            k[b, ~mask[b]] = float("nan")
    kernels._multiprocessors = lambda device: 1 if path == "prefill" else 10**9
    got = kernels.lightning_indexer_triton(q, k, weights, topk, D**-0.5, starts, mask, first_keys)
    different = (got != want).any(-1).nonzero().tolist()
    return f"rows {different[:5]} of {len(different)} differ" if different else None


def run_quantisation():
    """None, or what differs between the interpreted quantisation and PyTorch's.

    The interpreter loses the carry when it rounds to e4m3 (125 becomes 64): values are compared on a GPU, here only
    that none is farther than that.
    """
    from indexcache.kernels.lightning_indexer.indexer_quantization import quantize_for_scoring
    from indexcache.kernels.lightning_indexer.indexer_quantization_triton import quantize_triton

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, 64, generator=draw) * torch.randn(3, 50, 1, generator=draw).exp()
    x[1] = 0.0
    (got, got_scale), (want, scale) = quantize_triton(x.half()), quantize_for_scoring(x.half())
    if not torch.equal(got_scale, scale):
        return "scales differ"
    got, want = got.float(), want.float()
    wrong = (got != want) & ((got - want).abs() > want.abs() / 8) & (got * 2 != want)
    return f"{int(wrong.sum())} values differ" if wrong.any() else None


@pytest.fixture(scope="module")
def outcomes():
    # This file is run as a script, too, which finds no other beside it.
    from testing.time_limits import PROCESS_SECONDS

    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=PROCESS_SECONDS
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_selects_as_the_reference(outcomes, name):
    assert outcomes[name] is None


def test_quantises_as_pytorch(outcomes):
    assert outcomes["quantisation"] is None


if __name__ == "__main__":
    print(json.dumps({"quantisation": run_quantisation()} | {name: run(*case) for name, case in CASES.items()}))
