"""Benchmark of every kernel group in one run: each case checked first, then timed beside the ceilings of this machine.

    python -m indexcache.benchmarks.kernels.kernels --output benchmarks/results/kernels.json \
        --checkpoint demo/dsa_demo --windows demo/sample_windows.safetensors

`--checkpoint` adds sparse MLA on the selections that a trained model makes on real text, with how much of a query's
selection its neighbour shares and how large the union of three neighbours is.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ...conversion.io.load_source import load_source
from . import distillation, lightning_indexer, sparse_mla
from .harness import Case, measure_ceilings, run_cases, write_json

GROUPS = {
    "lightning_indexer": lightning_indexer.cases,
    "sparse_mla": sparse_mla.cases,
    "distillation": distillation.cases,
}


@torch.inference_mode()
def captured_selections(checkpoint: Path, windows: Path) -> dict[int, torch.Tensor]:
    """For each full layer int32 `[S, K]`: what its indexer selects on the first window, full rows only."""
    tensors = load_file(windows)
    ids = next(value for name, value in tensors.items() if name.endswith("ids"))[:1].long()
    model = load_source(checkpoint, dtype=torch.bfloat16).cuda().eval()
    outputs = model(ids.cuda(), output_topk_indices=True, logits_to_keep=1)
    layers = model.config.share_pattern.full_layers
    topk = model.config.index_topk
    return {layer: indices[0, topk:].contiguous() for layer, indices in zip(layers, outputs.topk_indices)}


def sharing(indices: torch.Tensor) -> dict[str, float]:
    """The share of a query's keys that the one before selected too, and the union of three queries in lists."""
    S, K = indices.shape
    chosen = torch.zeros(S, int(indices.max()) + 1, dtype=torch.bool, device=indices.device)
    chosen.scatter_(1, indices.long(), True)
    union = chosen[:-2] | chosen[1:-1] | chosen[2:]
    return {
        "neighbour_overlap": float((chosen[1:] & chosen[:-1]).sum() / (K * (S - 1))),
        "union_of_3": float(union.sum() / (K * (S - 2))),
    }


def captured_inputs(indices: torch.Tensor, H: int) -> tuple:
    """Random q `[1, S, H, 576]` and latents in bf16, with captured indices `[1, S, K]`."""
    draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    keys = int(indices.max()) + 1
    return draw(1, indices.shape[0], H, sparse_mla.WIDTH), draw(1, keys, sparse_mla.WIDTH), indices.unsqueeze(0)


def captured_cases(checkpoint: Path, windows: Path, H: int = 20) -> list[Case]:
    """Sparse MLA of H heads on a trained model's selections, layer by layer."""
    flops_a_key = 2.0 * H * (sparse_mla.WIDTH + sparse_mla.VALUE_DIM)
    return [
        Case(
            f"sparse MLA H={H}, {checkpoint.name} layer {layer}",
            partial(captured_inputs, indices, H),
            sparse_mla.attend,
            sparse_mla.wrong,
            flops=flops_a_key * indices.numel(),
            info={"H": H, "indices": f"{checkpoint.name} layer {layer}", **sharing(indices)},
        )
        for layer, indices in captured_selections(checkpoint, windows).items()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a case was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--checkpoint", type=Path, help="a trained checkpoint to capture selections from")
    parser.add_argument("--windows", type=Path, help="safetensors with an ..ids tensor [N, L], for --checkpoint")
    parser.add_argument("--output", type=Path, help="write a JSON here, anew after every case")
    options = parser.parse_args(arguments)
    if bool(options.checkpoint) != bool(options.windows):
        parser.error("--checkpoint and --windows go together")
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    print(ceilings, flush=True)
    groups = {name: GROUPS[name]() for name in options.groups if name != "distillation"}
    if options.checkpoint:
        groups["captured"] = captured_cases(options.checkpoint, options.windows)
    if "distillation" in options.groups:
        groups["distillation"] = distillation.cases()
    records: list[dict[str, Any]] = []
    for name, cases in groups.items():
        for case in cases:
            if options.only not in case.name:
                continue
            records += [{"group": name, **record} for record in run_cases([case], ceilings)]
            if options.output:
                write_json(options.output, "python -m indexcache.benchmarks.kernels.kernels", ceilings, records)
    return int(any("wrong" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
