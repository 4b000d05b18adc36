"""One of several processes on one search; run by torchrun. Arguments: output file, how to share, algorithm."""

import json
import sys
from pathlib import Path

import torch
from testing.search_models import model, windows

from indexcache.pattern_search.result import result_document
from indexcache.pattern_search.search import SearchOptions, search, search_identity
from indexcache.runs.journal import ScoreJournal
from indexcache.runs.processes import Processes


def main(output, algorithm):
    processes = Processes.from_environment()
    tiny, calibration, held_out = model(5, seed=4), windows(7), windows(3, seed=9)
    options = SearchOptions(keep=("1/2", "1/4"), algorithm=algorithm, tolerance=0.01, baselines=("similarity",))
    identity = search_identity(tiny, calibration, held_out, options)
    journal = ScoreJournal(Path(output).with_suffix(".jsonl") if processes.is_first else None, identity)
    outcome = search(tiny, calibration, held_out, options, journal=journal, processes=processes)
    document = result_document(outcome, options, calibration, held_out, source="tiny", identity=identity)
    document["cost"].pop("seconds")
    if processes.is_first:
        Path(output).write_text(json.dumps(document))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
