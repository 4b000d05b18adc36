"""The rules see what they are for, and the faults strike where they are told to."""

import errno
import json
import os
import time
from dataclasses import replace

import pytest
import rules
from campaign import at_most
from json_mutations import spoil
from line_mutations import spoil_lines
from safetensors_mutations import read, spoil_shard, write
from tries import chance_of, contents, differences, result
from workshop import HUB_TOKEN, SECRET, Run

GOOD = Run(1, None, False, False, 0, 0.1, 0.1, "", "error: config.json: hidden_size 'x' is no number: mend it\n")


@pytest.mark.parametrize(
    "changes, names, said",
    [
        ({}, ("config.json",), None),
        ({}, ("tokenizer.json",), "names neither file nor value"),
        ({"err": ""}, (), "0 error messages"),
        ({"err": GOOD.err * 2}, (), "2 error messages"),
        ({"err": "Traceback (most recent call last):\n  File\nKeyError: 'x'\n"}, (), "a traceback: KeyError: 'x'"),
        ({"err": "error: " + "x" * 10_000}, (), "10,007 characters"),
        ({"err": f"error: {HUB_TOKEN}\n"}, (), "token is printed"),
        ({"out": SECRET}, (), "outside the checkpoint is printed"),
        ({"out": rules.ESCAPE}, (), "reaches the terminal"),
    ],
)
def test_messages(changes, names, said):
    found = rules.message(replace(GOOD, **changes), names)
    assert (found == []) if said is None else any(said in finding for finding in found), found


@pytest.mark.parametrize(
    "changes, must_fail, said",
    [
        ({}, None, None),
        ({"code": 0}, True, "where it must fail"),
        ({}, False, "where it must succeed"),
        ({"code": 70}, None, "exit code 70"),
        ({"code": None, "signal": 11}, None, "signal 11"),
        ({"code": None, "signal": 9, "late": True}, None, "hangs"),
        ({"code": None, "signal": 9, "greedy": True, "memory": 2**30}, None, "more than 1,024 MiB"),
    ],
)
def test_endings(changes, must_fail, said):
    found = rules.ending(replace(GOOD, **changes), must_fail)
    assert (found == []) if said is None else said in found[0], found


def test_what_is_touched_and_left(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "output").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    before = rules.snapshot(tmp_path)
    assert rules.touched(before, rules.snapshot(tmp_path), ("output",), False) == []
    shard = write({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"1234")
    (tmp_path / "output" / "whole.safetensors").write_bytes(shard)
    assert rules.left_behind(tmp_path, "output", before, False) == []
    (tmp_path / "output" / "half.safetensors").write_bytes(shard[:-1])
    (tmp_path / "output" / "config.json").write_text("{}")
    (tmp_path / "output" / "recipe.json").write_text("{")
    (tmp_path / "output" / "x.partial").write_text(SECRET)
    (tmp_path / "source" / "config.json").write_text("[]")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "stray").touch()
    assert len(rules.left_behind(tmp_path, "output", before, False)) == 4
    assert len(rules.left_behind(tmp_path, "output", before, True)) == 3
    assert rules.touched(before, rules.snapshot(tmp_path), ("output",), False) == [
        "outside the output, source/config.json is changed",
        "outside the output, tmp/stray is new",
    ]
    assert rules.kept_in(tmp_path, ("output",)) == ["x.partial in the output holds what lies outside the checkpoint"]
    assert differences({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == [
        "c is too much in the result",
        "b differs from the undisturbed result",
    ]


def test_results_are_compared_without_where_they_were_made(tmp_path):
    here = {
        "cpu": "16 cores, x86_64",
        "threads": 1,
        "device": "cpu",
        "date": "2026-01-01",
        "commit": "a",
        "torch": "2",
    }
    there = {
        "cpu": "1 cores, x86_64",
        "threads": 8,
        "device": "H200",
        "date": "2026-01-02",
        "commit": "b",
        "torch": "2",
    }

    def written(versions, **more):
        (tmp_path / "evaluation.json").write_text(json.dumps({"loss": 1.0, "cpu": "x", "versions": versions, **more}))
        return contents(tmp_path)

    expected = written(here)
    assert differences(expected, written(there)) == []
    for differing in (written({**here, "torch": "3"}), written(here, loss=2.0), written(here, cpu="y")):
        assert len(differences(expected, differing)) == 1


def test_tries_repeat_and_differ():
    document = json.dumps({"a": 1, "b": {"c": [1, 2], "d": "x"}, "e": None}).encode()
    shard = write({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(16))
    assert read(shard)[1] == bytes(16)
    for spoilt, data in ((spoil, document), (spoil_shard, shard), (spoil_lines, b'{"a": 1}\n{"b": 22}\n')):
        twice = [[spoilt(data, chance_of(3, "x", number)) for number in range(60)] for _ in range(2)]
        assert [one.data for one in twice[0]] == [one.data for one in twice[1]]
        assert len({one.data for one in twice[0]}) > 15
        assert sum(one.data != data for one in twice[0]) > 50


@pytest.mark.slow
def test_faults_strike_where_they_are_told(shop):
    convert = ["convert", "source", "output", "--keep", "1/2"]
    left = []
    for _ in range(2):
        box = shop.box("deepseek", "struck")
        run = shop.run(box, convert, {"kind": "kill", "at": 12, "torn": 0.5})
        assert (run.code, run.signal) == (None, 9)
        left.append({name: entry.content for name, entry in rules.snapshot(box / "output").items()})
    # The journal holds times of this sandbox's files.
    assert left[0].keys() == left[1].keys() and left[0]
    for fault, code, said in (
        ({"kind": "interrupt", "at": 12}, 130, "interrupted"),
        ({"kind": "error", "at": 12, "errno": errno.EIO}, 1, "Input/output error"),
        ({"kind": "full", "bytes": 3000}, 1, "disk is full"),
        ({"kind": "file_size", "bytes": 3000}, 1, "File too large"),
    ):
        run = shop.run(shop.box("deepseek", "struck"), convert, fault)
        assert run.code == code and said in run.err, (fault, run)


@pytest.mark.slow
def test_hangs_and_greed_are_stopped(shop, monkeypatch):
    box = shop.box("deepseek", "struck")
    monkeypatch.setattr(shop, "seconds", 2.0)
    run = shop.run(
        box,
        ["convert", "source", "output", "--keep", "1/2"],
        {"kind": "pause", "at": 1, "file": str(box / "tmp" / "never")},
    )
    assert run.late and run.signal == 9
    monkeypatch.setattr(shop, "seconds", 600.0)
    monkeypatch.setattr(shop, "memory", -(2**40))
    assert shop.run(box, ["inspect", "source"]).greedy


def test_what_a_try_leaves_does_not_hang_its_judge(tmp_path):
    """An output with a pipe among its results: reading it would wait for a writer for ever."""
    (tmp_path / "output").mkdir()
    os.mkfifo(tmp_path / "output" / "left.json")
    (tmp_path / "output" / "evaluation.json").write_text("{")
    with at_most(20, "judging"):
        found = result(None, tmp_path, ["eval", "source", "--output", "output"], replace(GOOD, code=0))
    assert len(found) == 1 and "evaluation.json is no JSON" in found[0]


def test_a_try_that_hangs_ends():
    with pytest.raises(TimeoutError, match="kind:7 takes more than 1 s"), at_most(1, "kind:7"):
        time.sleep(20)
