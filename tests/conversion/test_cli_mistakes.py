"""Ordinary mistakes and odd names with convert, verify and inspect: a message and an exit code, never a traceback."""

import json
import os
import shutil
from pathlib import Path

import pytest
from testing.checkpoints import build
from typer.testing import CliRunner

from indexcache.cli import app
from indexcache.pattern_search import result


def run(*arguments):
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(argument) for argument in arguments])


def message(*arguments, code=1):
    finished = run(*arguments)
    assert finished.exit_code == code, (finished.output, finished.exception)
    assert "Traceback" not in finished.output and isinstance(finished.exception, SystemExit)
    assert finished.stderr.startswith("error: ")
    return finished.stderr


@pytest.fixture
def source(tmp_path):
    return build(tmp_path / "s")


def test_a_folder_where_a_file_is_meant_and_the_reverse(tmp_path, source):
    (tmp_path / "file").write_text("x")
    out = tmp_path / "o"
    assert "no readable JSON pattern file" in message("convert", source, out, "--pattern-file", tmp_path, code=2)
    assert "is no folder here" in message("convert", tmp_path / "file", out, "--keep", "1/2")
    assert "is no folder" in message("convert", source, tmp_path / "file", "--keep", "1/2")
    assert "file" in message("convert", source, tmp_path / "file" / "o", "--keep", "1/2")
    assert "is no folder here" in message("verify", source, tmp_path / "file")
    assert "is no readable result of a search" in message("inspect", tmp_path / "file", code=2)
    assert "config.json is missing" in message("inspect", tmp_path)
    (source / "config.json").unlink()
    (source / "config.json").mkdir()
    assert "config.json is no regular file" in message("inspect", source)


def test_no_permission(tmp_path, source, monkeypatch):
    """As the system says it; the tests may run as root, whom nothing is forbidden."""
    scandir = os.scandir

    def guarded(folder):
        if Path(folder).name == "encoding":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)
    found = message("convert", source, tmp_path / "o", "--keep", "1/2")
    assert f"{source / 'encoding'}: Permission denied" in found and not (tmp_path / "o").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '{"a": "\\ud800"}', "[" * 5000])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
def test_unreadable_json(tmp_path, source, file, text):
    (source / file).write_text(text)
    assert file in message("convert", source, tmp_path / "o", "--pattern", "FSFS")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("file", ["config.json", "indexcache_recipe.json"])
def test_verify_names_the_unreadable_file(tmp_path, source, file):
    assert run("convert", source, tmp_path / "o", "--keep", "1/2").exit_code == 0
    (tmp_path / "o" / file).write_text('{"a": [')
    assert f"{file} is not valid JSON" in message("verify", source, tmp_path / "o", "--no-logits")


def test_a_stale_index_and_a_truncated_shard_in_every_verb(tmp_path, source):
    assert run("convert", source, tmp_path / "o", "--keep", "1/2", "--copy").exit_code == 0
    shard = source / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 3)
    for arguments in (
        ("convert", source, tmp_path / "p", "--keep", "1/2"),
        ("inspect", source),
        ("verify", source, tmp_path / "o"),
    ):
        assert f"{shard.name} is truncated" in message(*arguments)


def test_a_layer_count_that_the_weights_contradict_is_not_walked_through(tmp_path, source):
    config = json.loads((source / "config.json").read_text())
    assert run("convert", source, tmp_path / "o", "--keep", "1/2").exit_code == 0
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2**31}))
    for arguments in (
        ("convert", source, tmp_path / "p", "--keep", "1/2"),
        ("inspect", source),
        ("verify", source, tmp_path / "o"),
    ):
        assert "num_hidden_layers=2147483648, and the weights hold 4 layers" in message(*arguments)


# ---- a search's result ----------------------------------------------------------------------------------------------


def search_result(**changes):
    data = {"windows": 2, "seqlen": 80, "origin": "text"}
    document = {
        "format": result.FORMAT,
        "num_layers": 4,
        "patterns": {"4": "FFFF", "2": "FSFS"},
        "asked_for": [2],
        "curve": [
            {"method": "search", "full_layers": 4, "pattern": "FFFF", "held_out": {"loss": 1.0}},
            {"method": "search", "full_layers": 2, "pattern": "FSFS", "held_out": {"loss": 1.1}},
        ],
        "steps": [{"full_layers": 2, "layer": 3, "pattern": "FSFS"}],
        "recipe": {"algorithm": "greedy", "objective": "loss"},
        "source": {"name": "s", "pattern": "FFFF"},
        "data": {"calibration": data, "held_out": data},
        "cost": {"search_layer_forwards": 3, "held_out_layer_forwards": 2},
        "date": "2026-11-30",
    }
    return {**document, **changes}


