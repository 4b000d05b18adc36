"""`indexcache refresh`: today's code in a checkpoint of an older release, and every other byte as it was."""

import json
import re
import shutil
from pathlib import Path

import pytest
from testing.checkpoints import build, hashes
from testing.hub_contents import File
from testing.tiny_models import tiny_model
from typer.testing import CliRunner

import indexcache
from indexcache import SharePattern
from indexcache.cli import app
from indexcache.configuration import hub_code
from indexcache.conversion.convert.convert import ConvertOptions, convert
from indexcache.conversion.io.hub_source import HubSource
from indexcache.conversion.io.open_checkpoint import open_source
from indexcache.conversion.io.sources import ConversionError, FolderSource
from indexcache.conversion.publish import refresh as refresh_module
from indexcache.conversion.publish.refresh import _with_field, plan_refresh, refresh

OLD = "0.0.9"
CODE = hub_code.hub_code()
HEADER = f"# IndexCache for Transformers {indexcache.__version__}."
LOAD = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model.generate(torch.arange(12)[None], max_new_tokens=4, do_sample=False).tolist())
"""


@pytest.fixture(scope="module")
def model():
    return tiny_model(index_share_pattern="FSFS", eos_token_id=None)


@pytest.fixture
def old(aged, tmp_path, monkeypatch):
    """A copy of `aged`; the check of the code's imports, which costs a second, has its own tests."""
    monkeypatch.setattr(refresh_module, "checked_hub_code", lambda: dict(CODE))
    return Path(shutil.copytree(aged, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def aged(model, tmp_path_factory):
    """A checkpoint as an older release left it: other code, a file that has gone since, one that was not there yet."""
    folder = tmp_path_factory.mktemp("aged") / "checkpoint"
    model.save_pretrained(folder, max_shard_size="200KB")
    for path in folder.glob("*.py"):
        path.write_text(path.read_text().replace(HEADER, HEADER.replace(indexcache.__version__, OLD)))
    broken = folder / "modeling_indexcache.py"
    broken.write_text(broken.read_text() + "\nraise RuntimeError('the old fault')\n")
    (folder / "old_kernel.py").write_text(f"{HEADER.replace(indexcache.__version__, OLD)} {hub_code._LICENCE}\n")
    (folder / "share_pattern.py").unlink()
    (folder / "handler.py").write_text("# an endpoint's own\n")
    (folder / "README.md").write_text("# Card\n")
    (folder / "encoding").mkdir()
    (folder / "encoding/encoding_dsv32.py").write_text("FORMAT = 1\n")
    config = folder / "config.json"
    text = config.read_text().replace('"hidden_size": ', '"odd":  [1,2.50],\n  "hidden_size": ', 1)
    config.write_text(re.sub(r'"indexcache_version": "[^"]*"', f'"indexcache_version": "{OLD}"', text))
    return folder


def test_a_checkpoint_of_a_file_a_module_gets_the_few(old):
    """Releases up to 0.2 wrote every module as a file: all of them go, what others put there stays."""
    header = f"{HEADER.replace(indexcache.__version__, OLD)} {hub_code._LICENCE}\n"
    modules = ["dispatch.py", "rotary.py", "eligibility.py", "lightning_indexer_triton.py"]
    for name in modules:
        (old / name).write_text(header)
    for name in ("kernels_sections.py", "modeling_indexcache_sections.py", "module_sections.py", "section_names.py"):
        (old / name).unlink()
    plan = plan_refresh(FolderSource(old))
    assert set(modules) <= set(plan.removed) and "kernels_sections.py" in plan.added
    refresh(FolderSource(old), plan)
    assert set(code_in(old)) == {*CODE, "handler.py"}


def code_in(folder):
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def do(source, **options):
    return refresh(source, plan_refresh(source), **options)


def test_code_is_today_s_and_everything_else_byte_for_byte(old, run_python):
    before, text = hashes(old), (old / "config.json").read_text()
    do(FolderSource(old))
    assert code_in(old) == CODE | {"handler.py": "# an endpoint's own\n"}
    after = hashes(old)
    untouched = {
        name for name in before if not name.endswith(".py") or name in ("handler.py", "encoding/encoding_dsv32.py")
    }
    assert {name: after[name] for name in untouched - {"config.json"}} == {
        name: before[name] for name in untouched - {"config.json"}
    }
    assert (old / "config.json").read_text() == text.replace('"0.0.9"', f'"{indexcache.__version__}"')
    assert set(after) == set(before) - {"old_kernel.py"} | {"share_pattern.py"}
    assert run_python(LOAD, old).stdout.startswith("[[")


def test_a_second_refresh_has_nothing_to_do(old):
    do(FolderSource(old))
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*")}
    assert plan_refresh(FolderSource(old)).is_current
    do(FolderSource(old))
    assert {path: path.stat().st_mtime_ns for path in old.rglob("*")} == before


@pytest.mark.parametrize("version", [None, OLD])
def test_dry_run_shows_and_writes_nothing(old, version):
    if version is None:
        config = old / "config.json"
        config.write_text(re.sub(r'\s*"indexcache_version": "[^"]*",', "", config.read_text()))
    before = hashes(old)
    result = CliRunner().invoke(app, ["refresh", str(old), "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert hashes(old) == before
    assert (document["from"], document["to"]) == (OLD, indexcache.__version__)
    assert (document["added"], document["removed"]) == (["share_pattern.py"], ["old_kernel.py"])
    assert set(document["changed"]) == CODE.keys() - {"share_pattern.py"}
    assert (document["config"], document["dry_run"], document["url"]) == (True, True, None)

    shown = CliRunner().invoke(app, ["refresh", str(old)])
    assert f"IndexCache {OLD} -> {indexcache.__version__}" in shown.stdout
    assert "removed: old_kernel.py" in shown.stdout
    assert "already" in CliRunner().invoke(app, ["refresh", str(old)]).stdout


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1}',
        '{\n  "a": 1,\n  "b": {"indexcache_version": "nested"}\n}\n',
        '{"a": [1.50, "}"],\t"b" : null }  \n\n',
        '\ufeff{\r\n "a": "\\u00e9 é",\r\n "b": NaN\r\n}',
        '{"indexcache_version": "0.0.9"}',
        '{"a": 1, "indexcache_version" :\n null, "b": 2}',
        '{\n  "indexcache_version": {"x": [1]},\n  "b": 2\n}',
    ],
)
def test_one_field_of_a_json_text_is_set_and_no_other_byte(text):
    changed = _with_field(text.encode(), "indexcache_version", "1.2.3", "x").decode()
    parse = lambda value: json.dumps(json.loads(value.encode().decode("utf-8-sig")), sort_keys=True)
    expected = json.loads(text.encode().decode("utf-8-sig")) | {"indexcache_version": "1.2.3"}
    assert parse(changed) == json.dumps(expected, sort_keys=True)
    # What was put in is one stretch; before and behind it stands the old text.
    start = equal_at_the_start(text, changed)
    tail = equal_at_the_start(text[start:][::-1], changed[start:][::-1])
    assert "1.2.3" in changed[start - 2 : len(changed) - tail + 2]
    removed = text[start : len(text) - tail]
    assert removed in ("", "null", '{"x": [1]}') or re.fullmatch(r"[\d.]+", removed)


def equal_at_the_start(one, other):
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def test_modes_stay_and_links_are_not_written_through(old, tmp_path):
    outside = tmp_path / "checkpoint/real.py"
    (old / "modeling_indexcache.py").rename(outside)
    (old / "modeling_indexcache.py").symlink_to(outside)
    content = outside.read_text()
    (old / "config.json").chmod(0o600)
    (old / "hub_code.py").chmod(0o640)
    do(FolderSource(old))
    assert (old / "config.json").stat().st_mode & 0o777 == 0o600
    assert (old / "hub_code.py").stat().st_mode & 0o777 == 0o640
    assert (old / "modeling_indexcache.py").read_text() == CODE["modeling_indexcache.py"]
    assert not outside.exists() or outside.read_text() == content


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("call", "after", "error"),
    [
        ("write", 0, OSError(13, "Permission denied")),
        ("write", -1, OSError(28, "No space left on device")),
        ("write", 3, Killed()),
        ("replace", 0, Killed()),
        ("replace", 3, OSError(5, "Input/output error")),
        ("replace", -1, Killed()),
    ],
)
def test_stopped_anywhere_it_is_finished_by_the_same_command(old, monkeypatch, call, after, error):
    before = hashes(old)
    owner, name = (refresh_module, "_write") if call == "write" else (refresh_module.os, "replace")
    real, done = getattr(owner, name), []
    plan = plan_refresh(FolderSource(old))
    last = len(plan.content) + after if after < 0 else after

    def breaks(*arguments):
        if len(done) == last:
            raise error
        done.append(arguments)
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, breaks)
        with pytest.raises((ConversionError, Killed)) as stopped:
            refresh(FolderSource(old), plan)
    if call == "write":
        assert hashes(old) == before, "nothing has changed before all is written"
    else:
        assert hashes(old)["config.json"] == before["config.json"], "the version is the last to change"
    if isinstance(error, OSError):
        assert re.search("is as it was: make room" if call == "write" else "same command again", str(stopped.value))
    do(FolderSource(old))
    assert code_in(old) == CODE | {"handler.py": "# an endpoint's own\n"}
    assert not list(old.glob("*.partial"))
    assert plan_refresh(FolderSource(old)).is_current


