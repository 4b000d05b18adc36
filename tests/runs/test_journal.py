"""The journal's file: checked line by line, held by one process, and refused where it cannot be trusted."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from indexcache.benchmarks.bench.speed_plan import Row
from indexcache.benchmarks.bench.speed_run import RowJournal
from indexcache.runs.errors import RunError
from indexcache.runs.journal import ScoreJournal

IDENTITY = {"model": "a", "seed": 1}


def write(path, count=6):
    journal = ScoreJournal(path, IDENTITY)
    for number in range(count):
        journal.add("windows", "FS" * (number + 1), number, torch.full((2, 4), number + 0.1).double(), 3)
    journal.close()
    return path.read_bytes()


def scores(journal, count=6):
    """What each round's record says; None where it is to be run again."""
    return [journal.get("windows", "FS" * (number + 1), number) for number in range(count)]


def test_any_changed_byte_is_noticed(tmp_path):
    """A record is either what was written or run again; which of the two is said."""
    path = tmp_path / "journal.jsonl"
    content = write(path)
    random_ = random.Random(0)
    for _ in range(300):
        at = random_.randrange(len(content))
        path.write_bytes(content[:at] + bytes([random_.randrange(256)]) + content[at + 1 :])
        changed = path.read_bytes() != content
        try:
            journal = ScoreJournal(path, IDENTITY, resume=True)
        except RunError as error:
            assert changed and ("first line" in str(error) or "another search" in str(error))
            continue
        found = scores(journal)
        journal.close()
        for number, table in enumerate(found):
            assert table is None or torch.equal(table, torch.full((2, 4), number + 0.1).double())
        lost = sum(table is None for table in found)
        # The newline of the last line is what a crash leaves off.
        assert bool(journal.damage) == (lost > 0) or (at == len(content) - 1 and lost == 1), (at, journal.damage)
        assert journal.resumed == len(found) - lost


def test_lines_taken_out_are_noticed_but_at_the_end_where_a_crash_leaves_none(tmp_path):
    path = tmp_path / "journal.jsonl"
    lines = write(path).splitlines(keepends=True)
    for gone in range(1, len(lines)):
        path.write_bytes(b"".join(lines[:gone] + lines[gone + 1 :]))
        journal = ScoreJournal(path, IDENTITY, resume=True)
        journal.close()
        assert (journal.damage is None) == (gone == len(lines) - 1)
        assert journal.resumed == len(lines) - 2
        if journal.damage:
            assert f"that of line {gone + 1})" in journal.damage


def test_a_first_line_that_says_nothing_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    lines = write(path).splitlines(keepends=True)
    # The third is of a release that wrote no checksums.
    for first in (b"{}\n", b"[" * 100_000 + b"\n", json.dumps({"identity": IDENTITY}).encode() + b"\n", b"\xff\n"):
        path.write_bytes(b"".join([first, *lines[1:]]))
        before = path.read_bytes()
        with pytest.raises(RunError, match=r"damaged in its first line.*start again with --overwrite"):
            ScoreJournal(path, IDENTITY, resume=True)
        assert path.read_bytes() == before


def test_two_processes_do_not_write_one_file(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "journal.jsonl"
    first = ScoreJournal(path, IDENTITY)
    for way in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(RunError, match="is being written by another process"):
            ScoreJournal(path, IDENTITY, **way)
    first.add("windows", "FS", 0, torch.zeros(1, 4), 1)
    first.close()
    second = ScoreJournal(path, IDENTITY, resume=True)
    second.close()
    assert second.resumed == 1 and second.damage is None


def test_overwriting_forgets_all(tmp_path):
    path = tmp_path / "journal.jsonl"
    write(path)
    journal = ScoreJournal(path, {"other": 1}, overwrite=True)
    journal.close()
    assert journal.resumed == 0 and len(path.read_bytes().splitlines()) == 1
    ScoreJournal(path, {"other": 1}, resume=True).close()


def test_rows_of_a_benchmark_are_checked_likewise(tmp_path):
    path = tmp_path / "journal.jsonl"
    rows = [Row("generate", "indexcache", tokens, "own") for tokens in (16, 32)]
    journal = RowJournal(path, IDENTITY, False, False)
    for row in rows:
        journal.add_row(row, {"ttft": 1.5})
    journal.close()
    path.write_bytes(path.read_bytes().replace(b"1.5", b"1.4", 1))
    again = RowJournal(path, IDENTITY, True, False)
    again.close()
    assert list(again.rows) == rows[1:] and "1 of 2" in again.damage


def test_a_full_disk_names_the_journal_and_how_to_go_on(tmp_path, monkeypatch):
    journal = ScoreJournal(tmp_path / "journal.jsonl", IDENTITY)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; --resume goes on .*journal\.jsonl"):
        journal.add("windows", "FS", 0, torch.zeros(2, 4), 3)
    monkeypatch.undo()
    journal.close()
    again = ScoreJournal(tmp_path / "journal.jsonl", IDENTITY, resume=True)
    again.add("windows", "FS", 0, torch.ones(2, 4), 3)
    again.close()
    third = ScoreJournal(tmp_path / "journal.jsonl", IDENTITY, resume=True)
    third.close()
    assert third.damage is None and torch.equal(third.get("windows", "FS", 0), torch.ones(2, 4).double())


def test_journals_of_the_previous_release_go_on(tmp_path):
    """Files that 0.2.0 wrote, before scores and rows had journals of their own kinds."""
    written = Path(__file__).parent / "written_by_0_2"
    shutil.copytree(written, tmp_path / "old")
    search = ScoreJournal(
        tmp_path / "old" / "search.jsonl", {"model_sha256": "a" * 64, "algorithm": "lazy"}, resume=True
    )
    assert (search.resumed, search.damage) == (3, None)
    found = search.get("calibration", "FSFF", 0)
    assert found.tolist() == [[0.75, 2.375, 0.1, 0.0], [0.3, 2.5, 0.2, 1.0]]
    assert search.layer_forwards("calibration") == 7
    search.add("held_out", "FFFF", 0, torch.zeros(1, 4), 4)
    search.close()
    lines = (tmp_path / "old" / "search.jsonl").read_bytes()
    assert lines.startswith((written / "search.jsonl").read_bytes()) and lines.count(b"\n") == 5
    bench = RowJournal(tmp_path / "old" / "bench.jsonl", {"shape": "tiny", "device": "x86_64"}, True, False)
    bench.close()
    assert (bench.resumed, bench.damage) == (2, None)
    assert bench.rows[Row("generate", "indexcache", 16, "own", "static")] == {"ttft_ms": 1.5, "took_seconds": 0.2}
    assert bench.rows[Row("full cache", "indexcache", 32, "FSFS", "", 4)]["out_of_memory"] == "not one sequence fits"
