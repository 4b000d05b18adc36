"""Prefill on the CPU by context length: time and peak memory of the demo checkpoint's PyTorch path.

    python -m indexcache.benchmarks.studies.cpu_prefill --lengths 4096 8192 16384 32768

Each length runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from ...runs.versions import stamp

DEMO = Path(__file__).parents[2] / "demo" / "dsa_demo"
PATTERNS = {"all full": "F" * 12, "4 of 12": "FFSSSSFFSSSS"}


def prefill(length: int, pattern: str) -> dict[str, float]:
    """One prefill of `length` tokens with a cache and the last token's logits, in this process."""
    from ...conversion.io.load_source import load_source

    model = load_source(DEMO, dtype=torch.float32)
    model.set_index_share_pattern(pattern)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    ids = torch.randint(2, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(seconds, 2), "loaded_mib": round(before), "peak_mib": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "cpu_prefill.json")
    parser.add_argument("--one", nargs=2, metavar=("LENGTH", "PATTERN"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(prefill(int(arguments.one[0]), arguments.one[1])))
        return
    rows = []
    for name, pattern in PATTERNS.items():
        for length in arguments.lengths:
            command = [
                sys.executable,
                "-m",
                "indexcache.benchmarks.studies.cpu_prefill",
                "--one",
                str(length),
                pattern,
            ]
            finished = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"tokens": length, "pattern": name, **json.loads(finished.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    record = {
        "what": "prefill of dsa_demo (12 layers, top-64), fp32, sdpa backend, CPU",
        "machine": stamp(),
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
