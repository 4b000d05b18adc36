"""One policy for all operations: what is raised, what is set aside for its device, what is said, what is forbidden."""

import importlib
import os
import pkgutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from indexcache.kernels import dispatch as policy
from indexcache.kernels.dispatch import (
    Backend,
    FallbackError,
    dispatch,
    forget_failures,
    no_fallback,
    takes_all,
    why_set_aside,
)

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    forget_failures()
    yield
    forget_failures()


class Calls:
    """Two backends; the first fails with `error` whenever it is run."""

    def __init__(self, error=None, why_not=takes_all, optional=False):
        self.ran, self.error = [], error
        self.backends = Backend("fast", why_not, self.fast, optional), Backend("slow", takes_all, self.slow)

    def fast(self, *arguments):
        self.ran.append("fast")
        if self.error is not None:
            raise self.error
        return "fast"

    def slow(self, *arguments):
        self.ran.append("slow")
        return "slow"

    def __call__(self, device=CPU):
        return dispatch("an operation", self.backends, device, 1, 2)


def caught(call, *arguments):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call(*arguments)
    return result, [str(warning.message) for warning in found]


def compile_errors():
    triton = pytest.importorskip("triton")
    return [
        triton.CompilationError("def kernel(): ...", None, "no such layout"),
        triton.runtime.errors.OutOfResources(300000, 232448, "shared memory"),
        RuntimeError("PassManager::run failed"),
        AttributeError("module has no attribute 'warp_specialize'"),
        TypeError("from_tensor() takes 2 positional arguments"),
        subprocess.CalledProcessError(1, ["ptxas"]),
        FileNotFoundError("gcc"),
    ]


def test_a_backend_that_does_not_compile_is_set_aside_once_with_its_reason():
    for error in compile_errors():
        forget_failures()
        call = Calls(error)
        result, said = caught(call)
        assert result == "slow" and len(said) == 1 and type(error).__name__ in said[0]
        assert caught(call) == ("slow", []) and call.ran == ["fast", "slow", "slow"]
        assert list(why_set_aside()) == ["an operation: fast on cpu"]


def test_for_another_device_it_is_tried_again():
    call = Calls(RuntimeError("PassManager::run failed"))
    caught(call, CPU)
    call.error = None
    assert caught(call, META) == ("fast", []) and caught(call, CPU) == ("slow", [])


def device_errors():
    return [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
        RuntimeError("CUDA error: unspecified launch failure"),
    ]


@pytest.mark.parametrize("error", device_errors(), ids=str)
def test_faults_of_a_device_are_raised_and_the_next_call_runs_fast_again(error):
    call = Calls(error)
    with pytest.raises(type(error)) as raised:
        call()
    assert raised.value is error and call.ran == ["fast"] and not why_set_aside()
    call.error = None
    assert caught(call) == ("fast", [])


def test_the_drivers_out_of_memory_is_pytorchs():
    call = Calls(RuntimeError("Triton Error [CUDA]: out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        call()
    call.error = None
    assert caught(call) == ("fast", [])


@pytest.mark.parametrize("error", [ValueError("indices"), IndexError("slot"), KeyboardInterrupt(), MemoryError()])
def test_what_is_not_about_compiling_is_raised(error):
    with pytest.raises(type(error)):
        Calls(error)()
    assert not why_set_aside()


def test_arguments_that_a_backend_does_not_take_fall_to_the_next_and_that_is_said_once():
    call = Calls(why_not=lambda a, b: f"it takes no {a}")
    result, said = caught(call)
    assert result == "slow" and said == ["an operation does not run in fast, but slower, on cpu: it takes no 1"]
    assert caught(call) == ("slow", []) and not why_set_aside()


def test_a_backend_for_some_shapes_is_passed_over_in_silence():
    assert caught(Calls(why_not=lambda *_: "too few", optional=True)) == ("slow", [])
    with no_fallback():
        assert caught(Calls(why_not=lambda *_: "too few", optional=True)) == ("slow", [])


@pytest.mark.parametrize("optional", [False, True])
def test_no_fallback_raises_what_a_backend_raised_and_sets_nothing_aside(optional):
    error = RuntimeError("PassManager::run failed")
    call = Calls(error, optional=optional)
    with no_fallback(), pytest.raises(RuntimeError) as raised:
        call()
    assert raised.value is error and not why_set_aside()
    assert caught(call)[0] == "slow"
    with no_fallback(), pytest.raises(FallbackError, match="does not run in fast"):
        call()


def test_no_fallback_forbids_what_is_not_taken_and_ends_with_its_block():
    call = Calls(why_not=lambda *_: "not this")
    with no_fallback(), pytest.raises(FallbackError, match="not this"):
        call()
    assert caught(call)[0] == "slow"


@pytest.mark.parametrize(("value", "forbidden"), [("1", True), ("0", False), ("", False)])
def test_the_environment_forbids_for_a_whole_process(value, forbidden):
    program = "from indexcache.kernels import dispatch; print(dispatch._forbidden)"
    environment = os.environ | {policy.NO_FALLBACK: value}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split()[-1] == str(forbidden)


def operations():
    """Every tuple of backends of a file in kernels/."""
    folder = Path(policy.__file__).parent
    for module in pkgutil.iter_modules([str(folder)]):
        loaded = importlib.import_module(f"indexcache.kernels.{module.name}")
        for name, value in vars(loaded).items():
            if isinstance(value, tuple) and value and all(isinstance(x, Backend) for x in value):
                yield f"{module.name}.{name}", value


def test_every_operation_ends_with_a_backend_that_takes_all():
    found = dict(operations())
    assert len(found) >= 18
    for name, backends in found.items():
        assert backends[-1].why_not is takes_all and not backends[-1].optional, name
        assert len({backend.name for backend in backends}) == len(backends) > 1, name


@pytest.mark.parametrize("name", dict(operations()))
def test_out_of_memory_in_any_operation_leaves_its_backends_in_use(name):
    backends = dict(operations())[name]
    error = torch.OutOfMemoryError("CUDA out of memory")

    def fail(*_):
        raise error

    failing = (backends[0]._replace(run=fail, why_not=takes_all), *backends[1:])
    with pytest.raises(torch.OutOfMemoryError):
        dispatch(name, failing, CPU)
    assert not why_set_aside()
