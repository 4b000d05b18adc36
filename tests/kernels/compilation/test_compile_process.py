"""The process that compiles kernels beside the model's: found by its parent, gone with it, and never in its way."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from testing.time_limits import PROCESS_SECONDS
from testing.tiny_models import tiny_config, tiny_model

triton = pytest.importorskip("triton")

from indexcache.kernels.common.device_target import DeviceTarget  # noqa: E402
from indexcache.kernels.compilation import compile_process  # noqa: E402
from indexcache.kernels.compilation.compile_process import (  # noqa: E402
    CompilationFailed,
    CompileProcess,
    NotCompiledThere,
    processes_wanted,
)
from indexcache.modeling_indexcache import compile_ahead  # noqa: E402
from indexcache.modeling_indexcache.modeling_indexcache import IndexCacheModel  # noqa: E402

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")
TARGET = ("cuda", 90, 32)


def small_variants(number):
    config = tiny_config(index_share_pattern="FS", num_hidden_layers=2, n_group=1)
    model = compile_ahead.pretended_decoder(IndexCacheModel, config, [0, 1], "FS", torch.bfloat16)
    begun_with = compile_ahead.prefills((40,))
    found = [v for fresh in compile_ahead.variants_of(model, DeviceTarget("cuda", 90, 132), begun_with) for v in fresh]
    return sorted(found, key=lambda variant: len(variant.kernel.src))[:number]


@pytest.fixture
def side(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    process = CompileProcess(2, TARGET)
    yield process
    process.close()
    assert process._process.poll() is not None


def test_compiles_into_tritons_cache_without_a_gpu(side, tmp_path):
    (variant,) = small_variants(1)
    key = side.compile(*variant[0:1], *variant[2:])
    assert side.is_ready and len(key) == 64
    assert [path.stem for path in (tmp_path / "cache").glob("*/*.cubin")] == [variant.name]


def test_what_does_not_compile_is_said_with_its_reason_and_the_next_compiles(side):
    one, two = small_variants(2)
    broken = {name: -1 if isinstance(value, int) else value for name, value in one.options.items()}
    with pytest.raises(CompilationFailed):
        side.compile(one.kernel, one.grid, one.arguments, broken)
    assert len(side.compile(two.kernel, two.grid, two.arguments, two.options)) == 64


def test_what_cannot_be_sent_is_not_compiled_there(side):
    (variant,) = small_variants(1)
    with pytest.raises(NotCompiledThere):
        side.compile(variant.kernel, variant.grid, (lambda: None,), variant.options)
    assert not side.is_gone


def test_one_that_dies_lets_go_of_whoever_waits(side):
    (variant,) = small_variants(1)
    os.kill(side._process.pid, signal.SIGKILL)
    with pytest.raises(NotCompiledThere):
        side.compile(variant.kernel, variant.grid, variant.arguments, variant.options)
    assert side.is_gone and not side.is_ready and side.why_gone


def test_one_that_does_not_start_is_gone(monkeypatch):
    monkeypatch.setattr(compile_process, "_BEGIN", "raise SystemExit(3)")
    process, changed = CompileProcess(2, TARGET), threading.Event()
    process.on_change(changed.set)
    assert changed.wait(PROCESS_SECONDS) and process.is_gone
    process.close()
    assert process._process.returncode == 3


def test_one_that_is_not_ready_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(compile_process, "_BEGIN", "import time; time.sleep(1000)")
    process = CompileProcess(2, TARGET)
    process.close()
    assert process._process.returncode == -signal.SIGKILL


EXITS = """
import sys, threading
import torch
from test_compile_process import small_variants
from indexcache.kernels.compilation import compile_process
from indexcache.kernels.compilation.kernel_variants import Compilations
from triton.runtime.driver import driver
driver.set_active(compile_process.NoDriver("cuda", 90, 32))
side, ready = compile_process.CompileProcess(1, ("cuda", 90, 32)), threading.Event()
compilations = Compilations(torch.device("cpu"), 0, side)
notify = side._on_change
side.on_change(lambda: (notify(), ready.set()))
ready.wait()
compilations.add(small_variants(100))
threading.Thread(target=lambda: print(len(compilations.finish()), side._process.returncode)).start()
"""


def test_an_interpreter_that_ends_does_not_compile_what_is_left(tmp_path):
    folders = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": folders}
    done = subprocess.run([sys.executable, "-c", EXITS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    begun, status = map(int, done.stdout.split())
    assert begun <= 3 and status == 0 and len(list((tmp_path / "cache").glob("*/*.cubin"))) <= 3


PARENT = """
import os, sys, time, threading
from indexcache.kernels.compilation.compile_process import CompileProcess
side, ready = CompileProcess(2, ("cuda", 90, 32)), threading.Event()
side.on_change(ready.set)
ready.wait()
other = 0
if sys.argv[1] == "held":
    other = os.fork()
    if other == 0:
        time.sleep(1000)
        os._exit(0)
