"""`make hostile`: tries without end, or until SECONDS are over; counts, findings, and a summary as JSON.

make hostile SECONDS=3600 SEED=1                all kinds, two processes
make hostile SEED=1 ONLY=journal:17             one try again, as a finding names it
make hostile SEED=1 ONLY=journal SECONDS=60     one kind
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from queue import Empty

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import checkpoint_inputs  # noqa: E402
import hub_inputs  # noqa: E402
import kills  # noqa: E402
import path_inputs  # noqa: E402
import run_inputs  # noqa: E402
from tries import Maker, Verdict, carry_out  # noqa: E402
from workshop import Workshop  # noqa: E402

KINDS: dict[str, Maker] = {
    **checkpoint_inputs.KINDS,
    **run_inputs.KINDS,
    **hub_inputs.KINDS,
    **path_inputs.KINDS,
}
# So many inputs for one kill.
INPUTS_A_KILL = 10
# After which a verb counts as hung: the longest takes a few seconds where nothing else runs. And a whole try, which
# may run several, with what it prepares and judges.
SECONDS_A_VERB, SECONDS_A_TRY = 45.0, 300
_ALL = (*KINDS, *dict.fromkeys(kills.KINDS))


def one(shop: Workshop, kind: str, seed: int, number: int) -> Verdict:
    """Try `number` of a kind."""
    if kind in kills.KINDS:
        return kills.stop(shop, kind, seed, number)
    return carry_out(shop, kind, KINDS[kind], seed, number)


@contextmanager
def at_most(seconds: int, what: str) -> Iterator[None]:
    """TimeoutError where the block takes longer: what judges a try must not hang on what the try has left."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"{what} takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def schedule(process: int, processes: int, only: str | None) -> Iterator[tuple[str, int]]:
    """Kinds and numbers for one of several processes, without end: every kind in turn, a kill now and then."""
    counts: Counter[str] = Counter()
    for at, kind in enumerate(cycle([only] if only else list(KINDS))):
        yield kind, process + processes * counts[kind]
        counts[kind] += 1
        if only is None and at % INPUTS_A_KILL == 0:
            kind = kills.KINDS[at // INPUTS_A_KILL % len(kills.KINDS)]
            yield kind, process + processes * counts[kind]
            counts[kind] += 1


def signature(finding: str) -> str:
    """A finding without what differs from try to try."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|[0-9a-f]{8,}|[-+]?\d[\d,.e+-]*|/\S+", "_", finding)[:160]


def _work(process: int, processes: int, seed: int, only: str | None, until: float, folder: str, found) -> None:
    try:
        with Workshop(Path(folder) / str(process), SECONDS_A_VERB) as shop:
            for kind, number in schedule(process, processes, only):
                if time.time() > until:
                    break
                begun = time.time()
                with at_most(SECONDS_A_TRY, f"{kind}:{number}"):
                    verdict = one(shop, kind, seed, number)
                found.put((verdict, time.time() - begun))
    except BaseException as error:
        found.put(f"process {process} died: {type(error).__name__}: {error}")
        raise
    found.put(None)


def main() -> int:
    """Run; 1 when there are findings."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--seconds", type=float, default=3600)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--only", help="kind, or kind:number")
    words.add_argument("--processes", type=int, default=2)
    words.add_argument("--summary", type=Path, default=Path("build/hostile.json"))
    options = words.parse_args()
    kind, _, number = (options.only or "").partition(":")
    if kind and kind not in _ALL:
        words.error(f"--only: no kind {kind!r} (there are {', '.join(_ALL)})")
    folder = tempfile.mkdtemp(prefix="hostile_")
    try:
        if number:
            with Workshop(Path(folder), SECONDS_A_VERB) as shop:
                verdict = one(shop, kind, options.seed, int(number))
            print(verdict)
            return 1 if verdict.findings else 0
        return _campaign(options, kind or None, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _campaign(options: argparse.Namespace, only: str | None, folder: str) -> int:
    begun, until = time.time(), time.time() + options.seconds
    found: multiprocessing.Queue = multiprocessing.Queue()
    workers = [
        multiprocessing.Process(
            target=_work, args=(process, options.processes, options.seed, only, until, folder, found)
        )
        for process in range(options.processes)
    ]
    for worker in workers:
        worker.start()
    done: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    verdicts: list[Verdict] = []
    deaths: list[str] = []
    slowest: dict[str, tuple[float, int]] = {}
    running, told = len(workers), time.time()
    while running:
        try:
            verdict = found.get(timeout=10)
        except Empty:
            if not any(worker.is_alive() for worker in workers):
                break
            continue
        if verdict is None:
            running -= 1
        elif isinstance(verdict, str):
            running -= 1
            deaths.append(verdict)
            print(verdict, flush=True)
        else:
            verdict, seconds = verdict
            slowest[verdict.kind] = max(slowest.get(verdict.kind, (0.0, 0)), (seconds, verdict.number))
            done[verdict.kind] += 1
            codes[f"{verdict.kind} {verdict.code}"] += 1
            if verdict.findings:
                verdicts.append(verdict)
                print(f"\n{verdict}", flush=True)
        if time.time() - told > 60:
            told = time.time()
            print(f"... {told - begun:,.0f} s: {_counted(done)}, {len(verdicts)} with findings", flush=True)
    for worker in workers:
        worker.join()
    _report(options, begun, done, codes, verdicts, deaths, slowest)
    return 1 if verdicts or deaths else 0


def _counted(done: Counter[str]) -> str:
    inputs = sum(done[kind] for kind in KINDS)
    return f"{inputs:,} inputs, {sum(done.values()) - inputs:,} kills"


def _report(
    options,
    begun: float,
    done: Counter,
    codes: Counter,
    verdicts: list[Verdict],
    deaths: list[str],
    slowest: dict[str, tuple[float, int]],
) -> None:
    print("\nkind                    tries  longest  exit codes")
    for kind in _ALL:
        mine = {code.split()[1]: count for code, count in sorted(codes.items()) if code.split()[0] == kind}
        ends = ", ".join(f"{code}: {count}" for code, count in mine.items())
        print(f"{kind:22} {done[kind]:6,} {slowest.get(kind, (0.0, 0))[0]:6.1f} s  {ends}")
    seconds = time.time() - begun
    print(f"\nseed {options.seed}: {_counted(done)}, {len(verdicts)} with findings, {seconds:,.0f} s")
    kinds = Counter(signature(finding) for verdict in verdicts for finding in verdict.findings)
    for text, count in kinds.most_common():
        example = next(verdict for verdict in verdicts if text in map(signature, verdict.findings))
        print(f"{count:5} x {text}\n        {example.command}")
    options.summary.parent.mkdir(parents=True, exist_ok=True)
    summary = {
        "seed": options.seed,
        "seconds": round(time.time() - begun),
        "processes": options.processes,
        "cores": os.cpu_count(),
        "inputs": sum(done[kind] for kind in KINDS),
        "kills": sum(done.values()) - sum(done[kind] for kind in KINDS),
        "tries": dict(done),
        "exit_codes": dict(codes),
        "longest_tries": {kind: [round(seconds, 1), number] for kind, (seconds, number) in slowest.items()},
        "with_findings": len(verdicts),
        "deaths": deaths,
        "findings": [{**asdict(verdict), "again": verdict.command} for verdict in verdicts],
    }
    # A name may hold what UTF-8 cannot: escaped.
    options.summary.write_text(json.dumps(summary, indent=1) + "\n", encoding="ascii")
    print(f"summary: {options.summary}")


if __name__ == "__main__":
    sys.exit(main())
