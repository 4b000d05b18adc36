"""`indexcache warm-up`: what it refuses, what it says, and that every process finds the same variants."""

import json

import pytest
import torch
from testing.checkpoints import build
from typer.testing import CliRunner

pytest.importorskip("triton")

from indexcache.cli import app
from indexcache.conversion.io.sources import ConversionError
from indexcache.conversion.publish import warm_up as verb
from indexcache.kernels.compilation.kernel_variants import Variant


class Pool:
    """A pool of one process, this one, whose kernels compile at once."""

    def __init__(self, processes, mp_context, initializer, initargs):
        Pool.processes, Pool.arguments = processes, initargs

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, number):
        return Done(number)


class Done:
    def __init__(self, number):
        self.number = number

    def result(self):
        return f"kernel{self.number}", "ValueError: no" if self.number == Pool.fails else None


@pytest.fixture
def pool(monkeypatch):
    Pool.fails = None
    monkeypatch.setattr(verb, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(verb, "as_completed", lambda futures: futures)
    return Pool


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    build(folder)
    return folder


def test_finds_the_same_variants_in_every_process(source):
    fields = verb._fields(str(source), None, None)
    arguments = fields, str(source), "bfloat16", verb.TARGETS["sm_90"], (16, 40)
    first, second = verb._find_variants(*arguments), verb._find_variants(*arguments)
    assert [v.key for v in first] == [v.key for v in second] and len(first) > 20
    assert all(isinstance(v, Variant) for v in first)


def test_says_what_it_compiled(source, pool):
    arguments = ["warm-up", str(source), "--target", "sm_90", "--dtype", "float16", "--json", "-j", "3"]
    done = CliRunner().invoke(app, [*arguments, "--max-length", "3000"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["variants"] > 20 and found["compiled"] == 0 and found["failed"] == {}
    assert found["target"] == {"backend": "cuda", "arch": 90, "processors": 132} and pool.processes == 3
    assert pool.arguments[2] == "float16" and pool.arguments[4] == (16, 1000, 3000)


def test_a_kernel_that_does_not_compile_is_named_and_fails_the_verb(source, pool):
    pool.fails = 2
    done = CliRunner().invoke(app, ["warm-up", str(source), "--target", "sm_90"])
    assert done.exit_code == 1 and "kernel2 does not compile: ValueError: no" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": "sm_70"}, "'sm_70' is none of sm_80"),
        ({"dtype": "float32", "target": "sm_90"}, "kernels run in bfloat16 and float16, not in float32"),
        ({"source": "no/such/folder/anywhere", "target": "sm_90"}, "no/such/folder"),
    ],
)
def test_what_cannot_be_is_refused(source, arguments, words):
    arguments = {"source": str(source)} | arguments
    with pytest.raises(ConversionError, match=words):
        verb.warm_up(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_target_is_asked_for(source):
    done = CliRunner().invoke(app, ["warm-up", str(source)])
    assert done.exit_code == 1 and "there is no GPU here: give --target" in done.output
