"""The demo runs to its end, twice, and shows what it promises."""

import importlib.util
from pathlib import Path

import pytest

import indexcache
from indexcache.evaluation.perplexity import evaluate_windows


@pytest.fixture
def walkthrough(monkeypatch, tmp_path):
    """The script as a module, writing elsewhere and scoring one window of the four."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = Path(indexcache.__file__).parent / "demo" / "walkthrough.py"
    spec = importlib.util.spec_from_file_location("walkthrough", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.OUTPUT = tmp_path / "output"
    module.evaluate_windows = lambda model, ids, recall: evaluate_windows(model, ids[:1], recall[:1])
    return module


def test_the_demo_runs_and_runs_again(walkthrough, capfd, monkeypatch):
    monkeypatch.setattr(walkthrough, "generate_elsewhere", lambda checkpoint: None)
    walkthrough.main()
    monkeypatch.undo()
    walkthrough.compare = lambda: None
    walkthrough.main()
    shown = capfd.readouterr().out
    assert shown.count("$ indexcache convert") == 6
    assert shown.count("\nverified\n") == 2
    assert "# IndexCacheForCausalLM, pattern FFSSSSFFSSSS" in shown
    searched, uniform = (
        next(line for line in shown.splitlines() if f"│ {name} " in line) for name in ("searched", "uniform")
    )
    assert "4 of 12" in searched
    assert "4 of 12" in uniform
    assert "496,640" in searched
