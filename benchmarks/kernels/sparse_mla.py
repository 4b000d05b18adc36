"""Benchmark of sparse MLA: prefill of 4,096 queries at 200K tokens and decode steps, each checked against fp64 first.

python -m indexcache.benchmarks.kernels.sparse_mla --output benchmarks/results/sparse_mla.json

Index sets: `near` (adjacent queries share 97 % of their keys) and `rand` (uniform, nothing shared but by chance), both
ascending as the indexer emits them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ...kernels.sparse_mla.sparse_mla import sparse_mla
from ...kernels.sparse_mla.sparse_mla_union_triton import merge_key_lists
from .harness import Case, measure_ceilings, run_cases, write_json

TOPK, VALUE_DIM, ROPE_DIM = 2048, 512, 64
WIDTH = VALUE_DIM + ROPE_DIM
SCALE = 192**-0.5


def near_indices(S: int, T: int, K: int = TOPK, kept: float = 0.97) -> torch.Tensor:
    """int32 `[S, K]`, ascending: a query keeps each key of the one before it with probability `kept`."""
    stratum = T // K
    fresh = torch.randint(stratum, (S, K), device="cuda")
    changed = torch.rand(S, K, device="cuda") > kept
    changed[0] = True
    since = torch.where(changed, torch.arange(S, device="cuda")[:, None], 0).cummax(0).values
    return (fresh.gather(0, since) + torch.arange(K, device="cuda") * stratum).int()


def random_indices(S: int, T: int, K: int = TOPK) -> torch.Tensor:
    """int32 `[S, K]`, ascending: K of T keys, uniformly."""
    blocks = [torch.rand(min(256, S - i), T, device="cuda").topk(K).indices.sort(-1).values for i in range(0, S, 256)]
    return torch.cat(blocks).int()


def make_inputs(B: int, S: int, T: int, H: int, indices: Callable[[int, int], torch.Tensor]) -> tuple:
    """Random q `[B, S, H, 576]`, kv `[B, T, 576]` in bf16 and the indices `[B, S, 2048]`."""
    q = torch.randn(B, S, H, WIDTH, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(B, T, WIDTH, device="cuda", dtype=torch.bfloat16)
    return q, kv, indices(B * S, T).view(B, S, TOPK)


def attend(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The function timed."""
    return sparse_mla(q, kv, indices, scale=SCALE, value_dim=VALUE_DIM)


def wrong(inputs: tuple, rows: int = 24, repeats: int = 10) -> str | None:
    """What is wrong with some rows, judged in fp64 against the error of a bf16 PyTorch version; None if nothing is."""
    q, kv, indices = inputs
    out, lse = attend(q, kv, indices)
    for _ in range(repeats):
        again = attend(q, kv, indices)
        if not (torch.equal(out, again[0]) and torch.equal(lse, again[1])):
            return "two runs differ"
    B, S = q.shape[:2]
    picked = torch.randperm(B * S, device="cuda")[:rows]
    gathered = torch.stack([kv[i // S, indices[i // S, i % S].long()] for i in picked.tolist()])
    queries = q.flatten(0, 1)[picked]

    def softmax_of(keys: torch.Tensor, queries: torch.Tensor, dtype: torch.dtype) -> tuple:
        scores = (queries @ keys.transpose(1, 2)).to(dtype) * SCALE
        return scores.softmax(-1).to(keys.dtype) @ keys[..., :VALUE_DIM], scores.logsumexp(-1)

    exact, exact_lse = softmax_of(gathered.double(), queries.double(), torch.float64)
    plain, _ = softmax_of(gathered, queries, torch.float32)
    ours = out.flatten(0, 1)[picked].double()
    error, allowed = (ours - exact).norm() / exact.norm(), 1.5 * (plain - exact).norm() / exact.norm()
    if not error <= allowed:
        return f"error {error:.2e} above 1.5x that of bf16 PyTorch, {allowed:.2e}"
    lse_error = (lse.flatten(0, 1)[picked] - exact_lse).abs().max()
    return None if lse_error < 1e-3 else f"lse is off by {lse_error:.2e}"


def cases() -> list[Case]:
    """Prefill chunks by heads and index set, the merging of key lists, and decode steps by heads and batch."""
    found = []
    S, T = 4096, 200_000
    for name, indices in (("near", near_indices), ("rand", random_indices)):
        for H in (8, 16, 20, 32, 64, 128):
            found.append(
                Case(
                    f"prefill {name} S={S} L=200K H={H}",
                    partial(make_inputs, 1, S, T, H, indices),
                    attend,
                    wrong,
                    flops=2.0 * H * (WIDTH + VALUE_DIM) * TOPK * S,
                    info={"H": H, "indices": name},
                )
            )
        merge = lambda q, kv, indices: merge_key_lists(indices, 3, T)
        found.append(Case(f"merge lists of 3 queries, {name}", partial(make_inputs, 1, S, T, 1, indices), merge))
    for H in (20, 64, 128):
        for B in (1, 8, 64):
            found.append(
                Case(
                    f"decode B={B} L=200K H={H}",
                    partial(make_inputs, B, 1, T if B == 1 else T // 8, H, random_indices),
                    attend,
                    wrong,
                    bytes=2.0 * B * TOPK * WIDTH,
                    graph=True,
                    info={"H": H, "B": B},
                )
            )
    return found


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
        write_json(options.output, "python -m indexcache.benchmarks.kernels.sparse_mla", ceilings, records)
    return int(any("wrong" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
