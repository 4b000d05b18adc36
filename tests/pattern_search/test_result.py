"""A result of a search that was damaged is told what is wrong with it, by every verb that reads it."""

import copy
import json

import pytest
from typer.testing import CliRunner

from indexcache.cli import app
from indexcache.pattern_search import result
from indexcache.pattern_search.drawing import draw_result, draw_summary
from indexcache.runs.errors import RunError

SCORES = {"loss": 2.5, "recall": 0.5}
DOCUMENT = {
    "format": result.FORMAT,
    "num_layers": 3,
    "patterns": {"3": "FFF", "1": "FSS"},
    "index_share_pattern": "FSS",
    "keep": 1,
    "asked_for": [1],
    "steps": [{"layer": 2, "full_layers": 2, "pattern": "FFS"}, {"layer": 1, "full_layers": 1, "pattern": "FSS"}],
    "curve": [
        {"method": "search", "full_layers": 3, "pattern": "FFF", "held_out": SCORES},
        {"method": "search", "full_layers": 1, "pattern": "FSS", "held_out": SCORES},
    ],
    "recipe": {"algorithm": "lazy", "objective": "kl"},
    "source": {"name": "x", "pattern": "FFF"},
    "data": {name: {"origin": "d", "windows": 1, "seqlen": 8} for name in ("calibration", "held_out")},
    "date": "2026-11-30",
    "cost": {"search_layer_forwards": 9, "held_out_layer_forwards": 3},
}


def paths(value, path=()):
    """Every place in nested values."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*path, key))


def changed(path, new):
    document = copy.deepcopy(DOCUMENT)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if new is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return document


def test_a_sound_one_is_read_and_drawn(tmp_path):
    (tmp_path / "patterns.json").write_text(json.dumps(DOCUMENT))
    assert result.read_result(tmp_path / "patterns.json") == DOCUMENT
    draw_summary(DOCUMENT)


@pytest.mark.parametrize("path", [path for path in paths(DOCUMENT) if path], ids=lambda path: ".".join(map(str, path)))
def test_whatever_is_changed_is_drawn_or_refused(tmp_path, path):
    """A value of any other type, or none at all: never an exception of another kind."""
    refused = 0
    for new in (None, 7, "seven", [], {}, [[]], True, 2.5, "FFF"):
        (tmp_path / "patterns.json").write_text(json.dumps(changed(path, new)))
        try:
            document = result.read_result(tmp_path / "patterns.json")
        except RunError as error:
            assert "is damaged: " in str(error) or "its format is not" in str(error)
            refused += 1
        else:
            draw_result(document)
    assert refused >= 4


def test_the_verbs_say_it(tmp_path):
    path = tmp_path / "patterns.json"
    for content, message in (
        (json.dumps(changed(("steps", 0, "pattern"), 5)), "steps[0].pattern must be a str (got 5)"),
        (json.dumps(changed(("cost", "search_layer_forwards"), None)), "cost.search_layer_forwards is missing"),
        (json.dumps(changed(("patterns", "1"), "FFS")), "FFS does not have 1 full layers"),
        ("[" * 100_000, "is no readable result"),
        (json.dumps(changed(("cost", "search_layer_forwards"), float("nan"))), "NaN is no JSON number"),
    ):
        path.write_text(content)
        finished = CliRunner().invoke(app, ["inspect", str(path)])
        assert finished.exit_code == 2 and message in " ".join(finished.stderr.split()), finished.output
