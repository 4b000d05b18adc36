"""How exact are products of e4m3 rows on this GPU's tensor cores? Against fp64 on the same values.

    python -m indexcache.benchmarks.kernels.e4m3_products --output benchmarks/results/e4m3_products_h100.json

Random indexer queries and keys of 128 columns, quantised as `indexer_fp8` does. Multiplied by one chain of tensor-core
instructions, as the Hopper indexer does, by such a chain that adds to fp32 registers every 32 columns, and by cuBLAS
with and without its fast accumulation; and by `accumulator_model`, which says in arithmetic what an H100 does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from ...kernels.lightning_indexer.indexer_quantization import quantize_for_scoring
from ...runs.versions import stamp
from .lightning_indexer import make_inputs


@triton.jit
def _multiply(q, k, out, T, H: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, IMPRECISE: tl.constexpr):
    key, head, column = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, H), tl.arange(0, D)
    keys = tl.load(k + key[:, None] * D + column[None, :], mask=key[:, None] < T, other=0.0)
    queries = tl.load(q + head[None, :] * D + column[:, None])
    products = tl.dot(keys, queries, max_num_imprecise_acc=IMPRECISE)
    tl.store(out + key[:, None] * H + head[None, :], products, mask=key[:, None] < T)


def tensor_core_chain(q: torch.Tensor, k: torch.Tensor, imprecise: int) -> torch.Tensor:
    """e4m3 `q [H, D]` and `k [T, D]` to fp32 `[T, H]`, added up in fp32 registers every `imprecise` columns."""
    out = torch.empty(k.shape[0], q.shape[0], device=q.device)
    _multiply[(triton.cdiv(k.shape[0], 128),)](q, k, out, k.shape[0], *q.shape, 128, imprecise)
    return out


def accumulator_model(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """e4m3 `q [H, D]` and `k [T, D]`, D a multiple of 32, to `[T, H]` in fp64, as Hopper's tensor cores give them.

    An instruction adds 32 products to the sum so far: all are cut, towards zero, 13 bits below the largest exponent
    among them (a product's is that of its factors added), and the new sum keeps 13 bits behind its first.
    """
    total = torch.zeros(k.shape[0], q.shape[0], dtype=torch.float64, device=q.device)
    for columns in torch.arange(q.shape[1], device=q.device).split(32):
        left, right = k[:, None].double()[..., columns], q[None].double()[..., columns]
        products = left * right
        exponents = (_exponent(left) + _exponent(right)).masked_fill(products == 0, -1000).amax(-1)
        last_bit = torch.exp2(torch.maximum(exponents, _exponent(total, -1000)).double() - 13)
        total = (torch.trunc(products / last_bit.unsqueeze(-1)).sum(-1) + torch.trunc(total / last_bit)) * last_bit
        kept = torch.exp2(_exponent(total, -1000).double() - 13)
        total = torch.where(total == 0, total, torch.trunc(total / kept) * kept)
    return total


def _exponent(x: torch.Tensor, least: int = -6) -> torch.Tensor:
    """Exponents of the first bit of `x`, at least `least` (e4m3's own for subnormal values); -1000 for zero."""
    return torch.where(x == 0, -1000, (torch.frexp(x)[1] - 1).clamp(min=least))


def errors(found: torch.Tensor, exact: torch.Tensor, sizes: torch.Tensor) -> dict[str, float]:
    """Of products `[T, H]`: the rms error over the products' rms, and the worst over the sum of absolute terms."""
    error = found.double() - exact
    return {
        "rms_error_of_rms": float((error.square().mean() / exact.square().mean()).sqrt()),
        "worst_of_sum_of_absolute_terms": float((error.abs() / sizes).max()),
    }


def measure(seed: int, keys: int = 65536, heads: int = 32) -> dict[str, Any]:
    """Errors by way of multiplying, and the share of products that are the chain's to the bit."""
    torch.manual_seed(seed)
    q, k, _ = make_inputs(1, 1, keys, heads)
    q8, k8 = quantize_for_scoring(q)[0][0, 0], quantize_for_scoring(k)[0][0]
    exact, sizes = k8.double() @ q8.double().t(), k8.double().abs() @ q8.double().abs().t()
    one = torch.ones((), device=q.device)
    ways = {f"chain of {columns} columns": tensor_core_chain(q8, k8, columns) for columns in (q8.shape[1], 32)}
    for fast in (True, False):
        ways[f"cuBLAS, {'fast' if fast else 'precise'} accumulation"] = torch._scaled_mm(
            k8, q8.t(), one, one, out_dtype=torch.float32, use_fast_accum=fast
        )
    ways["accumulator_model"] = torch.cat([accumulator_model(q8, part) for part in k8.split(4096)])
    chain = ways[f"chain of {q8.shape[1]} columns"]
    return {
        "seed": seed,
        "errors": {name: errors(found, exact, sizes) for name, found in ways.items()},
        "same_bits_as_the_chain": {
            name: bool(torch.equal(found.double(), chain.double())) for name, found in ways.items()
        },
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = [measure(seed) for seed in range(arguments.seeds)]
    for one in found:
        print(one, flush=True)
    if arguments.output:
        document = {
            "machine": stamp(),
            "command": "python -m indexcache.benchmarks.kernels.e4m3_products",
            "runs": found,
        }
        arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