def test_a_result_is_shown(tmp_path):
    (tmp_path / "patterns.json").write_text(
        json.dumps(search_result(source={"name": "a[/b][red]", "pattern": "FFFF"}))
    )
    shown = run("inspect", tmp_path / "patterns.json")
    assert shown.exit_code == 0 and "FSFS" in shown.stdout and "Patterns of a[/b][red]" in shown.stdout


@pytest.mark.parametrize("changes, fault", [
    ({"patterns": []}, "patterns must be a dict (got [])"),
    ({"patterns": {"four": "FFFF"}}, "FFFF does not have four full layers"),
    ({"patterns": {"4": ["F"]}}, "patterns.4 must be a str"),
    ({"curve": [{"method": "search"}]}, "curve[0].full_layers is missing"),
    ({"curve": [3]}, "curve[0] must be a dict (got 3)"),
    ({"data": {"calibration": {}}}, "data.calibration.origin is missing"),
    ({"steps": {}}, "steps must be a list"),
    ({"source": None}, "source must be a dict"),
    ({"num_layers": "4"}, 'num_layers must be a int (got "4")'),
    ({"cost": {"search_layer_forwards": True}}, "must be a int (got true)"),
    ({"keep": []}, "keep must be a int"),
])  # fmt: skip
def test_a_damaged_result_is_a_message(tmp_path, changes, fault):
    (tmp_path / "patterns.json").write_text(json.dumps(search_result(**changes)))
    found = message("inspect", tmp_path / "patterns.json", code=2)
    assert "patterns.json is damaged" in found and fault in found


@pytest.mark.parametrize("text", ["null", "3", '"FSFS"', "[]", '{"patterns": ["FSFS"]}', '{"patterns": {"2": 7}}',
                                  '{"patterns": {"2": "FSSS"}}', '{"index_share_pattern": {"a": 1}}', "\x00",
                                  '{"index_share_pattern": [["F"]]}', "[" * 5000])  # fmt: skip
def test_a_pattern_file_of_a_wrong_kind_is_a_message(tmp_path, source, text):
    (tmp_path / "p.json").write_text(text)
    found = message("convert", source, tmp_path / "o", "--pattern-file", tmp_path / "p.json", "--keep", "2", code=2)
    assert "p.json" in found


# ---- names ----------------------------------------------------------------------------------------------------------


def test_names_in_brackets_are_printed_as_they_are(tmp_path, source):
    folder, odd = tmp_path / "a[red]b[", "model[bold]-0.safetensors"
    shutil.copytree(source, folder)
    (folder / "model-00001-of-00003.safetensors").rename(folder / odd)
    index = (folder / "model.safetensors.index.json").read_text()
    (folder / "model.safetensors.index.json").write_text(index.replace("model-00001-of-00003.safetensors", odd))
    planned = run("convert", folder, tmp_path / "o[/i]", "--keep", "1/2", "--dry-run")
    assert planned.exit_code == 0 and str(folder) in planned.stdout and odd in planned.stdout
    done = run("convert", folder, tmp_path / "o[/i]", "--keep", "1/2")
    assert done.exit_code == 0 and f"{tmp_path / 'o[/i]'}: pattern FSFS" in done.stdout
    shown = run("inspect", tmp_path / "o[/i]")
    assert shown.exit_code == 0 and str(tmp_path / "o[/i]") in shown.stdout
    config = json.loads((tmp_path / "o[/i]" / "config.json").read_text())
    (tmp_path / "o[/i]" / "config.json").write_text(json.dumps({**config, "ep_size": "[/bold]"}))
    checked = run("verify", folder, tmp_path / "o[/i]", "--no-logits")
    assert checked.exit_code == 1 and "ep_size is 1 in the source and '[/bold]' now" in checked.stdout
    assert f"{tmp_path / 'o[/i]'} is no folder" not in message("convert", tmp_path / "[/none]", "x", "--keep", "1/2")
    assert str(tmp_path / "[/none]") in message("inspect", tmp_path / "[/none]")


def test_names_that_are_no_text_are_shown_by_their_escapes(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/absent\xff")
    assert r"absent\udcff" in message("inspect", name)


def test_control_characters_reach_no_terminal(tmp_path, source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": "\x1b[31mx"}))
    planned = run("convert", source, tmp_path / "o", "--keep", "1/2", "--dry-run")
    assert planned.exit_code == 0 and "\x1b[31mx" not in planned.output and r"\x1b[31mx" in planned.output
    (source / "tokenizer\x1b[31m.json").write_text("{}")
    found = message("convert", source, tmp_path / "o", "--keep", "1/2")
    assert r"'tokenizer\x1b[31m.json' holds control characters" in found
    assert r"\x1b[31m" in message("inspect", tmp_path / "\x1b[31m")
