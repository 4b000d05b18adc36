"""A search on streamed layers: the resident one's result, scores and journal, in few sweeps; killed and resumed."""

import json
from pathlib import Path

import pytest
import torch
from testing.checkpoints import build

from indexcache.conversion.io.open_checkpoint import open_checkpoint
from indexcache.pattern_search.result import result_document
from indexcache.pattern_search.run import SearchRun, run_search
from indexcache.pattern_search.search import SearchOptions, search, search_identity
from indexcache.pattern_search.streaming import Streaming
from indexcache.runs.errors import RunError
from indexcache.runs.fingerprint import state_sha256
from indexcache.runs.journal import ScoreJournal
from indexcache.runs.loading import Placement, load_model
from indexcache.runs.monitor import Monitor
from indexcache.runs.streaming.layer_source import LayerSource
from indexcache.runs.streaming.sweep import Sweeper
from indexcache.runs.windows.window_sources import Sampling
from indexcache.runs.windows.windows import Windows

DEMO = Path(__file__).parents[2] / "demo" / "dsa_demo"
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TEACHERS = {"auto": ("kl", "auto"), "source": ("kl", "source"), "lm": ("lm", "auto")}


class Killed(Exception):
    pass


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def folder(request, tmp_path_factory):
    layout = {"fp8": True, "qk_rope_head_dim": 16} if request.param == "fp8" else {}
    return build(tmp_path_factory.mktemp("checkpoint") / request.param, layers=6, **layout)


def windows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (count, 33), generator=generator)
    return Windows(ids, torch.rand(ids.shape, generator=generator) < 0.1, "random")


def run(folder, path, options, streamed, resume=False, cache_bytes=2**31):
    """The result but for what it took, what it took, and the journal's lines."""
    opened, data = open_checkpoint(folder), (windows(9, 1), windows(3, 2))
    source = LayerSource(opened, torch.float32) if streamed else None
    model = load_model(opened, Placement(device="cpu")) if source is None else source.model
    sha256 = None if source is None else state_sha256(model, source.state_items())
    identity = search_identity(model, *data, options, sha256)
    journal = ScoreJournal(path, identity, resume)
    ahead = ScoreJournal(path.with_suffix(".ahead"), identity, resume) if streamed else None
    try:
        streaming = None if source is None else Streaming(source, ahead)
        outcome = search(model, *data, options, journal=journal, streaming=streaming, cache_bytes=cache_bytes)
    finally:
        journal.close()
        if source is not None:
            ahead.close()
            source.close()
    document = result_document(outcome, options, *data, source="tiny", identity=identity)
    volatile = ("cost", "date", "versions")
    return {key: value for key, value in document.items() if key not in volatile}, outcome.cost, path.read_text()


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("algorithm", ["lazy", "greedy"])
def test_result_scores_and_journal_are_the_resident_ones(folder, tmp_path, algorithm, teacher):
    objective, teacher = TEACHERS[teacher]
    options = SearchOptions(
        keep=("1/2", "1/3"), tolerance=0.01, algorithm=algorithm, objective=objective, teacher=teacher
    )
    expected, resident, journal = run(folder, tmp_path / "resident.jsonl", options, False)
    found, streamed, streamed_journal = run(folder, tmp_path / "streamed.jsonl", options, True)
    assert found == expected
    assert streamed_journal == journal
    same = [name for name in resident if name != "seconds"]
    assert {name: streamed[name] for name in same} == {name: resident[name] for name in same}
    assert streamed["sweeps"] < resident["evaluations"]
    assert streamed["bytes_read"] > 0


@pytest.mark.parametrize("cache_bytes", [0, 60_000])
def test_little_memory_changes_what_it_takes_and_no_score(folder, tmp_path, cache_bytes):
    options = SearchOptions(keep=("1/2",))
    expected, resident, journal = run(folder, tmp_path / "resident.jsonl", options, False, cache_bytes=cache_bytes)
    found, streamed, streamed_journal = run(
        folder, tmp_path / "streamed.jsonl", options, True, cache_bytes=cache_bytes
    )
    assert (found, streamed_journal) == (expected, journal)


def test_killed_in_any_sweep_and_gone_on_with(folder, tmp_path, monkeypatch):
    options = SearchOptions(keep=("1/2", "1/3"), tolerance=0.01)
    expected, cost, journal = run(folder, tmp_path / "whole.jsonl", options, True)
    passes = []
    run_sweep = Sweeper.run

    def killing(limit):
        left = limit

        def run_or_die(self, wanted, *arguments):
            nonlocal left
            for one, hidden in run_sweep(self, wanted, *arguments):
                if left == 0:
                    raise Killed
                left -= 1
                yield one, hidden
            passes.extend((id(self.batches), one) for one in wanted)

        return run_or_die

    path, limit, kills = tmp_path / "killed.jsonl", 7, 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(Sweeper, "run", killing(limit))
            try:
                found, gone_on, text = run(folder, path, options, True, resume=True)
                break
            except Killed:
                kills += 1
                limit += 13
    assert kills > 3
    assert found == expected
    assert text == journal
    taken = ("search_layer_forwards", "held_out_layer_forwards", "evaluations")
    assert {name: gone_on[name] for name in taken} == {name: cost[name] for name in taken}
    # No score of a sweep that was whole was made a second time.
    lines = [json.loads(line) for line in path.with_suffix(".ahead").read_text().splitlines()[1:]]
    keys = [(line["windows"], line["pattern"], line["round"]) for line in lines]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("device, dtype", [
    ("cpu", "auto"),
    *(pytest.param("cuda", dtype, marks=[pytest.mark.gpu, NEEDS_CUDA]) for dtype in ("bfloat16", "float32")),
])  # fmt: skip
def test_the_command_streams_the_demo(tmp_path, device, dtype):
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).read_text() + Path(json.decoder.__file__).read_text())
    documents = []
    for stream in (False, True):
        output = tmp_path / f"stream_{stream}"
        settings = SearchRun(
            str(text),
            output,
            sampling=Sampling(80, 4),
            placement=Placement(dtype, device),
            cache_memory="1GB",
            stream=stream,
        )
        options = SearchOptions(keep=("1/3",), tolerance=0.2)
        document = run_search(str(DEMO), settings, options, Monitor())
        cost = document.pop("cost")
        del document["date"]
        documents.append((document, (output / "journal.jsonl").read_text()))
    assert documents[0] == documents[1]
    assert documents[0][0]["overlap"]["layers"] == list(range(12)) and documents[0][0]["retrieval"]["refused"]
    asked = sum(cost[f"{name}_layer_forwards"] for name in ("search", "held_out", "retrieval"))
    assert cost["streamed_layer_forwards"] <= 1.3 * asked


@pytest.mark.parametrize(
    "options, settings, message",
    [
        ({"objective": "far-kl"}, {}, "far-kl"),
        ({"baselines": ("similarity",)}, {}, "--baseline similarity"),
        ({}, {"placement": Placement(device_map="cpu")}, "--device-map"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path, options, settings, message):
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).read_text())
    run_options = SearchRun(str(text), tmp_path / "out", sampling=Sampling(80, 2), stream=True, **settings)
    with pytest.raises(RunError, match=message):
        run_search(str(DEMO), run_options, SearchOptions(**options), Monitor())