def set_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda folder: set_config(folder, model_type="deepseek_v32"), "'deepseek_v32' is no IndexCache checkpoint"),
        (lambda folder: set_config(folder, auto_map=None), "does not take the code beside it"),
        (
            lambda folder: set_config(folder, auto_map={"AutoConfig": "a/b--c.D"}),
            "refresh the repository that it names",
        ),
        (lambda folder: set_config(folder, indexcache_version="99.0"), "newer than the installed .*: upgrade"),
        (lambda folder: (folder / "share_pattern.py").write_text("MINE = 1\n"), r"not IndexCache's(.|\n)*share_patt"),
        (lambda folder: (folder / ".indexcache_convert.json").write_text("{}"), "is unfinished"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    ],
)
def test_what_is_no_checkpoint_of_ours_is_refused_untouched(old, spoil, complaint):
    spoil(old)
    before = hashes(old)
    result = CliRunner().invoke(app, ["refresh", str(old)])
    assert result.exit_code == 1
    assert re.search(complaint, result.stderr)
    assert hashes(old) == before


def test_a_snapshot_of_the_cache_is_refused(old, tmp_path):
    snapshot = tmp_path / "models--a--b/snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    old.rename(snapshot)
    with pytest.raises(ConversionError, match="snapshot in the Hub's cache"):
        plan_refresh(FolderSource(snapshot))


