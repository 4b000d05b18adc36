"""The lightning indexer's kernels in Triton's interpreter, against the reference in fp64.

fp16 only: the interpreter multiplies bf16 bit patterns as integers.
"""

import pytest
import torch

pytest.importorskip("triton")

from indexcache.kernels.common.device_target import DeviceTarget, pretended_target
from indexcache.kernels.common.dispatch import no_fallback
from indexcache.kernels.lightning_indexer.indexer_quantization import quantize_for_scoring
from indexcache.kernels.lightning_indexer.indexer_quantization_triton import quantize_triton
from indexcache.kernels.lightning_indexer.lightning_indexer import lightning_indexer
from indexcache.kernels.lightning_indexer.lightning_indexer_reference import lightning_indexer_reference

pytestmark = pytest.mark.interpreted
# A device of one multiprocessor has blocks of queries for all, one of a million splits the keys.
PATHS = {"prefill": ("Triton, blocks of queries", 1), "split": ("Triton, keys split over programs", 10**6)}
# name: B, S, T, H, D, topk, first slots, padded and holed (and documents packed), keys' order, path
CASES = {
    "whole prefill": (1, 40, 200, 4, 32, 16, [160], False, "random", "prefill"),
    "split": (1, 40, 200, 4, 32, 16, [160], False, "random", "split"),
    "odd heads and width, chunk of a batch with holes": (2, 33, 130, 3, 48, 20, [50, 90], True, "random", "prefill"),
    "split of a batch with holes": (2, 5, 130, 3, 48, 20, [50, 100], True, "random", "split"),
    "equal scores": (1, 20, 90, 4, 32, 16, [70], False, "equal", "prefill"),
    "equal scores, split": (1, 20, 90, 4, 32, 16, [70], False, "equal", "split"),
    "lists are cut": (1, 16, 9000, 2, 32, 100, [8984], False, "random", "prefill"),
    "every key beats all before it": (1, 16, 9000, 2, 32, 100, [8984], False, "ascending", "prefill"),
    "guess from a sample": (1, 3, 9000, 2, 32, 100, [8900], False, "random", "split"),
    "guess fails on equal scores": (1, 2, 9000, 2, 32, 100, [8998], False, "equal", "split"),
    "one token": (1, 1, 1, 1, 16, 8, [0], False, "random", "split"),
    "topk is all that is seen": (1, 3, 30, 64, 16, 28, [27], False, "random", "split"),
    "packed documents": (2, 40, 200, 4, 32, 16, [150, 160], "packed", "random", "prefill"),
    "packed documents, holes, split": (2, 5, 190, 4, 32, 16, [150, 160], "packed", "random", "split"),
    "packed documents, long": (1, 16, 9000, 2, 32, 100, [8984], "packed", "random", "prefill"),
    "NaN and ties": (2, 40, 200, 4, 16, 60, [150, 160], False, "nan", "prefill"),
    "NaN and ties, split": (2, 5, 190, 4, 16, 60, [150, 160], False, "nan", "split"),
    "NaN and ties, lists are cut": (1, 16, 9000, 2, 16, 100, [8984], False, "nan", "prefill"),
    "NaN and ties, guess from a sample": (1, 8, 9000, 2, 16, 100, [8990], False, "nan", "split"),
    "NaN in holes, documents": (2, 40, 200, 4, 16, 60, [150, 160], "packed", "nan", "prefill"),
    "topk above 2048, a width that pads": (1, 2, 6100, 2, 80, 2100, [6098], False, "random", "split"),
}


@pytest.mark.parametrize("name", CASES)
def test_selects_as_the_reference(name):
    B, S, T, H, D, topk, starts, holes, order, path = CASES[name]
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
    backend, processors = PATHS[path]
    with no_fallback() as ran, pretended_target(DeviceTarget("cuda", 80, processors)):
        got = lightning_indexer(q, k, weights, topk, query_start=starts, key_mask=mask, key_start=first_keys)
    assert ran == [("lightning_indexer", "Triton"), ("lightning_indexer: kernels", backend)]
    assert (got != want).any(-1).nonzero().tolist() == []


def test_quantises_as_pytorch():
    """The interpreter loses the carry when it rounds to e4m3 (125 becomes 64).

    Values are compared on a GPU, here only that none is farther than that.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, 64, generator=draw) * torch.randn(3, 50, 1, generator=draw).exp()
    x[1] = 0.0
    (got, got_scale), (want, scale) = quantize_triton(x.half()), quantize_for_scoring(x.half(), allow_triton=False)
    assert torch.equal(got_scale, scale)
    got, want = got.float(), want.float()
    assert not ((got != want) & ((got - want).abs() > want.abs() / 8) & (got * 2 != want)).any()
