"""How long a fresh process waits for its first tokens, without and with kernels compiled before.

    python -m indexcache.benchmarks.studies.first_token --out first_token.json

Every row is a process of its own: a 4-layer slice of the 30B shape with random weights, then one `generate` each of a
1,000, an 8,000 and a 100,000 token prompt to its 65th token, in that order. "cold" starts with an empty Triton cache,
"warm" with the one that the row before left. Seconds are from the call of `generate` on a loaded model. `--quick`
leaves out the rows without compiling ahead, which take longest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

LENGTHS, TOKENS, LAYERS = (1000, 8000, 100_000), 65, 4
OFF, ON = "0", ""
# What the process that compiles beside the model imports before it can begin.
SIDE_PROCESS = "import time; t = time.perf_counter(); import torch, triton; print(time.perf_counter() - t)"


def measure(shape: str, layers: int, lengths: list[int], device: str) -> dict[str, Any]:
    """In this process: seconds of loading, and of each prompt to its first and last token."""
    begin = time.perf_counter()
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    from ...runs.versions import stamp
    from ..bench.speed_models import prompt, random_model

    class Clock(LogitsProcessor):
        """When each token's logits were there."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if len(self.times) in (0, TOKENS - 1) and scores.is_cuda:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            return scores

    model = random_model(shape, None, layers, torch.device(device), torch.bfloat16)
    # As `from_pretrained` keeps it.
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            parameter.data = parameter.data.float()
    found: dict[str, Any] = {"machine": stamp(), "load_seconds": time.perf_counter() - begin, "prompts": []}
    found["compiled_while_waiting"] = note_compilations()
    for length in lengths:
        ids, clock = prompt(model, length, "drift"), Clock()
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([clock]),
        )
        first, last = clock.times[0] - start, clock.times[-1] - clock.times[0]
        found["prompts"].append({"tokens": length, "first_token_seconds": first, "next_64_seconds": last})
    return found


def note_compilations() -> list[dict[str, Any]]:
    """A list that gets every kernel which the generating thread compiles: not foreseen, or not begun by others yet."""
    import triton

    found: list[dict[str, Any]] = []

    def note(src: Any, cache_hit: bool, times: Any, **_: Any) -> None:
        if not cache_hit and threading.current_thread() is threading.main_thread():
            case = {"signature": src.signature, "constants": src.constants, "attributes": src.attrs}
            found.append({"kernel": src.name, "seconds": times.total / 1e6} | {k: repr(v) for k, v in case.items()})

    triton.knobs.compilation.listener = note
    return found


def write_config(folder: Path, shape: str, layers: int) -> None:
    """What `indexcache warm-up` reads of a checkpoint."""
    from ..bench.speed_models import random_config

    config = random_config(shape, None, layers)
    config.architectures = ["IndexCacheForCausalLM"]
    config.save_pretrained(folder)


class Runs:
    """Fresh processes and what they measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rows = options, []  # type: ignore[var-annotated]

    def child(self, name: str, cache: Path, ahead: str, **variables: str) -> None:
        """A row: a process with this Triton cache, compiling ahead or not."""
        options = self.options
        command = [
            sys.executable,
            "-m",
            "indexcache.benchmarks.studies.first_token",
            "--child",
            "--shape",
            options.shape,
        ]
        command += ["--layers", str(options.layers), "--device", options.device]
        command += ["--lengths", *map(str, options.lengths)]
        environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "INDEXCACHE_COMPILE_AHEAD": ahead, **variables}
        before = entries(cache)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{name}: exit {done.returncode}\n{done.stderr[-4000:]}")
        row = {"name": name, "compiled": entries(cache) - before, **json.loads(done.stdout.splitlines()[-1])}
        self.rows.append(row)
        print(describe(row), flush=True)

    def imports(self) -> None:
        """A row: a process that imports what the side process does."""
        done = subprocess.run([sys.executable, "-I", "-c", SIDE_PROCESS], capture_output=True, text=True, check=True)
        seconds = float(done.stdout)
        self.rows.append({"name": "import torch and triton", "seconds": seconds})
        print(f"{'import torch and triton':44} {seconds:7.2f} s", flush=True)

    def warm_up(self, name: str, cache: Path, config: Path, *arguments: str, **variables: str) -> None:
        """A row: `indexcache warm-up` into this cache."""
        command = [sys.executable, "-m", "indexcache.cli", "warm-up", str(config), "--dtype", "bfloat16", "--json"]
        environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), **variables}
        start = time.perf_counter()
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{name}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        seconds = time.perf_counter() - start
        self.rows.append(
            {"name": name, "seconds": seconds, "compiled": entries(cache), "said": json.loads(done.stdout)}
        )
        print(f"{name:44} {seconds:7.2f} s, {entries(cache)} kernels", flush=True)


def entries(cache: Path) -> int:
    """Kernels in a Triton cache."""
    return len(list(cache.glob("*/*.cubin"))) + len(list(cache.glob("*/*.hsaco")))


def describe(row: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [f"{p['first_token_seconds']:7.2f} + {p['next_64_seconds']:6.2f}" for p in row["prompts"]]
    compiled = f"{row['compiled']:4} compiled, {len(row['compiled_while_waiting'])} while the model waited"
    return f"{row['name']:44} {row['load_seconds']:6.1f}  " + "  ".join(cells) + f"  {compiled}"


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """All rows, each printed as it is there."""
    runs = Runs(options)
    heads = "  ".join(f"{length:>10,} tokens" for length in options.lengths)
    print(f"{'seconds to the first token + the next 64':44} {'load':>6}  {heads}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_config(place / "config", options.shape, options.layers)
        threads = {"INDEXCACHE_COMPILE_PROCESSES": "0"}
        # Libraries and drivers are read from disk once, outside the figures.
        if options.quick:
            runs.child("first process of the machine", place / "first", ON)
        else:
            runs.child("first process of the machine", place / "first", OFF)
            runs.child("cold, nothing ahead", place / "off", OFF)
            runs.child("warm, nothing ahead", place / "off", OFF)
        runs.imports()
        runs.child("cold, ahead in threads", place / "threads", ON, **threads)
        runs.child("cold, ahead in processes", place / "on", ON)
        runs.child("warm", place / "on", ON)
        if options.quick:
            runs.child("cold, ahead in processes, again", place / "again", ON)
        runs.warm_up("indexcache warm-up", place / "warm", place / "config")
        if not options.quick:
            runs.child("after warm-up, nothing ahead", place / "warm", OFF)
        runs.child("after warm-up", place / "warm", ON)
        if options.target and not options.quick:
            hidden = {"CUDA_VISIBLE_DEVICES": ""}
            name = f"indexcache warm-up --target {options.target}, no GPU"
            runs.warm_up(name, place / "image", place / "config", "--target", options.target, **hidden)
            runs.child("after it, nothing ahead", place / "image", OFF)
    return {"shape": options.shape, "layers": options.layers, "new_tokens": TOKENS, "rows": runs.rows}


def main() -> None:
    """Measure in this process, or start the processes that do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = Path(os.environ.get("OUT", ".")) / "first_token.json"
    parser.add_argument("--out", type=Path, default=out, help="JSON to write; default: first_token.json under $OUT")
    parser.add_argument("--shape", default="30b")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--target", default="sm_90", help="also warm up for it without a GPU; empty: do not")
    parser.add_argument("--quick", action="store_true", help="only the rows that compile ahead, and a warm-up")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.shape, options.layers, options.lengths, options.device)))
        return
    document = run_all(options)
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
