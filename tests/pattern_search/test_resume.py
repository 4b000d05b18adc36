"""Killed anywhere and gone on with: the same result, and nothing evaluated twice."""

import json
from contextlib import contextmanager

import pytest
import torch
from testing.search_models import model, windows

from indexcache.pattern_search.measure.layer_engine import LayerEngine
from indexcache.pattern_search.result import result_document
from indexcache.pattern_search.search import SearchOptions, search, search_identity
from indexcache.runs.errors import RunError
from indexcache.runs.journal import ScoreJournal

OPTIONS = SearchOptions(keep=("1/2", "1/4"), tolerance=0.01, baselines=("uniform", "similarity"))


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def tiny():
    return model(5, seed=4)


def run(tiny, path, options=OPTIONS, resume=False, data=None, cache_bytes=2**31):
    calibration, held_out = windows(6) if data is None else data, windows(3, seed=9)
    identity = search_identity(tiny, calibration, held_out, options)
    journal = ScoreJournal(path, identity, resume)
    try:
        outcome = search(tiny, calibration, held_out, options, journal=journal, cache_bytes=cache_bytes)
    finally:
        journal.close()
    document = result_document(outcome, options, calibration, held_out, source="tiny", identity=identity)
    return {key: value for key, value in document.items() if key != "cost"}, outcome.cost


def taken(cost):
    """What a search took, but for how this run of it came about."""
    return {name: value for name, value in cost.items() if name not in ("seconds", "evaluations_resumed")}


def killing(monkeypatch, after):
    """A context in which the engine's pass number `after` + 1 raises `Killed`."""
    calls = 0

    def dying(run_pass):
        def run_or_die(*arguments):
            nonlocal calls
            calls += 1
            if calls > after:
                raise Killed
            return run_pass(*arguments)

        return run_or_die

    @contextmanager
    def patched():
        with monkeypatch.context() as patch:
            for name in ("last_hidden", "dense_hidden"):
                patch.setattr(LayerEngine, name, dying(getattr(LayerEngine, name)))
            with pytest.raises(Killed):
                yield

    return patched()


def keys(path):
    records = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [(record["windows"], record["pattern"], record["round"]) for record in records]


@pytest.mark.parametrize("algorithm", ["lazy", "greedy"])
def test_killed_at_any_point_and_resumed(tiny, tmp_path, monkeypatch, algorithm):
    options = SearchOptions(keep=("1/2", "1/4"), algorithm=algorithm, tolerance=0.01, baselines=("similarity",))
    expected, cost = run(tiny, tmp_path / "whole.jsonl", options)
    total = len(keys(tmp_path / "whole.jsonl"))
    assert total > 20
    for number, kill_after in enumerate(range(1, 60, 9)):
        path = tmp_path / f"{number}.jsonl"
        with killing(monkeypatch, kill_after):
            run(tiny, path, options)
        done = len(keys(path))
        found, spent = run(tiny, path, options, resume=True)
        assert found == expected and taken(spent) == taken(cost)
        assert len(keys(path)) == len(set(keys(path))) == total, "no evaluation was repeated"
        assert done < total


@pytest.mark.parametrize(
    ("objective", "teacher", "cache_bytes"),
    [("kl", "dense", 200_000), ("kl", "source", 90_000), ("far-kl", "auto", 150_000), ("lm", "auto", 60_000)],
)
def test_what_a_resumed_search_took_is_what_an_undisturbed_one_takes(
    tiny, tmp_path, monkeypatch, objective, teacher, cache_bytes
):
    """Also where states give way to others, and where only every nth layer's are kept."""
    options = SearchOptions(keep=("1/2",), objective=objective, teacher=teacher, baselines=())
    _, cost = run(tiny, tmp_path / "whole.jsonl", options, cache_bytes=cache_bytes)
    _, roomy = run(tiny, tmp_path / "roomy.jsonl", options)
    assert 0 < cost["path_layer_forwards"] < cost["search_layer_forwards"]
    assert cost["search_layer_forwards"] > roomy["search_layer_forwards"], "no state gave way"
    for kill_after in (2, 5, 11, 23, 37):
        path = tmp_path / f"{kill_after}.jsonl"
        with killing(monkeypatch, kill_after):
            run(tiny, path, options, cache_bytes=cache_bytes)
        if kill_after == 11:
            with killing(monkeypatch, 6):
                run(tiny, path, options, resume=True, cache_bytes=cache_bytes)
        _, spent = run(tiny, path, options, resume=True, cache_bytes=cache_bytes)
        assert taken(spent) == taken(cost), kill_after


