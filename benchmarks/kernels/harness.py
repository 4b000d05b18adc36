"""Timing and ceilings shared by the kernel benchmarks: medians of CUDA events, warm, over rotating inputs.

A benchmark module offers `cases() -> list[Case]`; `run_cases` checks each case, times it, prints a line and returns
records for `write_json`. Every speed stands beside a bound measured in the same run (`measure_ceilings`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from ...runs.versions import stamp


@dataclass
class Case:
    """One measurement.

    Attributes:
        name: unique in its file.
        make: builds one set of inputs on the device.
        call: the function timed, called with those inputs.
        check: returns None if the result is right, else what is wrong; called once with the first inputs.
        flops: useful floating-point operations of a call.
        matmul: the ceiling that `flops` are judged by, `bf16_tflops` or `fp8_tflops`.
        bytes: bytes that a call must move through HBM.
        l2_bytes: bytes that it must move through L2 (gathers).
        copies: input sets rotated through while timing, so that inputs do not stay in L2 by accident.
        graph: time replays of a CUDA graph (launch-bound cases).
    """

    name: str
    make: Callable[[], tuple]
    call: Callable[..., Any]
    check: Callable[[tuple], str | None] | None = None
    flops: float = 0.0
    matmul: str = "bf16_tflops"
    bytes: float = 0.0
    l2_bytes: float = 0.0
    copies: int = 2
    graph: bool = False
    info: dict[str, Any] = field(default_factory=dict)


def median_ms(calls: Sequence[Callable[[], Any]], *, warmup: int = 2, budget_ms: float = 400.0) -> dict[str, float]:
    """Median, least and spread (90th minus 10th percentile) in ms of calls taken in turn, timed by CUDA events."""
    for i in range(max(warmup, len(calls))):
        calls[i % len(calls)]()
    torch.cuda.synchronize()
    first = _timed(calls[:1], 1)[0]
    times = _timed(calls, max(3, min(200, int(budget_ms / max(first, 1e-3)))))
    times.sort()
    tenth = len(times) // 10
    return {"ms": statistics.median(times), "min_ms": times[0], "spread_ms": times[-1 - tenth] - times[tenth]}


def _timed(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (start, stop) in enumerate(events):
        start.record()
        calls[i % len(calls)]()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph's replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.result = call()  # type: ignore[attr-defined]  # lives as long as the graph
    return graph.replay


def measure_ceilings() -> dict[str, float]:
    """What this machine reaches: copy TB/s, bf16 and fp8 matmul TFLOP/s, row gather TB/s from L2 and from HBM."""
    found = {"copy_tbs": _copy_tbs(), **_matmul_tflops()}
    for name, rows in (("gather_l2_tbs", 16384), ("gather_hbm_tbs", 200_000)):
        found[name] = _gather_tbs(rows)
    return {key: round(value, 3) for key, value in found.items()}


def _copy_tbs(size: int = 2**30) -> float:
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / median_ms([partial(target.copy_, source)])["ms"] / 1e9


def _matmul_tflops(n: int = 8192) -> dict[str, float]:
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    calls = {"bf16_tflops": partial(torch.matmul, a, b)}
    if torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device="cuda")
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        scaled = partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=True)
        calls["fp8_tflops"] = partial(scaled, a8, b8, scale_a=one, scale_b=one)
    return {name: 2 * n**3 / median_ms([call])["ms"] / 1e9 for name, call in calls.items()}


@triton.jit
def _gather_kernel(table, index, out, ROWS: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * ROWS
    columns = tl.arange(0, WIDTH)
    total = tl.zeros([STEP, WIDTH], tl.float32)
    for i in range(0, ROWS, STEP):
        rows = tl.load(index + first + i + tl.arange(0, STEP)).to(tl.int64)  # [STEP]
        total += tl.load(table + rows[:, None] * WIDTH + columns[None, :]).to(tl.float32)
    tl.store(out + tl.program_id(0) * WIDTH + columns, tl.sum(total, 0))


def _gather_tbs(rows: int, width: int = 512, count: int = 2**20) -> float:
    """TB/s of summing random bf16 rows of `width` out of a table of `rows`."""
    table = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    index = torch.randint(rows, (count,), device="cuda", dtype=torch.int32)
    out = torch.empty(count // 512, width, device="cuda")
    call = partial(_gather_kernel[(count // 512,)], table, index, out, 512, width, 16, num_warps=4)
    return count * width * 2 / median_ms([call])["ms"] / 1e9


def run_cases(cases: Sequence[Case], ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Check and time every case; a case whose check fails gets no time."""
    records = []
    for case in cases:
        inputs = [case.make() for _ in range(case.copies)]
        record: dict[str, Any] = {"name": case.name, **case.info}
        wrong = case.check(inputs[0]) if case.check else None
        if wrong:
            record["wrong"] = wrong
        else:
            calls = [partial(case.call, *one) for one in inputs]
            record |= median_ms([captured(call) for call in calls] if case.graph else calls)
            record |= _rates(case, record["ms"], ceilings)
        print(_line(record), flush=True)
        records.append(record)
        del inputs
        torch.cuda.empty_cache()
    return records


def _rates(case: Case, ms: float, ceilings: dict[str, float]) -> dict[str, float]:
    """Rates reached, the time that the ceilings allow, and the share of it."""
    rates, floors = {}, [0.0]
    for amount, unit, ceiling in (
        (case.flops, "tflops", case.matmul),
        (case.bytes, "hbm_tbs", "copy_tbs"),
        (case.l2_bytes, "l2_tbs", "gather_l2_tbs"),
    ):
        if amount:
            rates[unit] = amount / ms / 1e9
            floors.append(amount / ceilings[ceiling] / 1e9)
    floor = max(floors)
    return rates | ({"floor_ms": floor, "of_floor": floor / ms} if floor else {})


def _line(record: dict[str, Any]) -> str:
    shown = (f"{key}={value:.4g}" for key, value in record.items() if isinstance(value, float))
    return f"{record['name']:<44} {record.get('wrong') or ' '.join(shown)}"


def write_json(path: Path, command: str, ceilings: dict[str, float], records: list[dict[str, Any]]) -> None:
    """Write the records with the machine, the date and the command that made them."""
    document = {"machine": stamp(), "command": command, "ceilings": ceilings, "cases": records}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
