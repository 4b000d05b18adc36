"""Killed anywhere, a conversion goes on with --resume to the same bytes; what it leaves meanwhile never loads."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from testing.checkpoints import build, edit_json, edit_shard, hashes

from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.convert.convert import ConvertOptions, convert
from indexcache.conversion.io.sources import ConversionError, FolderSource

JOURNAL = ".indexcache_convert.json"

# Converts in a child process: imports first, then says so, then waits for the parent's word, so that a kill at a
# random moment hits the conversion rather than the imports. A child is forked for each run.
_CONVERTER = """
import os, signal, sys, time
from pathlib import Path
from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.io.sources import ConversionError, FolderSource
from indexcache.conversion.convert.convert import ConvertOptions, convert
import indexcache.conversion.publish.card, transformers.models.auto.modeling_auto
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config

source, output = sys.argv[1:]
options = ConvertOptions(SharePattern("FSSFFSSF"), dtype="bfloat16", resume=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            convert(FolderSource(source), Path(output), options)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    started, ended = time.perf_counter(), 0
    while line.strip() and not ended and time.perf_counter() - started < float(line):
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.001)
    if not ended:
        if line.strip():
            os.kill(child, signal.SIGKILL)  # not yet waited for, so the number is still its own
        _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


def run(source, output, pattern="FSFS", **options):
    return convert(FolderSource(source), Path(output), ConvertOptions(SharePattern.parse(pattern), **options))


def interrupted(source, output, pattern="FSFS", after=1, **options):
    """Leave a conversion that was broken off after some shards."""

    class Enough(Exception):
        pass

    done = []

    def on_shard(shard, how):
        done.append(shard.file)
        if len(done) == after:
            raise Enough

    with pytest.raises(Enough):
        convert(
            FolderSource(source),
            Path(output),
            ConvertOptions(SharePattern.parse(pattern), **options),
            on_shard=on_shard,
        )
    return done


