"""Evaluation on streamed layers: the resident model's numbers, and one sweep for all patterns and windows."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from testing.checkpoints import build

from indexcache.conversion.io.open_checkpoint import open_checkpoint
from indexcache.evaluation import streamed
from indexcache.evaluation.measure_overlap import measure_overlap
from indexcache.evaluation.run import EvaluationOptions, run_evaluation
from indexcache.runs.errors import RunError
from indexcache.runs.loading import Placement
from indexcache.runs.windows.window_sources import Sampling

DEMO = Path(__file__).parents[2] / "demo" / "dsa_demo"
VOLATILE = ("date", "seconds", "streamed", "evaluations_resumed")


@pytest.fixture(scope="module", params=["demo", "fp8"])
def checkpoint(request, tmp_path_factory):
    """A checkpoint, windows for it, a pattern, and their length."""
    folder = tmp_path_factory.mktemp("data")
    if request.param == "demo":
        source, pattern, tokens = DEMO, "FFSSFFSSFFSS", 97
    else:
        source, pattern, tokens = build(folder / "fp8", layers=4, fp8=True, qk_rope_head_dim=16), "FFSS", 33
    ids = torch.randint(2, 64, (3, tokens), generator=torch.Generator().manual_seed(0))
    save_file({"some_ids": ids.int()}, folder / "windows.safetensors")
    return source, f"{folder / 'windows.safetensors'}:some", pattern, tokens - 1


def evaluated(checkpoint, output, stream, resume=False):
    source, data, pattern, seqlen = checkpoint
    options = EvaluationOptions(
        tasks=("perplexity", "overlap"), data=data, patterns=(pattern,), sampling=Sampling(seqlen), batch_size=2
    )
    found = run_evaluation(
        [str(source)], options, output, placement=Placement(device="cpu"), resume=resume, stream=stream
    )
    return {name: value for name, value in found.items() if name not in VOLATILE}, found


def test_every_number_is_the_resident_one(checkpoint, tmp_path):
    expected, _ = evaluated(checkpoint, tmp_path / "resident", False)
    found, document = evaluated(checkpoint, tmp_path / "streamed", True)
    assert found == expected
    counts = []
    for name in ("resident", "streamed"):
        journal = (tmp_path / name / "journal.jsonl").read_text()
        counts.append([journal.count("perplexity"), journal.count("overlap")])
    assert counts[0] == counts[1]
    # The model's hash, the windows of both patterns, and two windows for overlap.
    assert document["streamed"][0]["sweeps"] == 4
    again, document = evaluated(checkpoint, tmp_path / "streamed", True, resume=True)
    assert again == expected
    assert document["streamed"][0]["sweeps"] == 1


def test_retrieval_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"retrieval.*--task perplexity"):
        run_evaluation([str(DEMO)], EvaluationOptions(), tmp_path, stream=True)


def test_overlap_alone_is_the_resident_one(checkpoint):
    source, data, _, seqlen = checkpoint
    found = [measure_overlap(str(source), data, seqlen, 3, None, stream=stream) for stream in (False, True)]
    assert found[0] == found[1]


@pytest.mark.parametrize("room", ["none", "two passes"])
def test_passes_that_do_not_fit_take_more_sweeps(checkpoint, tmp_path, monkeypatch, room):
    """Two batches of two windows and one, each with two patterns: four passes."""
    source, _, _, seqlen = checkpoint
    expected, _ = evaluated(checkpoint, tmp_path / "resident", False)
    config = open_checkpoint(str(source)).config
    of_two_windows = 2 * 2 * (seqlen + 1) * (4 * config.hidden_size + 4 * config.index_topk)
    # Half of what is free is taken.
    free = {"none": 0, "two passes": 2 * 2 * of_two_windows}[room]
    monkeypatch.setattr(streamed, "free_host_bytes", lambda: free)
    found, document = evaluated(checkpoint, tmp_path / "streamed", True)
    assert found == expected
    # Beside the hash and overlap's windows.
    assert document["streamed"][0]["sweeps"] - 3 == {"none": 4, "two passes": 2}[room]