class TestHub:
    def test_one_commit_changes_code_and_version_alone(self, old, hub_here):
        hub_here.put(old, "tester/old")
        before = hub_here.tree("tester/old")
        hub_here.requests.clear()
        result = CliRunner().invoke(app, ["refresh", "tester/old", "--json"])
        assert result.exit_code == 0, result.output
        repo = hub_here.repos["model", "tester/old"]
        assert len(repo.log) == 2
        assert json.loads(result.stdout)["url"].endswith(repo.refs["main"])
        assert not any("safetensors" in request for request in hub_here.requests)
        do(FolderSource(old))
        after = hub_here.tree("tester/old")
        assert dict(after) == {
            path.relative_to(old).as_posix(): path.read_bytes() for path in old.rglob("*") if path.is_file()
        }
        assert after["README.md"] == before["README.md"]

        commits = len(repo.log)
        assert json.loads(CliRunner().invoke(app, ["refresh", "tester/old", "--json"]).stdout)["url"] is None
        assert len(repo.log) == commits, "no empty commit"

    def test_dry_run_needs_no_token_and_commits_nothing(self, old, hub_here, monkeypatch):
        hub_here.put(old, "tester/old")
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("indexcache.conversion.publish.hub.get_token", lambda: None)
        result = CliRunner().invoke(app, ["refresh", "tester/old", "--dry-run"])
        assert result.exit_code == 0, result.output
        assert "removed: old_kernel.py" in result.stdout
        assert len(hub_here.repos["model", "tester/old"].log) == 1
        refused = CliRunner().invoke(app, ["refresh", "tester/old"])
        assert "no Hub token" in refused.stderr

    def test_a_commit_in_between_is_not_overwritten(self, old, hub_here):
        hub_here.put(old, "tester/old")
        source = HubSource("tester/old")
        plan = plan_refresh(source)
        repo = hub_here.repos["model", "tester/old"]
        repo.commit("main", repo.commits[repo.refs["main"]] | {"new.txt": File(b"x")}, "in between")
        with pytest.raises(ConversionError, match="somebody has committed to tester/old in the meantime"):
            refresh(source, plan)
        assert repo.log[-1]["title"] == "in between"

    def test_a_branch_of_its_own_and_no_commit(self, old, hub_here):
        commit = hub_here.put(old, "tester/old")
        hub_here.put(old, "tester/old", branch="quarter")
        do(HubSource("tester/old", revision="quarter"), revision="quarter")
        assert "old_kernel.py" in hub_here.tree("tester/old")
        assert "old_kernel.py" not in hub_here.tree("tester/old", "quarter")
        with pytest.raises(ConversionError, match="give a branch of tester/old"):
            do(HubSource("tester/old", revision=commit), revision=commit)


