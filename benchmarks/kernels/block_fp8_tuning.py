"""Tiles, splits and ways of the block fp8 kernels at DeepSeek-V3.2's shapes, timed against each other on one GPU.

    python -m indexcache.benchmarks.kernels.block_fp8 --tune --output benchmarks/results/block_fp8_tuning.json

Every candidate is checked before it is timed; after `--seconds` no further one begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...kernels.block_fp8.block_fp8_activations_triton import quantise_activations_triton
from ...kernels.block_fp8.block_fp8_experts import block_fp8_experts_reference, experts_by_group
from ...kernels.block_fp8.block_fp8_experts_pieces_triton import DOWN, UP, experts_in_pieces
from ...kernels.block_fp8.block_fp8_experts_triton import Tiles, grouped_experts
from ...kernels.block_fp8.block_fp8_linear_cublas import block_fp8_linear_cublas, multiply_by_cublas, why_not_cublas
from ...kernels.block_fp8.block_fp8_linear_triton import block_fp8_linear_triton
from ...kernels.block_fp8.block_fp8_pieces_triton import linear_in_pieces
from ...kernels.block_fp8.block_fp8_reference import linear_reference, quantised_linear_reference
from ...kernels.block_fp8.block_fp8_vector_triton import block_fp8_experts_vector, block_fp8_vector_linear_triton
from ...kernels.common.early_launch import early_launches
from ...kernels.experts.routed_experts import group_by_expert
from .block_fp8_inputs import (
    ACTIVE,
    BEYOND_L2,
    CHECKED_ROWS,
    EXPERTS,
    HIDDEN,
    INNER,
    PROJECTIONS,
    ExpertWeights,
    make_tokens,
    matrix,
    rows,
)
from .harness import captured, median_ms, write_json

COMMAND = "python -m indexcache.benchmarks.kernels.block_fp8 --tune"
PROCESSORS = 132
Times = dict[str, Any]


@dataclass
class Tuning:
    """Candidates that were timed, until the time is over.

    Attributes:
        until: of `time.monotonic`.
        output: file for the records, or None.
        ceilings: as `harness.measure_ceilings` has them.
        records: what was timed.
    """

    until: float
    output: Path | None
    ceilings: dict[str, float]
    records: list[Times] = field(default_factory=list)

    def best(
        self,
        case: str,
        candidates: Iterable[tuple[str, Callable[[], list[Callable[[], torch.Tensor]]]]],
        error: Callable[[torch.Tensor], float],
        limit: float,
        amount: float,
        unit: str,
        graph: bool,
    ) -> str | None:
        """The name of the fastest candidate of a case; of each the first call is checked."""
        times: dict[str, float] = {}
        for name, make in candidates:
            if time.monotonic() > self.until:
                print(f"{case}: out of time before {name}", flush=True)
                break
            record: Times = {"case": case, "name": name}
            try:
                calls = make()
                record["error"] = error(calls[0]())
                if not record["error"] <= limit:
                    record["wrong"] = f"relative rms error {record['error']:.5f}, above {limit}"
                else:
                    timed = [captured(call) for call in calls] if graph else calls
                    record |= median_ms(timed, budget_ms=60.0)
                    record[unit] = amount / record["ms"] / 1e9
                    times[name] = record["ms"]
            except Exception as problem:
                # A candidate that cannot be compiled here is a result, too.
                record["wrong"] = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
            rate = f"{record[unit]:8.2f} {unit} {record['ms']:.4f} ms" if unit in record else record["wrong"]
            print(f"{case:<34} {name:<34} {rate}  error {record.get('error', float('nan')):.5f}", flush=True)
            self.records.append(record)
        if self.output:
            write_json(
                self.output, "python -m indexcache.benchmarks.kernels.block_fp8 --tune", self.ceilings, self.records
            )
        if not times:
            return None
        found = min(times, key=times.__getitem__)
        print(f"BEST {case}: {found} ({times[found]:.4f} ms)", flush=True)
        return found


def relative(expected: torch.Tensor, some: slice, got: torch.Tensor) -> float:
    """Relative rms error of some rows."""
    part = got[some].double()
    return ((part - expected).square().mean() / expected.square().mean()).sqrt().item()


def listed(call: Callable[..., torch.Tensor], *arguments: Any) -> list[Callable[[], torch.Tensor]]:
    """One call, with its arguments."""
    return [partial(call, *arguments)]


def tune_products(tuning: Tuning) -> None:
    """Products of many rows by cuBLASLt, quantisation included and not, beside ours."""
    for tokens in (4096, 16384):
        for name, (width, outputs) in PROJECTIONS.items():
            x, (weight, scales) = rows(tokens, width), matrix(outputs, width)
            reason = why_not_cublas(x, weight, scales)
            print(f"{name}: cuBLASLt {reason or 'takes it'}", flush=True)
            if reason is not None:
                continue
            some = slice(-CHECKED_ROWS, None)
            expected = quantised_linear_reference(x[some].double(), weight, scales)
            quantised = quantise_activations_triton(x)
            candidates = {
                "cuBLASLt": partial(block_fp8_linear_cublas, x, weight, scales, None, None),
                "cuBLASLt, prequantised": partial(multiply_by_cublas, *quantised, weight, scales, None, None, tokens),
                "Triton": partial(block_fp8_linear_triton, x, weight, scales, None, None, True),
            }
            ways = [(way, partial(listed, call)) for way, call in candidates.items()]
            tuning.best(
                f"{name}, {tokens} rows",
                ways,
                partial(relative, expected, some),
                0.005,
                2.0 * tokens * width * outputs,
                "tflops",
                False,
            )
            alone = median_ms([partial(quantise_activations_triton, x)], budget_ms=30.0)["ms"]
            print(f"{name}, {tokens} rows: quantisation {alone:.4f} ms", flush=True)
            tuning.records.append({"case": f"{name}, {tokens} rows", "name": "quantisation", "ms": alone})
    # Rows that are no multiple of four, a base, and an output that is one.
    x, (weight, scales) = rows(4099, HIDDEN), matrix(1536, HIDDEN)
    base = rows(4099, 1536)
    exact = quantised_linear_reference(x[-48:].double(), weight, scales) + base[-48:].double()
    out = base.clone()
    for label, got in {
        "base": block_fp8_linear_cublas(x, weight, scales, base, None),
        "base and out": block_fp8_linear_cublas(x, weight, scales, out, out),
    }.items():
        print(f"4099 rows, {label}: error {relative(exact, slice(-48, None), got):.5f}", flush=True)


def tune_vectors(tuning: Tuning) -> None:
    """Linear layers of one, two and four rows."""
    for name in ("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj", "gate_proj (dense)"):
        width, outputs = PROJECTIONS[name]
        layers = [matrix(outputs, width) for _ in range(max(2, -(-BEYOND_L2 // (width * outputs))))]
        for tokens in (1, 16):
            x = rows(tokens, width)
            exact = linear_reference(x.double(), *layers[0])
            # What is checked is the first layer, which comes last.
            turn = layers[1:] + layers[:1]

            def in_turn(call: Callable[..., torch.Tensor], turn: list = turn) -> list[Callable[[], torch.Tensor]]:
                return [lambda: [call(*layer) for layer in turn][-1]]

            def pieces(splits: int | None, stages: int, tile: int | None, weight, scales, x=x) -> torch.Tensor:
                return linear_in_pieces(x, [weight], [scales], splits=splits, rows=tile, stages=stages)

            def early_pieces(weight, scales, x=x) -> torch.Tensor:
                with early_launches(x.device):
                    return linear_in_pieces(x, [weight], [scales])

            def vector(weight, scales, x=x) -> torch.Tensor:
                return block_fp8_vector_linear_triton(x, [weight], [scales])

            def tiles(weight, scales, x=x) -> torch.Tensor:
                return block_fp8_linear_triton(x, weight, scales, None, None, False)

            calls: dict[str, Callable[..., torch.Tensor]] = {"vector": vector} if tokens <= 4 else {"tiles": tiles}
            calls["pieces as chosen"] = partial(pieces, None, 4, None)
            calls["pieces as chosen, early"] = early_pieces
            for tile, stages in ((64, 3), (64, 4), (128, 3), (128, 4)):
                for splits in (1, 2, 4, 8, 16):
                    programs = splits * outputs // tile
                    if splits == 1 or (programs <= 6 * PROCESSORS and width // 128 // splits >= 3):
                        calls[f"pieces {tile} stages {stages} splits {splits}"] = partial(pieces, splits, stages, tile)
            tuning.best(
                f"{name}, {tokens} rows",
                [(way, partial(in_turn, call)) for way, call in calls.items()],
                partial(relative, exact, slice(None)),
                0.005,
                float(len(layers) * width * outputs),
                "tbs",
                True,
            )


def tune_expert_vectors(tuning: Tuning, weights: ExpertWeights) -> None:
    """Experts of one, two and four tokens."""
    gate_up, down, shared = weights.fp8()
    for tokens in (1, 2, 4):
        inputs = [make_tokens(tokens) for _ in range(4)]
        exact = exact_experts(*inputs[0], gate_up, down, shared)

        def vector(x, chosen, mix) -> torch.Tensor:
            return block_fp8_experts_vector(x, chosen, mix, gate_up, down, shared, None)

        def pieces(up: tuple[int, int, int], last: tuple[int, int, int], x, chosen, mix) -> torch.Tensor:
            return experts_in_pieces(x, chosen, mix, gate_up, down, shared, None, None, up, last)

        def early(x, chosen, mix) -> torch.Tensor:
            with early_launches(x.device):
                return experts_in_pieces(x, chosen, mix, gate_up, down, shared, None)

        def grouped(x, chosen, mix) -> torch.Tensor:
            out = torch.empty_like(x)
            experts_by_group(x, chosen, mix, gate_up, down, shared, None, out)
            return out

        def each(call: Callable[..., torch.Tensor], inputs: list = inputs) -> list[Callable[[], torch.Tensor]]:
            return [partial(call, *one) for one in inputs]

        run = partial(
            tuning.best,
            error=partial(relative, exact, slice(None)),
            limit=0.012,
            amount=(tokens * ACTIVE + 1) * 3.0 * INNER * HIDDEN,
            unit="tbs",
            graph=True,
        )
        ups = {f"pieces up {up}": up for up in (UP, (64, 4, 2), (128, 4, 2), (128, 8, 2))}
        found = run(
            f"experts, {tokens} tokens: up",
            [("vector", partial(each, vector)), ("grouped", partial(each, grouped)), ("early", partial(each, early))]
            + [(name, partial(each, partial(pieces, up, DOWN))) for name, up in ups.items()],
        )
        up = ups.get(found or "", UP)
        lasts = {f"pieces down {last}": last for last in (DOWN, (64, 4, 3), (128, 4, 3), (128, 8, 3))}
        run(
            f"experts, {tokens} tokens: down",
            [(name, partial(each, partial(pieces, up, last))) for name, last in lasts.items()],
        )


def exact_experts(x, chosen, mix, gate_up, down, shared) -> torch.Tensor:
    """In fp64, on the experts that are read."""
    used, index = chosen.unique(return_inverse=True)
    part = tuple((weight[used], scales[used]) for weight, scales in (gate_up, down))
    return block_fp8_experts_reference(x.double(), index, mix, *part, shared)


def tune_grouped(tuning: Tuning, weights: ExpertWeights) -> None:
    """Routed experts of many tokens, quantised, without the shared one and the sum over experts."""
    gate_up, down, _ = weights.fp8()
    for tokens in (1280, 4096, 16384):
        x, chosen, _ = make_tokens(tokens)
        place, ends = group_by_expert(chosen, EXPERTS, tokens)
        quantised = quantise_activations_triton(x)
        exact = exact_pairs(x[:4], chosen[:4], gate_up, down, torch.bfloat16)
        unrounded = exact_pairs(x[:4], chosen[:4], gate_up, down, torch.float64)
        apart = relative(unrounded, slice(None), exact)
        print(f"rounding what stands between both products moves the result by {apart:.5f}", flush=True)
        first = place[:4].reshape(-1)

        def run(
            first_tiles: Tiles, second_tiles: Tiles, hopper: bool, x=x, quantised=quantised, place=place, ends=ends
        ):
            def tiles_of(*_: Any) -> tuple[Tiles, Tiles]:
                return first_tiles, second_tiles

            return grouped_experts(x, quantised, place, ends[0], gate_up, down, tiles_of, hopper)

        def error(got: torch.Tensor, exact=exact, first=first) -> float:
            return relative(exact, slice(None), got[first])

        best = partial(
            tuning.best,
            error=error,
            limit=0.02,
            amount=2.0 * tokens * ACTIVE * 3.0 * INNER * HIDDEN,
            unit="tflops",
            graph=False,
        )
        small, large = Tiles(64, 128, 8, 4), Tiles(128, 128, 8, 3)
        candidates = {
            "Gluon": partial(run, small, small, True),
            "Triton, 64 rows": partial(run, small, small, False),
            "Triton, 128 rows": partial(run, Tiles(128, 128, 16, 3), large, False),
        }
        best(f"experts, {tokens} tokens", [(name, partial(listed, call)) for name, call in candidates.items()])


def exact_pairs(x, chosen, gate_up, down, dtype: torch.dtype) -> torch.Tensor:
    """Each pair's expert in fp64, of quantised activations; what is between the products is rounded to `dtype`."""
    made = []
    for token in range(chosen.shape[0]):
        row = x[token : token + 1].double()
        for index in chosen[token].tolist():
            gate, up = (
                quantised_linear_reference(row, weight, scales).to(dtype).double()
                for weight, scales in zip(gate_up[0][index].chunk(2), gate_up[1][index].chunk(2))
            )
            hidden = (F.silu(gate).to(dtype).double() * up).to(dtype).double()
            made.append(quantised_linear_reference(hidden, down[0][index], down[1][index])[0])
    return torch.stack(made)


def tune(seconds: float, output: Path | None, ceilings: dict[str, float], only: str) -> int:
    """Run the candidates whose group's name contains `only`; 1 if one was wrong."""
    weights = ExpertWeights()
    groups = {
        "products": tune_products,
        "vectors": tune_vectors,
        "expert vectors": partial(tune_expert_vectors, weights=weights),
        "grouped": partial(tune_grouped, weights=weights),
    }
    begin = time.monotonic()
    tuning = Tuning(begin, output, ceilings)
    chosen = [name for name in groups if only in name]
    for index, name in enumerate(chosen):
        # Each group may take its share of what is left.
        left = begin + seconds - time.monotonic()
        tuning.until = time.monotonic() + left / (len(chosen) - index)
        groups[name](tuning)
        torch.cuda.empty_cache()
    print(f"{time.monotonic() - begin:.0f} s", flush=True)
    return int(any("wrong" in record for record in tuning.records))
