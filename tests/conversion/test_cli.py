"""The command line: exit codes, messages without tracebacks, JSON that is nothing but JSON."""

import json
import subprocess
import sys

import pytest
from testing.checkpoints import build, hashes
from testing.time_limits import PROCESS_SECONDS
from typer.testing import CliRunner

from indexcache.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def source(tmp_path):
    return build(tmp_path / "s", mtp=1)


def test_convert_verify_inspect(tmp_path, source):
    done = run("convert", source, tmp_path / "o", "--keep", "1/2")
    assert done.exit_code == 0, done.output
    assert "pattern FSFS" in done.stdout and "of indexer weights dropped" in done.stdout
    checked = run("verify", source, tmp_path / "o", "--no-logits")
    assert checked.exit_code == 0 and "verified" in checked.stdout and "layers 1, 3, all shared" in checked.stdout
    shown = run("inspect", tmp_path / "o")
    assert shown.exit_code == 0 and "F S F S" in shown.stdout and "layer 2" in shown.stdout


def test_a_difference_ends_with_one(tmp_path, source):
    assert run("convert", source, tmp_path / "o", "--keep", "1/2").exit_code == 0
    other = build(tmp_path / "t", mtp=1, seed=5)
    checked = run("verify", other, tmp_path / "o", "--no-logits")
    assert checked.exit_code == 1 and "not verified" in checked.stdout and "differs from the source" in checked.stdout


def test_dry_run_writes_nothing(tmp_path, source):
    shown = run("convert", source, tmp_path / "o", "--pattern", "FSSS", "--dry-run")
    assert shown.exit_code == 0 and "15 dropped" in shown.stdout and "rewritten" in shown.stdout
    assert not (tmp_path / "o").exists()


def test_json_is_all_of_stdout(tmp_path, source):
    plan = json.loads(run("convert", source, tmp_path / "o", "--pattern", "FSSS", "--dry-run", "--json").stdout)
    done = json.loads(run("convert", source, tmp_path / "o", "--pattern", "FSSS", "--json").stdout)
    assert plan["dropped"] == done["dropped"] == 15 and done["output"] == str(tmp_path / "o")
    assert set(done["how"]) == {shard["file"] for shard in plan["shards"]}
    checked = json.loads(run("verify", source, tmp_path / "o", "--no-logits", "--json").stdout)
    assert checked["ok"] is True and checked["indexers_dropped"] == [1, 2, 3]
    assert json.loads(run("inspect", tmp_path / "o", "--json").stdout)["pattern"] == "FSSS"
    assert json.loads(run("env", "--json").stdout)["indexcache"]


@pytest.mark.parametrize("arguments, message", [
    ([], "give --pattern, --pattern-file or --keep"),
    (["--pattern", "SFFF"], "must start with 'F'"),
    (["--pattern", "FSSS", "--keep", "1/4"], "--pattern stands alone"),
    (["--keep", "9"], "keep as a count must lie in 1 .. 4"),
    (["--keep", "1/4", "--max-shard-size", "big"], "--max-shard-size 'big' is no size"),
    (["--keep", "1/4", "--private"], "--private belongs to --push-to-hub"),
    (["--keep", "1/4", "--dry-run", "--resume"], "--dry-run writes nothing"),
    (["--keep", "1/4", "--dtype", "int8"], "int8"),
    (["--keep", "1/4", "--nonsense"], "--nonsense"),
])  # fmt: skip
def test_bad_usage_ends_with_two(tmp_path, source, arguments, message):
    result = run("convert", source, tmp_path / "o", *arguments)
    assert result.exit_code == 2 and message in result.output.replace("\n", " ")
    assert not (tmp_path / "o").exists()


def test_failures_end_with_one_and_no_traceback(tmp_path, source):
    before = hashes(source)
    for arguments, message in (
        (["convert", source, source, "--keep", "1/4"], "is the source itself"),
        (["convert", tmp_path / "absent", tmp_path / "o", "--keep", "1/4"], "is no folder here, nor a Hub id"),
        (["convert", source, tmp_path / "o", "--keep", "1/4", "--revision", "v1"], "belongs to a Hub source"),
        (["verify", source, source], "give the source first"),
        (["inspect", tmp_path], "config.json is missing"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1 and message in result.stderr and result.stderr.startswith("error: ")
        assert "Traceback" not in result.output and isinstance(result.exception, SystemExit)
    assert hashes(source) == before


def test_pattern_file_and_shard_size(tmp_path, source):
    (tmp_path / "p.json").write_text('{"patterns": {"1": "FSSS", "2": "FSSF"}}')
    done = run("convert", source, tmp_path / "o", "--pattern-file", tmp_path / "p.json", "--keep", "2",
               "--max-shard-size", "20KB", "--json")  # fmt: skip
    found = json.loads(done.stdout)
    assert found["pattern"] == "FSSF" and len(found["shards"]) > 10
    assert all(shard["bytes"] <= 20_000 for shard in found["shards"])


def test_an_unreadable_file_is_a_message(tmp_path, source, monkeypatch):
    from indexcache.conversion.convert import convert as module

    def unreadable(*_, **__):
        raise PermissionError(13, "Permission denied", "model-00001-of-00003.safetensors")

    monkeypatch.setattr(module, "write_shard", unreadable)
    result = run("convert", source, tmp_path / "o", "--pattern", "FSSS")
    assert result.exit_code == 1 and "model-00001-of-00003.safetensors: Permission denied" in result.stderr


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nsys.argv = ['indexcache', '--help']\nfrom indexcache.cli import app\n"
        "app(standalone_mode=False)\nsys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], check=True, timeout=PROCESS_SECONDS, capture_output=True, text=True
    )
    assert all(verb in shown.stdout for verb in ("convert", "verify", "inspect", "env"))