def does_not_load(folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    for loader in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises((OSError, ValueError)):
            loader.from_pretrained(folder, trust_remote_code=True)
    return True


@pytest.mark.slow
def test_forty_kills(tmp_path):
    source, output = build(tmp_path / "s", layers=8, fp8=True, mtp=1, shards=12, vocab_size=4096), tmp_path / "o"
    before = hashes(source)
    run(source, tmp_path / "undisturbed", "FSSFFSSF", dtype="bfloat16")
    want = hashes(tmp_path / "undisturbed")
    chance = random.Random(0)
    process = subprocess.Popen(
        [sys.executable, "-c", _CONVERTER, str(source), str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def convert_once(kill_after):
        """Exit status of one run, or `None` when it was killed."""
        process.stdin.write("\n" if kill_after is None else f"{kill_after}\n")
        process.stdin.flush()
        status = int(process.stdout.readline())
        if os.WIFSIGNALED(status):
            return None
        assert os.WEXITSTATUS(status) == 0, process.stderr.readline()
        return 0

    def clear():
        for path in sorted(output.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()

    try:
        # How long a run takes here once everything is imported, to spread the kills over all of it.
        durations = []
        for _ in range(3):
            clear()
            started = time.perf_counter()
            assert convert_once(None) == 0
            durations.append(time.perf_counter() - started)
            assert hashes(output) == want
        kills, journals = 0, 0
        while kills < 40:
            if (output / "config.json").exists():
                assert convert_once(None) == 0
                assert hashes(output) == want
                clear()
            if convert_once(chance.uniform(0, min(durations))) is None:
                kills += 1
                journals += (output / JOURNAL).exists()
                if not (output / "config.json").exists() and kills % 8 == 0:
                    assert does_not_load(output)
        assert convert_once(None) == 0
        assert hashes(output) == want and hashes(source) == before
        assert journals > 5, "the kills came before or after the work"
    finally:
        process.stdin.close()
        process.terminate()
        process.wait()


@pytest.mark.parametrize("after", [1, 2])
def test_what_is_left_does_not_load_and_resuming_repeats_no_shard(tmp_path, after):
    source = build(tmp_path / "s", shards=5)
    run(source, tmp_path / "undisturbed")
    done = interrupted(source, tmp_path / "o", after=after)
    assert does_not_load(tmp_path / "o")
    finished = json.loads((tmp_path / "o" / JOURNAL).read_text())["shards"]
    assert set(done) <= set(finished)
    stamps = {file: (tmp_path / "o" / file).stat().st_ino for file in finished}
    result = run(source, tmp_path / "o", resume=True)
    assert all(result.how[file] == "kept" for file in finished)
    assert stamps == {file: (tmp_path / "o" / file).stat().st_ino for file in finished}
    assert hashes(tmp_path / "o") == hashes(tmp_path / "undisturbed")


def test_an_interrupted_output_is_refused_without_resume(tmp_path):
    source = build(tmp_path / "s")
    interrupted(source, tmp_path / "o")
    with pytest.raises(ConversionError, match="holds an interrupted conversion: finish it with --resume"):
        run(source, tmp_path / "o")
    run(source, tmp_path / "o", "FFSS", overwrite=True)
    run(source, tmp_path / "fresh", "FFSS")
    assert hashes(tmp_path / "o") == hashes(tmp_path / "fresh")


@pytest.mark.parametrize("pattern, options, named", [
    ("FFSS", {}, 'index_share_pattern: begun with "FSFS", now "FFSS"'),
    ("FSFS", {"dtype": "float32"}, 'dtype: begun with "auto", now "float32"'),
    ("FSFS", {"max_shard_size": 9000}, "max_shard_size: begun with null, now 9000"),
    ("FSFS", {"keep_shared_indexers": True}, "keep_shared_indexers: begun with false, now true"),
])  # fmt: skip
def test_resuming_with_another_recipe_is_refused(tmp_path, pattern, options, named):
    source = build(tmp_path / "s")
    interrupted(source, tmp_path / "o")
    with pytest.raises(ConversionError) as caught:
        run(source, tmp_path / "o", pattern, resume=True, **options)
    assert named in str(caught.value) and "repeat its command with --resume" in str(caught.value)


def test_resuming_from_another_source_is_refused(tmp_path):
    source, other = build(tmp_path / "s"), build(tmp_path / "t", seed=1)
    interrupted(source, tmp_path / "o")
    with pytest.raises(ConversionError, match="source files: begun with"):
        run(other, tmp_path / "o", resume=True)
    edit_shard(source / "model-00003-of-00003.safetensors", lambda tensors: tensors["lm_head.weight"].zero_())
    with pytest.raises(ConversionError, match="source files: begun with"):
        run(source, tmp_path / "o", resume=True)


def test_a_finished_shard_that_was_damaged_is_written_again(tmp_path):
    source = build(tmp_path / "s")
    run(source, tmp_path / "undisturbed", copy=True)
    interrupted(source, tmp_path / "o", after=2, copy=True)
    finished = sorted(json.loads((tmp_path / "o" / JOURNAL).read_text())["shards"])
    with open(tmp_path / "o" / finished[0], "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x7f")
    os.truncate(tmp_path / "o" / finished[1], 10)
    result = run(source, tmp_path / "o", resume=True, copy=True)
    assert {result.how[file] for file in finished[:2]} <= {"written", "copied"}
    assert hashes(tmp_path / "o") == hashes(tmp_path / "undisturbed")


def test_leftovers_of_a_kill_are_cleared(tmp_path):
    source = build(tmp_path / "s")
    run(source, tmp_path / "undisturbed")
    interrupted(source, tmp_path / "o")
    (tmp_path / "o" / "model-00003-of-00003.safetensors.partial").write_bytes(b"half")
    (tmp_path / "o" / ".README.md.77.partial").write_bytes(b"half")
    run(source, tmp_path / "o", resume=True)
    assert hashes(tmp_path / "o") == hashes(tmp_path / "undisturbed")


def test_a_damaged_journal_is_refused(tmp_path):
    source = build(tmp_path / "s")
    interrupted(source, tmp_path / "o")
    (tmp_path / "o" / JOURNAL).write_text("{")
    with pytest.raises(ConversionError, match=r"is damaged .*: start again with --overwrite"):
        run(source, tmp_path / "o", resume=True)


def test_resuming_what_is_finished_changes_nothing(tmp_path):
    source = build(tmp_path / "s")
    run(source, tmp_path / "o", resume=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").iterdir()}
    assert set(run(source, tmp_path / "o", resume=True).how.values()) == {"kept"}
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "o").iterdir()}
    with pytest.raises(ConversionError, match="holds another finished conversion"):
        run(source, tmp_path / "o", "FFSS", resume=True)
    edit_json(tmp_path / "o" / "indexcache_recipe.json", dtype="float32")
    with pytest.raises(ConversionError, match="holds another finished conversion"):
        run(source, tmp_path / "o", resume=True)