def test_a_finished_search_resumes_without_running_a_layer(tiny, tmp_path, monkeypatch):
    expected, cost = run(tiny, tmp_path / "journal.jsonl")
    monkeypatch.setattr(LayerEngine, "last_hidden", lambda *_: pytest.fail("a layer was run"))
    found, again = run(tiny, tmp_path / "journal.jsonl", resume=True)
    assert found == expected
    assert taken(again) == taken(cost) and cost["search_layer_forwards"] > cost["path_layer_forwards"] > 0


def test_a_half_written_line_is_cut_off(tiny, tmp_path):
    path = tmp_path / "journal.jsonl"
    expected, _ = run(tiny, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:12]) + lines[12][: len(lines[12]) // 2])
    found, _ = run(tiny, path, resume=True)
    assert found == expected
    assert len(keys(path)) == len(set(keys(path))) == len(lines) - 1
    assert not path.with_name("journal.jsonl.damaged").exists(), "a crash is no damage"


@pytest.mark.parametrize("harm", ["digit", "dropped", "torn", "types", "doubled"])
def test_a_line_that_was_changed_is_run_again_and_said(tiny, tmp_path, harm):
    path = tmp_path / "journal.jsonl"
    expected, _ = run(tiny, path)
    lines = path.read_bytes().splitlines(keepends=True)
    record = json.loads(lines[9])
    if harm == "digit":
        record["scores"][0][1] += 1.0
        lines[9] = json.dumps(record).encode() + b"\n"
    elif harm == "types":
        lines[9] = json.dumps({**record, "scores": "none", "round": []}).encode() + b"\n"
    elif harm == "torn":
        lines[9] = lines[9][:40] + b"\n"
    elif harm == "doubled":
        lines.insert(9, lines[9])
    else:
        del lines[9]
    path.write_bytes(b"".join(lines))
    harmed = path.read_bytes()
    identity = search_identity(tiny, windows(6), windows(3, seed=9), OPTIONS)
    journal = ScoreJournal(path, identity, resume=True)
    journal.close()
    damaged = path.with_name("journal.jsonl.damaged")
    assert "1 of " in journal.damage and "run again" in journal.damage and str(damaged) in journal.damage
    assert damaged.read_bytes() == harmed
    found, _ = run(tiny, path, resume=True)
    assert found == expected
    assert len(keys(path)) == len(set(keys(path)))
    whole = ScoreJournal(path, identity, resume=True)
    whole.close()
    assert whole.damage is None, "it was mended"


def test_stopped_within_the_first_line_it_begins_anew(tiny, tmp_path):
    path = tmp_path / "journal.jsonl"
    expected, _ = run(tiny, path)
    first = path.read_bytes().split(b"\n")[0]
    path.write_bytes(first[: len(first) // 2])
    for _ in range(2):  # what is written then can be gone on from, too
        found, _ = run(tiny, path, resume=True)
        assert found == expected
    assert path.read_bytes().split(b"\n")[0] == first


def test_scores_survive_the_file_bit_by_bit(tmp_path):
    scores = torch.rand(3, 4, dtype=torch.float64) * 1e3
    journal = ScoreJournal(tmp_path / "journal.jsonl", {"a": 1})
    journal.add("calibration", "FS", 0, scores, 7)
    journal.close()
    again = ScoreJournal(tmp_path / "journal.jsonl", {"a": 1}, resume=True)
    assert torch.equal(again.get("calibration", "FS", 0), scores)
    assert again.layer_forwards("calibration") == 7 and again.resumed == 1
    assert again.get("held_out", "FS", 0) is None


def test_journals_of_other_searches_are_refused(tiny, tmp_path):
    path = tmp_path / "journal.jsonl"
    run(tiny, path)
    with pytest.raises(RunError, match="holds an earlier search: go on with --resume"):
        run(tiny, path)
    for other, options, data, named in (
        (model(5, seed=5), OPTIONS, None, "model_sha256"),
        (tiny, OPTIONS, windows(6, seed=1), "calibration_sha256"),
        (tiny, SearchOptions(objective="lm"), None, "objective: kl there, lm now"),
    ):
        with pytest.raises(RunError, match=f"belongs to another search .*{named}"):
            run(other, path, options, resume=True, data=data)
    path.write_text("no journal\n")
    with pytest.raises(RunError, match="is damaged"):
        run(tiny, path, resume=True)


def test_other_numbers_of_layers_may_be_asked_for_later(tiny, tmp_path):
    path = tmp_path / "journal.jsonl"
    run(tiny, path, SearchOptions(keep=("1/2",)))
    before = len(keys(path))
    found, _ = run(tiny, path, SearchOptions(keep=("1/2", "1")), resume=True)
    assert found["patterns"]["1"] == "FSSSS" and len(keys(path)) == len(set(keys(path))) > before
