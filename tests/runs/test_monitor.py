"""What long work says: a line where a step is worth one, a bar on a terminal."""

import sys

import pytest

from indexcache.runs.monitor import Monitor, TerminalMonitor


def work(monitor):
    with monitor:
        monitor.begin("search", 3)
        monitor.step("FFSF 0.2500")
        monitor.begin("dense stage", 4)
        monitor.step()
        monitor.step()
        monitor.entry("kl 0.5000")
        monitor.advance(12)
        monitor.warn("something is likely wrong")


def test_elsewhere_than_on_a_terminal_lines_are_the_steps_with_text_and_the_entries(capsys):
    work(TerminalMonitor())
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if " stage" in line or "search" in line]
    assert [line.split(" (")[0] for line in lines] == ["search 1/3: FFSF 0.2500", "dense stage 2/4: kl 0.5000"]
    assert lines[0].endswith(" left)") and lines[1].endswith(" s a step)")
    assert "something is likely wrong" in said.err and said.out == ""


def test_on_a_terminal_a_bar_shows_the_last_text(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monitor = TerminalMonitor()
    work(monitor)
    (task,) = monitor._bar.tasks
    assert (task.completed, task.total, task.description) == (2, 4, "dense stage: kl 0.5000")
    assert task.fields["speed"].endswith(" layers/s")


@pytest.mark.parametrize("stream", ["out", "err"])
def test_the_base_is_silent(capsys, stream):
    work(Monitor())
    assert getattr(capsys.readouterr(), stream) == ""
