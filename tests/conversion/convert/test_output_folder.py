"""What a conversion writes, where, with which permissions, and what of others it does not carry along."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from testing.checkpoints import build, edit_json, hashes
from testing.time_limits import PROCESS_SECONDS

from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.convert import convert as convert_module
from indexcache.conversion.convert.convert import ConvertOptions, convert, plan_conversion
from indexcache.conversion.convert.journal import sole_writer
from indexcache.conversion.io import shard_writer
from indexcache.conversion.io.shard_writer import hash_file, hash_files
from indexcache.conversion.io.sources import ConversionError, FolderSource


def run(source, output, pattern="FSFS", **options):
    return convert(FolderSource(source), Path(output), ConvertOptions(SharePattern.parse(pattern), **options))


def refused(source, output, pattern="FSFS", **options):
    with pytest.raises(ConversionError) as caught:
        run(source, output, pattern, **options)
    return str(caught.value)


def mode(path):
    return path.stat().st_mode & 0o777


# ---- companions are looked at first ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer_extra.json", "encoding/pipe.py", "README.md", "generation_config.json"])
def test_a_pipe_among_the_companions_is_found_before_a_shard_is_written(tmp_path, name):
    source = build(tmp_path / "s")
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    assert f"{name} is no regular file" in refused(source, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_companion_that_shrinks_meanwhile_is_not_taken_for_whole(tmp_path, monkeypatch):
    source = build(tmp_path / "s")
    read = FolderSource.read_range
    monkeypatch.setattr(
        FolderSource,
        "read_range",
        lambda self, file, begin, end: read(self, file, begin, end)[: 1 if "LIC" in file else None],
    )
    assert "LICENSE has 1 bytes where 4 were due" in refused(source, tmp_path / "o")
    assert not (tmp_path / "o" / "config.json").exists()


def test_links_to_nothing_or_to_the_outside_are_found_before_a_shard_is_written(tmp_path):
    source = build(tmp_path / "s")
    (source / "vocab.json").symlink_to(tmp_path / "nothing")
    assert "vocab.json is no regular file (a folder, a pipe, or a link to nothing)" in refused(source, tmp_path / "o")
    (tmp_path / "nothing").write_text("secret")
    assert "vocab.json is a link to" in refused(source, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_names_that_are_no_text_are_refused(tmp_path):
    source = build(tmp_path / "s")
    bad = Path(os.fsdecode(os.fsencode(source) + b"/tokenizer\xff.json"))
    bad.write_text("{}")
    assert r"'tokenizer\udcff.json' is no file name" in refused(source, tmp_path / "o")
    bad.unlink()
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/o\xff"))
    assert "is no name in UTF-8" in refused(source, folder)
    folder.mkdir()
    with pytest.raises(ConversionError, match="is no name in UTF-8"):
        FolderSource(folder)
    assert not (tmp_path / "o").exists()


# ---- code of others -------------------------------------------------------------------------------------------------


def test_code_that_does_not_come_along_is_no_longer_named(tmp_path):
    source = build(tmp_path / "s")
    tokenizer = {
        "chat_template": "x",
        "auto_map": {"AutoTokenizer": ["other/repo--tokenization.Tok", None], "AutoProcessor": "processing.Proc"},
        "nested": [{"auto_map": {"AutoConfig": "configuration.C"}, "kept": 1}],
        "model_max_length": 4096,
    }
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (source / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "a/b--c.D"}, "x": 1}))
    (source / "generation_config.json").write_text('{"auto_map": "odd",   "temperature": 0.6}')
    (source / "preprocessor_config.json").write_text('{ "size":3 }')
    plan = plan_conversion(FolderSource(source), ConvertOptions(SharePattern("FSFS")))
    done = run(source, tmp_path / "o")
    written = {path.name: path.read_text() for path in (tmp_path / "o").glob("*_config.json")}
    assert json.loads(written["tokenizer_config.json"]) == {
        "chat_template": "x", "nested": [{"kept": 1}], "model_max_length": 4096,
    }  # fmt: skip
    assert json.loads(written["processor_config.json"]) == {"x": 1}
    assert json.loads(written["generation_config.json"]) == {"temperature": 0.6}
    assert written["preprocessor_config.json"] == '{ "size":3 }', "what names no code stays byte for byte"
    for warnings in (plan.warnings, done.warnings):
        notes = "\n".join(warnings)
        assert "tokenizer_config.json: code that does not come along is no longer named: " in notes
        assert "AutoTokenizer -> other/repo--tokenization.Tok, AutoProcessor -> processing.Proc" in notes
        assert "processor_config.json: " in notes and "generation_config.json: " in notes


def test_names_of_places_and_kernels_of_the_source_s_owner_stay_behind(tmp_path):
    local = {
        "_name_or_path": "/home/ann/model",
        "_attn_implementation": "someone/kernel",
        "custom_pipelines": {"x": {}},
    }
    source = build(tmp_path / "s", **local)
    done = run(source, tmp_path / "o")
    written = json.loads((tmp_path / "o" / "config.json").read_text())
    assert not set(local) & set(written) and written["ep_size"] == 1
    (note,) = [warning for warning in done.warnings if "stays behind" in warning]
    assert "_attn_implementation='someone/kernel'" in note and "_name_or_path='/home/ann/model'" in note


# ---- links in the output --------------------------------------------------------------------------------------------


def test_overwrite_deletes_nothing_behind_a_linked_folder(tmp_path):
    source = build(tmp_path / "s")
    run(source, tmp_path / "o")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("x")
    (tmp_path / "o" / "sub").symlink_to(tmp_path / "outside")
    edit_json(
        tmp_path / "o" / "indexcache_recipe.json", files=["sub/precious", "sub/../sub/precious", 7, "README.md/x"]
    )
    run(source, tmp_path / "o", "FFSS", overwrite=True)
    assert (tmp_path / "outside" / "precious").read_text() == "x"


@pytest.mark.parametrize("name", ["encoding", ".indexcache_download"])
def test_nothing_is_written_through_a_linked_folder(tmp_path, name):
    source = build(tmp_path / "s")
    run(source, tmp_path / "o")
    (tmp_path / "outside").mkdir()
    shutil.rmtree(tmp_path / "o" / name, ignore_errors=True)
    (tmp_path / "o" / name).symlink_to(tmp_path / "outside")
    before = hashes(tmp_path / "o")
    assert f"{tmp_path / 'o' / name} is a link" in refused(source, tmp_path / "o", "FFSS", overwrite=True)
    assert not list((tmp_path / "outside").iterdir()) and hashes(tmp_path / "o") == before


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("name", [".indexcache_convert.json", "indexcache_recipe.json", "config.json", "encoding/x"])
def test_pipes_in_the_output_are_refused_before_they_are_opened(tmp_path, name, options):
    source = build(tmp_path / "s")
    run(source, tmp_path / "o")
    (tmp_path / "o" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "o" / name)
    assert f"holds pipes or devices where files belong: remove them, or give another folder\n  - {name}" in refused(
        source, tmp_path / "o", **options
    )


# ---- permissions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"copy": True}, {"dtype": "float32"}, {"max_shard_size": 9_000}])
def test_what_was_private_stays_private(tmp_path, options):
    source = build(tmp_path / "s")
    for path in source.rglob("*"):
        if path.is_file():
            path.chmod(0o600)
    (source / "tokenizer.json").chmod(0o640)
    before = os.umask(0o022)
    try:
        run(source, tmp_path / "o", **options)
    finally:
        os.umask(before)
    made_of_the_source = [*(tmp_path / "o").glob("*.safetensors"), *(tmp_path / "o").glob("*.json"),
                          tmp_path / "o" / "encoding" / "encoding_dsv32.py", tmp_path / "o" / "README.md"]  # fmt: skip
    assert {path.name: mode(path) for path in made_of_the_source if mode(path) != 0o600} == {"tokenizer.json": 0o640}


def test_the_umask_still_holds(tmp_path):
    source = build(tmp_path / "s")
    for path in source.glob("*.safetensors"):
        path.chmod(0o666)
    before = os.umask(0o027)
    try:
        run(source, tmp_path / "o", dtype="float32")
    finally:
        os.umask(before)
    assert {mode(path) for path in (tmp_path / "o").glob("*.safetensors")} == {0o640}


# ---- two writers ----------------------------------------------------------------------------------------------------


def test_two_conversions_into_one_output(tmp_path):
    source = build(tmp_path / "s")
    with sole_writer(tmp_path / "o"):
        assert f"another conversion is writing to {tmp_path / 'o'}" in refused(source, tmp_path / "o")
        assert "another conversion is writing" in refused(source, tmp_path / "o", overwrite=True)
        run(source, tmp_path / "p")
    run(source, tmp_path / "o")
    assert hashes(tmp_path / "o") == hashes(tmp_path / "p"), "a lock leaves nothing behind"


def test_a_file_system_without_locks_goes_without(tmp_path, monkeypatch):
    from indexcache.conversion.convert import journal

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(journal.fcntl, "flock", no_locks)
    run(build(tmp_path / "s"), tmp_path / "o")
    assert (tmp_path / "o" / "config.json").exists()


# ---- a finished output, resumed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, damage", [
    ("config.json", lambda path: path.write_text("{}")),
    ("tokenizer.json", Path.unlink),
    ("encoding/encoding_dsv32.py", lambda path: path.write_text("FORMAT = 2\n")),
    ("README.md", Path.unlink),
    ("modeling_indexcache.py", lambda path: path.write_text(path.read_text() + "\n")),
    ("model.safetensors.index.json", lambda path: path.write_text("{}")),
    ("model-00001-of-00003.safetensors", lambda path: os.truncate(path, 100)),
    ("model-00003-of-00003.safetensors", Path.unlink),
])  # fmt: skip
def test_resuming_a_finished_output_checks_every_file(tmp_path, name, damage):
    source = build(tmp_path / "s")
    run(source, tmp_path / "o", copy=True)
    assert set(run(source, tmp_path / "o", copy=True, resume=True).how.values()) == {"kept"}
    damage(tmp_path / "o" / name)
    message = refused(source, tmp_path / "o", copy=True, resume=True)
    assert "1 of its files are not what the conversion wrote" in message and f"- {name}" in message
    run(source, tmp_path / "o", copy=True, overwrite=True)
    run(source, tmp_path / "fresh", copy=True)
    assert hashes(tmp_path / "o") == hashes(tmp_path / "fresh")


@pytest.mark.parametrize("recipe", ["{}", "[]", "{", '{"shards": []}', '{"shards": {"a": 1}, "files": 3}'])
def test_resuming_with_a_damaged_recipe_is_refused(tmp_path, recipe):
    source = build(tmp_path / "s")
    run(source, tmp_path / "o")
    (tmp_path / "o" / "indexcache_recipe.json").write_text(recipe)
    assert "holds another finished conversion" in refused(source, tmp_path / "o", resume=True)


@pytest.mark.parametrize("state", ["[]", '{"identity": 3, "shards": {}}', '{"identity": {}, "shards": []}', "{",
                                   '{"identity": {}, "shards": {"a": 3}}', "[" * 2000])  # fmt: skip
def test_a_damaged_journal_of_any_kind_is_refused(tmp_path, state):
    source = build(tmp_path / "s")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / ".indexcache_convert.json").write_text(state)
    message = refused(source, tmp_path / "o", resume=True)
    assert ".indexcache_convert.json is damaged" in message and "--overwrite" in message


# ---- disks and hashes -----------------------------------------------------------------------------------------------


def advice(tmp_path, monkeypatch, *, same_disk=True, pattern="FSFS", **options):
    source = tmp_path / "s"
    if not source.exists():
        build(source)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage._replace(free=10))
    if not same_disk:
        stat = Path.stat

        def elsewhere(path, **kwargs):
            found = stat(path, **kwargs)
            if path.name.endswith(".safetensors"):
                found = os.stat_result((*found[:2], found.st_dev + 1, *found[3:10]))
            return found

        monkeypatch.setattr(convert_module.Path, "stat", elsewhere)
    message = refused(source, tmp_path / "o", pattern, **options)
    monkeypatch.undo()
    assert "has 10 bytes free" in message and "make room" in message
    return message


def test_a_full_disk_s_advice_is_one_that_helps(tmp_path, monkeypatch):
    rewritten = advice(tmp_path, monkeypatch)
    assert "add --keep-shared-indexers" in rewritten and "(0 bytes are needed)" in rewritten
    assert "source's own disk" not in rewritten and "--copy" not in rewritten
    copied = advice(tmp_path, monkeypatch, pattern="FFFF", copy=True)
    assert "drop --copy" in copied and "source's own disk" not in copied
    far = advice(tmp_path, monkeypatch, same_disk=False, pattern="FFFF")
    assert "give an output on the source's own disk" in far and "--keep-shared-indexers" not in far
    both = advice(tmp_path, monkeypatch, same_disk=False)
    assert "linked there (0 bytes are needed)" in both
    cast = advice(tmp_path, monkeypatch, dtype="float32")
    assert "--keep-shared-indexers" not in cast and "--copy" not in cast, "all shards are rewritten anyway"


def test_linked_shards_are_hashed_at_the_same_time(tmp_path, monkeypatch):
    source = build(tmp_path / "s", shards=6)
    together = threading.Barrier(3)

    def hash_together(path, how="written"):
        together.wait(timeout=PROCESS_SECONDS)
        return hash_file(path, how)

    monkeypatch.setattr(convert_module, "hash_workers", lambda: 3)
    monkeypatch.setattr(shard_writer, "hash_file", hash_together)
    done = run(source, tmp_path / "o", "FFFF")
    assert set(done.how.values()) <= {"linked", "cloned"} and len(done.how) == 6
    recipe = json.loads((tmp_path / "o" / "indexcache_recipe.json").read_text())
    found = hashes(source)
    assert {file: entry["sha256"] for file, entry in recipe["shards"].items()} == {f: found[f] for f in done.how}


def test_many_files_are_hashed_by_name(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name)
    found = hash_files([tmp_path / name for name in "abcd"])
    assert {path.name: written for path, written in found.items()} == {
        name: hash_file(tmp_path / name) for name in "abc"
    }
