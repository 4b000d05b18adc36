"""Benchmark of the lightning indexer: whole causal layers, chunks and decode steps, each checked against fp64 first.

python -m indexcache.benchmarks.kernels.lightning_indexer --output benchmarks/results/lightning_indexer.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ...kernels.lightning_indexer.indexer_quantization import quantize_for_scoring
from ...kernels.lightning_indexer.lightning_indexer import lightning_indexer
from ...kernels.lightning_indexer.lightning_indexer_reference import visible_keys
from .harness import Case, measure_ceilings, run_cases, write_json

TOPK = 2048
HEAD_DIM = 128


def make_inputs(B: int, S: int, T: int, H: int, D: int = HEAD_DIM, dtype: torch.dtype = torch.bfloat16) -> tuple:
    """Random q [B, S, H, D], k [B, T, D] and weights [B, S, H] on the GPU."""
    q = torch.randn(B, S, H, D, device="cuda", dtype=dtype)
    k = torch.randn(B, T, D, device="cuda", dtype=dtype)
    weights = torch.randn(B, S, H, device="cuda") * H**-0.5
    return q, k, weights


# Products [n, H] of one query's heads with some keys: batch entry, query and keys [n] in, fp64 out.
Products = Callable[[int, int, torch.Tensor], torch.Tensor]


def exact_products(q: torch.Tensor, k: torch.Tensor) -> Products:
    """In fp64."""
    return lambda b, s, keys: k[b, keys].double() @ q[b, s].double().t()


def tensor_core_products(q: torch.Tensor, k: torch.Tensor) -> Products:
    """Of the e4m3 rows that `quantize_for_scoring` makes, as this GPU's tensor cores multiply them.

    Their accumulator keeps fewer bits than fp32: on an H100 a product of 128 columns is off by 1.2e-4 of the products'
    rms in the mean (`benchmarks/results/e4m3_products_h100.json`), which changes who is within the `topk`. What cuBLAS
    gives is the same to the bit as a chain of wgmma, with and without its fast accumulation.
    """
    (q8, q_scale), (k8, k_scale) = quantize_for_scoring(q), quantize_for_scoring(k)
    one = torch.ones((), device=q.device)

    def products(b: int, s: int, keys: torch.Tensor) -> torch.Tensor:
        raw = torch._scaled_mm(k8[b], q8[b, s].t(), one, one, out_dtype=torch.float32)
        return raw[keys].double() * q_scale[b, s].double() * k_scale[b, keys].double().unsqueeze(-1)

    return products


def wrong_rows(
    indices: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    rows: list[int],
    query_start: torch.Tensor | int,
    key_mask: torch.Tensor | None = None,
    products: Products | None = None,
) -> str | None:
    """What is wrong with the selection of some query rows, by scores made in fp64; None if nothing is.

    A selected set may differ from the fp64 one only by keys whose scores lie within fp32 rounding of the k-th best.
    `products` by default those of `q` and `k`, exact.
    """
    products = products or exact_products(q, k)
    B, S, H, D = q.shape
    T, width = k.shape[1], indices.shape[2]
    starts = torch.as_tensor(query_start, device=q.device).expand(B)
    for b in range(B):
        for s in rows:
            mask = None if key_mask is None else key_mask[b : b + 1]
            seen = visible_keys(starts[b : b + 1] + s, 1, T, mask)[0, 0]
            keys = seen.nonzero()[:, 0]
            got = indices[b, s]
            chosen = got[got >= 0].long()
            want = min(width, keys.numel())
            where = f"batch {b} query {s}"
            if chosen.numel() != want or (got[:want] < 0).any():
                return f"{where}: {chosen.numel()} keys selected, not {want}"
            if (chosen.diff() <= 0).any() or not seen[chosen].all():
                return f"{where}: keys out of order, repeated or not visible"
            if want == keys.numel():
                continue
            positive = products(b, s, keys).relu() * D**-0.5
            scores = positive @ weights[b, s].double()
            terms = positive @ weights[b, s].double().abs()
            full = torch.full((T,), float("-inf"), dtype=torch.float64, device=q.device)
            full[keys] = scores
            kth = full.topk(want).values[-1]
            slack = 64 * torch.finfo(torch.float32).eps * terms.max().item()
            if full[chosen].min() < kth - slack:
                return f"{where}: selected a score {kth - full[chosen].min():.3g} under the k-th best"
            outside = full.clone()
            outside[chosen] = float("-inf")
            if outside.max() > kth + slack:
                return f"{where}: missed a score {outside.max() - kth:.3g} above the k-th best"
    return None


def check_case(inputs: tuple, query_start: int) -> str | None:
    """Check some rows of a case, and that a second run gives the same bits."""
    q, k, weights = inputs
    first = lightning_indexer(q, k, weights, TOPK, query_start=query_start)
    if not torch.equal(first, lightning_indexer(q, k, weights, TOPK, query_start=query_start)):
        return "two runs differ"
    S = q.shape[1]
    rows = sorted({0, S // 3, S // 2, S - 1} | {r for r in (TOPK - 1, TOPK, TOPK + 1) if r < S})
    return wrong_rows(first, q, k, weights, rows, query_start)


def check_fp8(inputs: tuple) -> str | None:
    """As `check_case` for a whole layer, by the scores of the quantised rows as the tensor cores multiply them."""
    q, k, weights = inputs
    first = _select_fp8(*inputs)
    if not torch.equal(first, _select_fp8(*inputs)):
        return "two runs differ"
    rows = sorted({0, TOPK - 1, TOPK, q.shape[1] // 3, q.shape[1] // 2, q.shape[1] - 1})
    return wrong_rows(first, q, k, weights, rows, 0, products=tensor_core_products(q, k))


def prefill_case(L: int, H: int, S: int | None = None, fp8: bool = False) -> Case:
    """The last S queries of L tokens; all of them by default (with `fp8` always)."""
    S = L if S is None else S
    pairs = S * (L - S) + S * (S + 1) // 2
    start = L - S
    return Case(
        name=f"prefill H={H} S={S} L={L}" + (" fp8" if fp8 else ""),
        make=partial(make_inputs, 1, S, L, H),
        call=_select_fp8 if fp8 else partial(_select, start),
        check=check_fp8 if fp8 else partial(check_case, query_start=start),
        flops=2.0 * HEAD_DIM * H * pairs,
        matmul="fp8_tflops" if fp8 else "bf16_tflops",
        bytes=2.0 * HEAD_DIM * L + 4.0 * S * TOPK,
        copies=1,
        info={"S": S, "L": L, "H": H, "D": HEAD_DIM, "topk": TOPK, "dtype": "e4m3" if fp8 else "bf16"},
    )


def decode_case(B: int, L: int, H: int, slots: int | None = None) -> Case:
    """One query a sequence after L tokens, in a cache of `slots` (default L), as a CUDA graph."""
    slots = L if slots is None else slots
    return Case(
        name=f"decode H={H} B={B} L={L}" + (f" of {slots} slots" if slots != L else ""),
        make=partial(make_inputs, B, 1, slots, H),
        call=partial(_select, L - 1),
        check=partial(check_case, query_start=L - 1),
        bytes=B * (2.0 * HEAD_DIM * L + 4.0 * TOPK),
        copies=2,
        graph=True,
        info={"B": B, "L": L, "H": H, "D": HEAD_DIM, "topk": TOPK},
    )


def _select(query_start: int, q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return lightning_indexer(q, k, weights, TOPK, query_start=query_start)


def _select_fp8(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return lightning_indexer(q, k, weights, TOPK, query_start=0, fp8=True)


def cases() -> list[Case]:
    """Every case of the group."""
    prefill = [prefill_case(L, 32) for L in (8192, 32768, 65536, 200_000)]
    prefill += [prefill_case(L, 64) for L in (32768, 65536, 200_000)]
    prefill += [prefill_case(L, 32, fp8=True) for L in (32768, 65536, 200_000)] + [prefill_case(200_000, 64, fp8=True)]
    chunks = [prefill_case(200_000, 32, S=S) for S in (512, 4096)]
    decode = [decode_case(B, 200_000, 32) for B in (1, 8, 64)]
    return prefill + chunks + decode + [decode_case(1, 8192, 32, slots=200_000), decode_case(1, 65536, 32)]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a case was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write a JSON here")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    print(ceilings)
    records = run_cases([case for case in cases() if options.only in case.name], ceilings)
    if options.output:
        command = "python -m indexcache.benchmarks.kernels.lightning_indexer"
        write_json(options.output, command, ceilings, records)
    return int(any("wrong" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
