"""Block fp8 kernels at DeepSeek-V3.2's shapes: checked against PyTorch, then timed beside bf16 and cuBLAS.

    python -m indexcache.benchmarks.kernels.block_fp8 --output benchmarks/results/block_fp8.json

Products of many rows are timed with the quantisation of their activations and without; `cuBLAS` is `torch._scaled_mm`
with the same blocks, where this torch has it. Matrix-vector cases take several layers in turn, so that none is in L2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...kernels.block_fp8.block_fp8_activations_triton import quantise_activations_triton
from ...kernels.block_fp8.block_fp8_experts import block_fp8_experts
from ...kernels.block_fp8.block_fp8_format import dequantise, scale_grid
from ...kernels.block_fp8.block_fp8_linear import WIDENED_TOKENS, block_fp8_linear, block_fp8_vector_linear
from ...kernels.block_fp8.block_fp8_linear_triton import multiply
from ...kernels.block_fp8.block_fp8_reference import linear_reference, quantise_activations
from ...kernels.common.dispatch import no_fallback
from ...kernels.experts.routed_experts import routed_experts
from ...kernels.norm_rope_linear.vector_linear import vector_linear
from .block_fp8_inputs import (
    ACTIVE,
    BEYOND_L2,
    CHECKED_ROWS,
    EXPERTS,
    HIDDEN,
    INNER,
    PROJECTIONS,
    ExpertWeights,
    Matrix,
    make_tokens,
    matrix,
    rows,
)
from .block_fp8_tuning import tune
from .harness import Case, measure_ceilings, run_cases, write_json

# Relative rms: bf16's rounding, and what e4m3 products lose on tensor cores.
CLOSE = 0.005
# The same of experts, whose activations are quantised in between: a rounding's difference may become a step.
CLOSE_EXPERTS = 0.012


def as_quantised(x: torch.Tensor, is_quantised: bool) -> torch.Tensor:
    """`x` in fp32 as the kernels multiply it."""
    if not is_quantised:
        return x.float()
    values, factors = quantise_activations(x)
    return values.float() * factors.repeat_interleave(128, 1)[:, : x.shape[1]]


def difference(got: torch.Tensor, expected: torch.Tensor, limit: float = CLOSE) -> str | None:
    """What is wrong with a result, if its relative rms error is above the limit."""
    error = ((got.float() - expected).square().mean() / expected.square().mean()).sqrt().item()
    return None if error <= limit else f"relative rms error {error:.4f}, above {limit}"


def ours(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Quantisation of the activations included where there is one."""
    return block_fp8_linear(x, weight, scales)