NEWER = """
from importlib import metadata
real = metadata.version
metadata.version = lambda name: sys.argv[2] if name == "indexcache" else real(name)
from transformers import AutoConfig, AutoModelForCausalLM
AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


@pytest.mark.parametrize(("installed", "times"), [("99.0", 1), (indexcache.__version__, 0), ("0.0.1", 0)])
def test_an_older_checkpoint_s_code_says_once_that_a_newer_release_is_installed(
    model, tmp_path, run_python, installed, times
):
    model.save_pretrained(tmp_path / "checkpoint")
    told = run_python(NEWER, tmp_path / "checkpoint", installed).stderr
    assert told.count("`indexcache refresh`") == times, told
    assert told.count(f"IndexCache {indexcache.__version__}, and {installed} is installed") == times


def test_the_package_itself_says_nothing_of_releases():
    assert hub_code.newer_release_installed() is None
    assert hub_code.code_version() == indexcache.__version__


@pytest.fixture
def converted_by_an_older_release(tmp_path, monkeypatch):
    """A conversion whose code, config and recipe say the older release; the source beside it."""
    monkeypatch.setattr(refresh_module, "checked_hub_code", lambda: dict(CODE))
    source, output = build(tmp_path / "source"), tmp_path / "output"
    convert(open_source(source), output, ConvertOptions(SharePattern("FSFS")))
    for path in output.glob("*.py"):
        path.write_text(path.read_text().replace(HEADER, HEADER.replace(indexcache.__version__, OLD)))
    (output / "share_pattern.py").rename(output / "old_pattern.py")
    for name in ("config.json", "README.md", "indexcache_recipe.json"):
        text = (output / name).read_text()
        assert f'"{indexcache.__version__}"' in text
        text = text.replace(f'"{indexcache.__version__}"', f'"{OLD}"').replace("share_pattern.py", "old_pattern.py")
        (output / name).write_text(text)
    return source, output


def test_a_refreshed_conversion_is_finished_for_resume(converted_by_an_older_release):
    source, output = converted_by_an_older_release
    again = ["convert", str(source), str(output), "--pattern", "FSFS", "--resume"]
    before = CliRunner().invoke(app, again)
    assert before.exit_code == 1 and f"indexcache refresh {output}" in before.stderr and OLD in before.stderr
    do(FolderSource(output))
    kept = hashes(output)
    after = CliRunner().invoke(app, again)
    assert after.exit_code == 0, after.stderr
    assert hashes(output) == kept

    # Damage is still found, and another conversion is another one.
    (output / "tokenizer.json").write_text("{} ")
    damaged = CliRunner().invoke(app, again)
    assert damaged.exit_code == 1 and "- tokenizer.json" in damaged.stderr
    assert "indexcache refresh" not in damaged.stderr
    other = CliRunner().invoke(app, [*again[:4], "FFSS", "--resume"])
    assert other.exit_code == 1 and "another finished conversion" in other.stderr