print(side.is_ready, side._process.pid, other, flush=True)
if sys.argv[1] != "ends":
    time.sleep(1000)
side.close()
"""


def is_alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks into /proc")
@pytest.mark.parametrize("how", ["ends", "killed", "held"])
def test_ends_with_its_parent(how):
    """Also where a process that the parent forked keeps the pipe open."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE, text=True)
    ready, process, other = parent.stdout.readline().split()
    try:
        assert ready == "True" and (how == "ends" or is_alive(process))
        if how != "ends":
            parent.kill()
        parent.wait(PROCESS_SECONDS)
        # Hangs until the test's limit if it lives on.
        while is_alive(process):
            time.sleep(0.05)
    finally:
        if int(other):
            os.kill(int(other), signal.SIGKILL)
        parent.stdout.close()


FROM_CHECKPOINT = """
import json, sys
sys.modules["indexcache"] = None
import torch, triton
from transformers import AutoModelForCausalLM
decoder = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).model
here = type(decoder).__module__.rpartition(".")[0]
names = ("compile_process", "compile_ahead", "kernel_variants", "device_target")
compile_process, compile_ahead, kernel_variants, device_target = (sys.modules[f"{here}.{name}"] for name in names)
hits = []
triton.knobs.compilation.listener = lambda src, cache_hit, **rest: hits.append(cache_hit)
compile_process.driver.set_active(compile_process.NoDriver("cuda", 90, 32))
dtypes = {name: x.dtype for name, x in (*decoder.named_parameters(), *decoder.named_buffers())}
small = compile_ahead.small_model(type(decoder), decoder.config, "FS", dtypes)
target = device_target.DeviceTarget("cuda", 90, 132)
found = [v for fresh in compile_ahead.variants_of(small, target, compile_ahead.prefills((40,))) for v in fresh]
found.sort(key=lambda variant: len(variant.kernel.src))
side = compile_process.CompileProcess(2, ("cuda", 90, 32))
compilations = kernel_variants.Compilations(torch.device("cpu"), 0, side)
compilations.add(found[:3])
failed = [error for error in compilations.finish().values() if error]
print(json.dumps([here, hits, failed, side.why_gone]))
"""


def test_a_checkpoints_own_code_finds_what_was_compiled_beside_it(tmp_path, run_python):
    """Flat files in a process that has no `indexcache`: the launches of the parent are hits in Triton's cache."""
    tiny_model(index_share_pattern="FS", num_hidden_layers=2, n_group=1).bfloat16().save_pretrained(tmp_path / "model")
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = run_python(FROM_CHECKPOINT, tmp_path / "model", installed=True, **cache)
    here, hits, failed, why_gone = json.loads(done.stdout.splitlines()[-1])
    assert here.startswith("transformers_modules.") and hits == [True] * 3
    assert failed == [] and why_gone == compile_process.CLOSED


def wanted_by_a_child(queue):
    queue.put(processes_wanted())


def test_where_there_is_no_side_process(monkeypatch):
    monkeypatch.setattr(compile_process.os, "cpu_count", lambda: 16)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert processes_wanted() == compile_process.MOST_PROCESSES
    for name, value in (("LOCAL_RANK", "1"), (compile_process.COMPILE_PROCESSES, "0"), ("TRITON_ALWAYS_COMPILE", "1")):
        with monkeypatch.context() as inside:
            inside.setenv(name, value)
            assert processes_wanted() == 0, name
    for place, name, value in (
        (compile_process.os, "cpu_count", lambda: 2),
        (compile_process.sys, "executable", "/usr/sbin/uwsgi"),
        (compile_process.sys, "frozen", True),
        (compile_process, "_imported_by", os.getpid() + 1),
    ):
        with monkeypatch.context() as inside:
            inside.setattr(place, name, value, raising=False)
            assert processes_wanted() == 0, name
    monkeypatch.setenv(compile_process.COMPILE_PROCESSES, "3")
    assert processes_wanted() == 3


def test_a_child_of_multiprocessing_starts_none(monkeypatch):
    monkeypatch.setenv(compile_process.COMPILE_PROCESSES, "3")
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=wanted_by_a_child, args=(queue,))
    child.start()
    assert queue.get() == 0
    child.join(PROCESS_SECONDS)