def prequantised(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The product of rows that were quantised before."""
    values, factors = _quantised[id(x)]
    return multiply(values, factors, weight, scales, None, x.new_empty(x.shape[0], weight.shape[0]))


def cublas(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """By cuBLAS, activations scaled by 1 x 128 and weights by 128 x 128, quantised before."""
    values, factors = _quantised[id(x)]
    by_column = _padded[id(scales)].t()
    return torch._scaled_mm(values, weight.t(), factors, by_column, out_dtype=torch.bfloat16)


def bf16(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """A product with the dequantised weight."""
    return torch.matmul(x, _wide[id(weight)].t())


# Made with the inputs, and kept for as long as these are: what a way of multiplying needs beside them.
_quantised: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
_padded: dict[int, torch.Tensor] = {}
_wide: dict[int, torch.Tensor] = {}
WAYS: dict[str, Callable[..., torch.Tensor]] = {
    "fp8": ours,
    "fp8, prequantised": prequantised,
    "cuBLAS fp8, prequantised": cublas,
    "bf16": bf16,
}


def make_product(way: str, tokens: int, width: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of one product."""
    x, (weight, scales) = rows(tokens, width), matrix(outputs, width)
    if "prequantised" in way:
        _quantised[id(x)] = quantise_activations_triton(x)
    if way.startswith("cuBLAS"):
        # Rows of scales at multiples of 16 bytes.
        padded = F.pad(scales, (0, -scales.shape[1] % 4))
        _padded[id(scales)] = padded[:, : scales.shape[1]]
    if way == "bf16":
        _wide[id(weight)] = dequantise(weight, scales)
    return x, weight, scales


def check_product(way: str, inputs: tuple) -> str | None:
    """Against PyTorch on some rows."""
    x, weight, scales = inputs
    try:
        got = WAYS[way](x, weight, scales)[-CHECKED_ROWS:]
    except (RuntimeError, ValueError) as error:
        if not way.startswith("cuBLAS"):
            raise
        return f"not here: {str(error).splitlines()[0]}"
    narrow = way != "bf16" and x.shape[0] > WIDENED_TOKENS
    expected = linear_reference(as_quantised(x[-CHECKED_ROWS:], narrow), weight, scales)
    return difference(got, expected)


def forget() -> None:
    """Free what was made beside inputs."""
    for made in (_quantised, _padded, _wide):
        made.clear()


def product_cases() -> list[Case]:
    """Many rows."""
    found = []
    for tokens in (4096, 8192):
        for name, (width, outputs) in PROJECTIONS.items():
            for way in WAYS:
                if way == "cuBLAS fp8, prequantised" and outputs % 128:
                    continue
                found.append(
                    Case(
                        f"{name}, {tokens} rows, {way}",
                        partial(make_product, way, tokens, width, outputs),
                        WAYS[way],
                        partial(check_product, way),
                        flops=2.0 * tokens * width * outputs,
                        matmul="bf16_tflops" if way == "bf16" else "fp8_tflops",
                        copies=1,
                        info={"tokens": tokens, "way": way},
                    )
                )
    return found


def make_layers(tokens: int, width: int, outputs: tuple[int, ...], wide: bool) -> tuple:
    """Activations, and as many layers of several weights each as L2 cannot hold."""
    size = width * sum(outputs) * (2 if wide else 1)
    layers = [[matrix(n, width) for n in outputs] for _ in range(max(2, -(-BEYOND_L2 // size)))]
    made: Any = [[dequantise(*m) for m in layer] for layer in layers] if wide else layers
    return rows(tokens, width), made


def run_layers(x: torch.Tensor, layers: list) -> torch.Tensor:
    """Each layer's outputs in turn; the last one's."""
    out = x
    for layer in layers:
        if isinstance(layer[0], torch.Tensor):
            out = vector_linear(x, layer) if x.shape[0] <= 2 else torch.cat([F.linear(x, w) for w in layer], 1)
        elif x.shape[0] <= 2:
            out = block_fp8_vector_linear(x, [weight for weight, _ in layer], [scales for _, scales in layer])
        else:
            for weight, scales in layer:
                out = block_fp8_linear(x, weight, scales)
    return out


def check_layers(inputs: tuple) -> str | None:
    """The last layer against PyTorch."""
    x, layers = inputs
    last = layers[-1]
    if isinstance(last[0], torch.Tensor):
        expected = torch.cat([F.linear(x.float(), weight.float()) for weight in last], 1)
    else:
        matrices = last if x.shape[0] <= 2 else last[-1:]
        expected = torch.cat([linear_reference(x.float(), *m) for m in matrices], 1)
    return difference(run_layers(x, layers), expected)


def vector_cases() -> list[Case]:
    """Few rows."""
    found = []
    shapes = {name: (width, (outputs,)) for name, (width, outputs) in PROJECTIONS.items() if name != "kv_a_proj"}
    shapes = {"q_a_proj and kv_a_proj": (HIDDEN, (1536, 576)), **shapes}
    few = {name: shapes[name] for name in ("q_a_proj", "o_proj", "gate_proj (dense)")}
    cases = [(1, False, shapes), (1, True, few), (2, False, few), (4, False, few), (16, False, few), (32, False, few)]
    for tokens, wide, named in cases:
        for name, (width, outputs) in named.items():
            size = width * sum(outputs) * (2 if wide else 1)
            scales = 0 if wide else sum(4 * a * b for a, b in (scale_grid(n, width, (128, 128)) for n in outputs))
            layers = max(2, -(-BEYOND_L2 // size))
            found.append(
                Case(
                    f"{name}, {tokens} rows, {'bf16' if wide else 'fp8'}",
                    partial(make_layers, tokens, width, outputs, wide),
                    run_layers,
                    check_layers,
                    bytes=float(layers * (size + scales)),
                    copies=1,
                    graph=True,
                    info={"tokens": tokens, "layers": layers},
                )
            )
    return found


def run_experts(weights: ExpertWeights, wide: bool, x: torch.Tensor, chosen: torch.Tensor, mix: torch.Tensor) -> Any:
    """Routed and shared experts."""
    if wide:
        gate_up, down, shared = weights.bf16()
        return routed_experts(x, chosen, mix, gate_up, down, shared=shared)
    of_fp8 = weights.fp8()
    return block_fp8_experts(x, chosen, mix, of_fp8[0], of_fp8[1], shared=of_fp8[2])


def check_experts(weights: ExpertWeights, wide: bool, inputs: tuple) -> str | None:
    """Some tokens against PyTorch, of quantised activations where the kernels have such."""
    x, chosen, mix = inputs
    gate_up, down, shared = weights.fp8()
    some = slice(0, 6)
    tokens = x.shape[0]
    narrow = not wide and tokens * ACTIVE > WIDENED_TOKENS * EXPERTS
    shared_narrow = not wide and tokens > WIDENED_TOKENS

    def expert(row: torch.Tensor, gate: Matrix, up: Matrix, last: Matrix, quantised: bool) -> torch.Tensor:
        row = as_quantised(row, quantised)
        # Rounded where the kernels do: e4m3 makes a step of what a rounding moves, 1.4 to 1.7 % of the result.
        hidden = F.silu(linear_reference(row, *gate).bfloat16()) * linear_reference(row, *up).bfloat16()
        return linear_reference(as_quantised(hidden, quantised), *last)

    expected = expert(x[some], *shared, shared_narrow)
    for token in range(expected.shape[0]):
        for index, weight in zip(chosen[token].tolist(), mix[token].tolist()):
            gate, up = zip(gate_up[0][index].chunk(2), gate_up[1][index].chunk(2))
            made = expert(x[token : token + 1], gate, up, (down[0][index], down[1][index]), narrow)
            expected[token] += weight * made[0]
    return difference(run_experts(weights, wide, *inputs)[some], expected, CLOSE_EXPERTS)


def expert_cases() -> list[Case]:
    """A layer of experts: one step of 1, 4 and 32 sequences, and prefill."""
    weights, found = ExpertWeights(), []
    one = 3.0 * INNER * HIDDEN
    for wide in (False, True):
        for tokens in (1, 4, 32, 512, 4096, 8192):
            read = EXPERTS * (1 - (1 - ACTIVE / EXPERTS) ** tokens) if tokens > 4 else tokens * ACTIVE
            found.append(
                Case(
                    f"experts, {tokens} tokens, {'bf16' if wide else 'fp8'}",
                    partial(make_tokens, tokens),
                    partial(run_experts, weights, wide),
                    partial(check_experts, weights, wide),
                    flops=2.0 * tokens * (ACTIVE + 1) * one,
                    matmul="bf16_tflops" if wide else "fp8_tflops",
                    bytes=(read + 1) * one * (2 if wide else 1),
                    # Other tokens, other experts: together more than L2 holds.
                    copies=4 if tokens <= 32 else 1,
                    graph=tokens <= 32,
                    info={"tokens": tokens, "experts_read": round(read, 1)},
                )
            )
    return found


GROUPS = {"products": product_cases, "vectors": vector_cases, "experts": expert_cases}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a case was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--output", type=Path, help="write a JSON here, anew after every case")
    parser.add_argument("--tune", action="store_true", help="time candidates against each other instead")
    parser.add_argument("--seconds", type=float, default=150.0, help="with --tune: begin no candidate after so many")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    print(ceilings, flush=True)
    if options.tune:
        with torch.inference_mode():
            return tune(options.seconds, options.output, ceilings, options.only)
    records: list[dict[str, Any]] = []
    with no_fallback(), torch.inference_mode():
        for name in options.groups:
            for case in GROUPS[name]():
                if options.only in case.name:
                    records += [{"group": name, **record} for record in run_cases([case], ceilings)]
                    forget()
                    if options.output:
                        write_json(
                            options.output, "python -m indexcache.benchmarks.kernels.block_fp8", ceilings, records
                        )
    return int(any("wrong" in record and not record["wrong"].startswith("not here") for record in records))


if __name__ == "__main__":
    sys.exit(main())
