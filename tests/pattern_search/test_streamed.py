"""`indexcache search --stream`: result, scores and journal bit for bit those of the search in memory; few sweeps."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from testing.checkpoints import build
from typer.testing import CliRunner

from indexcache.cli import app
from indexcache.conversion.io.open_checkpoint import open_checkpoint
from indexcache.pattern_search.measure.streamed_engine import StreamedEngine
from indexcache.pattern_search.search import SearchOptions, search, search_identity
from indexcache.runs.errors import RunError
from indexcache.runs.journal import ScoreJournal
from indexcache.runs.loading import Placement, load_model
from indexcache.runs.streaming.streamed_forwards import stream_model, streamed_sha256
from indexcache.runs.windows.windows import Windows

DEMO = Path(__file__).parents[2] / "demo" / "dsa_demo"
ROOM = 2**26


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "c"
    return build(folder, layers=5, fp8=True, qk_rope_head_dim=16, moe_intermediate_size=32)


def windows(count, seed=0):
    ids = torch.randint(2, 64, (count, 41), generator=torch.Generator().manual_seed(seed))
    return Windows(ids, None, "random")


def outcome_of(found):
    return {key: value for key, value in vars(found).items() if key != "cost"}


def taken(cost):
    return {key: value for key, value in cost.items() if key not in ("seconds", "streaming", "evaluations_resumed")}


def run(folder, path, options, stream, resume=False, room=ROOM, count=6):
    """The outcome of a search, and what its journal holds."""
    opened, calibration, held_out = open_checkpoint(folder), windows(count), windows(3, seed=9)
    source = stream_model(opened, Placement()) if stream else None
    model = source.model if stream else load_model(opened)
    sha256 = streamed_sha256(source) if stream else None
    journal = ScoreJournal(path, search_identity(model, calibration, held_out, options, sha256), resume)
    try:
        found = search(model, calibration, held_out, options, journal=journal, cache_bytes=room, source=source)
    finally:
        journal.close()
        if stream:
            assert source.most_alive == 2 and source.alive == 0
            source.close()
    return found


def same_scores(one, other):
    assert outcome_of(one).keys() == outcome_of(other).keys()
    for name in ("start", "counts", "steps", "patterns", "baselines", "teacher", "chosen"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("calibration", "held_out"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[pattern].scores, theirs[pattern].scores) for pattern in mine)
    assert taken(one.cost) == taken(other.cost)


OPTIONS = {
    "lazy": SearchOptions(keep=("1/2", "1/4"), tolerance=0.01),
    "dense": SearchOptions(keep=("1/2",), teacher="dense"),
    "source": SearchOptions(keep=("1/2",), teacher="source", batch_size=2, refine_by="lm"),
    "lm": SearchOptions(keep=("1/2",), objective="lm", refine_passes=1),
    "greedy": SearchOptions(keep=("1/2",), algorithm="greedy"),
    "blocks": SearchOptions(keep=("1/2",), algorithm="greedy", blocks=2),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_streamed_is_the_search_in_memory_bit_for_bit(fp8, tmp_path, options):
    whole = run(fp8, tmp_path / "whole.jsonl", OPTIONS[options], stream=False)
    streamed = run(fp8, tmp_path / "streamed.jsonl", OPTIONS[options], stream=True)
    same_scores(streamed, whole)
    assert (tmp_path / "streamed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("room", [0, 40_000, 300_000])
def test_whatever_room_there_is_for_states(fp8, tmp_path, room):
    whole = run(fp8, tmp_path / "whole.jsonl", OPTIONS["lazy"], stream=False, room=room)
    streamed = run(fp8, tmp_path / "streamed.jsonl", OPTIONS["lazy"], stream=True, room=room)
    same_scores(streamed, whole)
    assert (tmp_path / "streamed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def killing(monkeypatch, after):
    """A context in which the sweep's layer number `after` + 1 raises `Killed`."""
    calls, step = 0, StreamedEngine._step

    def dying(self, *arguments):
        nonlocal calls
        calls += 1
        if calls > after:
            raise Killed
        return step(self, *arguments)

    @contextmanager
    def patched():
        with monkeypatch.context() as patch:
            patch.setattr(StreamedEngine, "_step", dying)
            with pytest.raises(Killed):
                yield

    return patched()


def test_killed_anywhere_and_gone_on_with(fp8, tmp_path, monkeypatch):
    whole = run(fp8, tmp_path / "whole.jsonl", OPTIONS["lazy"], stream=False)
    expected = (tmp_path / "whole.jsonl").read_bytes()
    for after in (0, 20, 60, 100, 140, 180):
        path = tmp_path / f"{after}.jsonl"
        with killing(monkeypatch, after):
            run(fp8, path, OPTIONS["lazy"], stream=True)
        assert expected.startswith(path.read_bytes()) and path.read_bytes() != expected
        same_scores(run(fp8, path, OPTIONS["lazy"], stream=True, resume=True), whole)
        assert path.read_bytes() == expected, "nothing was run twice, and nothing else was run"


def test_a_finished_search_sweeps_for_the_hash_alone(fp8, tmp_path):
    first = run(fp8, tmp_path / "j.jsonl", OPTIONS["lm"], stream=True)
    again = run(fp8, tmp_path / "j.jsonl", OPTIONS["lm"], stream=True, resume=True)
    same_scores(again, first)
    assert again.cost["streaming"]["sweeps"] == 1 and again.cost["streaming"]["layer_forwards"] == 0


def test_what_cannot_be_streamed_is_said(fp8):
    for options, named in (
        (SearchOptions(objective="far-kl"), "--objective far-kl cannot be streamed"),
        (SearchOptions(baselines=("similarity",)), "--baseline similarity cannot be streamed"),
    ):
        with pytest.raises(RunError, match=named):
            run(fp8, None, options, stream=True)


def test_the_command_finds_the_same_on_the_demo(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).read_text() + Path(json.decoder.__file__).read_text())
    documents = {}
    for name, flags in (("whole", ()), ("streamed", ("--stream",))):
        given = ("--data", text, "--seqlen", 80, "--nsamples", 2, "--keep", "1/3", "--cache-memory", "100MB")
        output = tmp_path / name
        command = ["search", DEMO, *given, "--output", output, "--no-pictures", "--json", *flags]
        finished = CliRunner().invoke(app, list(map(str, command)))
        assert finished.exit_code == 0, finished.output
        documents[name] = json.loads(finished.stdout)
    cost = documents["streamed"]["cost"]["streaming"]
    for document in documents.values():
        for field in ("date", "versions"):
            del document[field]
        document["cost"] = taken(document["cost"])
    assert documents["streamed"] == documents["whole"]
    assert (tmp_path / "streamed/journal.jsonl").read_bytes() == (tmp_path / "whole/journal.jsonl").read_bytes()
    evaluations = documents["streamed"]["cost"]["evaluations"]
    assert 0 < cost["sweeps"] < evaluations / 3, "a sweep serves several evaluations"
    assert cost["bytes_read"] > 0
