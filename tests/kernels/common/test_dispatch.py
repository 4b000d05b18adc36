"""One policy for all operations: what is raised, what is set aside for its device, what is said, what is forbidden."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from indexcache.kernels.common import dispatch as policy
from indexcache.kernels.common.backend_listing import operations
from indexcache.kernels.common.dispatch import (
    Backend,
    FallbackError,
    Operation,
    forget_failures,
    no_fallback,
    takes_all,
    why_set_aside,
)
from indexcache.kernels.indexer_distillation import indexer_distillation, indexer_distillation_ops
from indexcache.kernels.sparse_mla import sparse_mla

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    forget_failures()
    yield
    forget_failures()


class Calls:
    """Two backends; the first fails with `error` whenever it is run."""

    def __init__(self, error=None, why_not=takes_all, optional=False):
        self.ran, self.error = [], error
        fast, slow = Backend("fast", why_not, self.fast, optional), Backend("slow", takes_all, self.slow)
        self.operation = Operation("an operation", fast, slow)

    def fast(self, *arguments):
        self.ran.append("fast")
        if self.error is not None:
            raise self.error
        return "fast"

    def slow(self, *arguments):
        self.ran.append("slow")
        return "slow"

    def __call__(self, device=FIRST, **options):
        return self.operation(device, 1, 2, **options)


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
        assert list(why_set_aside()) == ["an operation: fast on cuda:0"]


def test_for_another_device_it_is_tried_again():
    call = Calls(RuntimeError("PassManager::run failed"))
    caught(call, FIRST)
    call.error = None
    assert caught(call, SECOND) == ("fast", []) and caught(call, FIRST) == ("slow", [])


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
    assert result == "slow" and said == ["an operation does not run in fast, but slower, on cuda:0: it takes no 1"]
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
    program = "from indexcache.kernels.common import dispatch; print(dispatch._forbidden)"
    environment = os.environ | {policy.NO_FALLBACK: value}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split()[-1] == str(forbidden)


def test_without_kernels_the_last_runs_and_nothing_is_said():
    call = Calls()
    assert caught(call, CPU) == ("slow", []) and caught(lambda: call(allow_triton=False)) == ("slow", [])
    with no_fallback():
        assert caught(call, CPU) == ("slow", [])


def test_what_ran_under_the_strict_switch_is_listed():
    call = Calls()
    with no_fallback() as ran:
        call(), call(CPU)
    call()
    assert ran == [("an operation", "fast"), ("an operation", "slow")]


def test_explaining_runs_nothing():
    call = Calls(why_not=lambda a, b: f"it takes no {a}")
    assert call.operation.explain(FIRST, 1, 2) == ("slow", {"fast": "it takes no 1"})
    assert call.operation.explain(CPU, 1, 2) == ("slow", {"fast": "kernels need a GPU, not cpu"})
    assert not call.operation.chooses_kernels(CPU, 1, 2) and Calls().operation.chooses_kernels(FIRST, 1, 2)
    assert not call.ran


OPERATIONS = {operation.name: operation for _, operation in operations()}


def test_every_operation_ends_with_a_backend_that_takes_all():
    assert len(OPERATIONS) == len(list(operations())) >= 22
    for name, operation in OPERATIONS.items():
        names = [backend.name for backend in operation.backends]
        assert operation.backends[-1].why_not is takes_all and not operation.backends[-1].optional, name
        assert len(set(names)) == len(names) > 1 and operation.examples, name


@pytest.mark.parametrize("name", OPERATIONS)
def test_out_of_memory_in_any_operation_leaves_its_backends_in_use(name):
    for position in range(len(OPERATIONS[name].backends) - 1):
        backends = list(OPERATIONS[name].backends[position:])

        def fail(*_):
            raise RuntimeError("Triton Error [CUDA]: out of memory")

        backends[0] = backends[0]._replace(run=fail, why_not=takes_all)
        with pytest.raises(torch.OutOfMemoryError):
            Operation(name, *backends)(FIRST)
        assert not why_set_aside()


def sparse_inputs():
    draw = torch.Generator().manual_seed(0)
    q, kv = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((2, 3, 4, 12), (2, 9, 12)))
    indices = torch.rand(2, 3, 9, generator=draw).argsort(-1)[..., :5].int()
    indices[0, 1], indices[1, 0, 2] = -1, -1
    return q.requires_grad_(), kv.requires_grad_(), indices


def test_gradients_of_sparse_mla_where_no_kernel_compiles():
    q, kv, indices = sparse_inputs()
    out, lse = sparse_mla.sparse_mla(q, kv, indices, scale=0.3, value_dim=8)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    some = grad_lse.masked_fill(lse == float("-inf"), 0.0)
    want = torch.autograd.grad((out * grad_out).sum() + (lse.masked_fill(lse.isinf(), 0.0) * some).sum(), (q, kv))
    backward = sparse_mla._GRADIENT.backends[-1].run
    got = backward(grad_out, grad_lse, *(x.detach() for x in (q, kv)), indices, out.detach(), lse.detach(), 0.3, False)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("with_target", [False, True])
def test_gradients_of_the_indexer_where_no_kernel_compiles(with_target):
    draw = torch.Generator().manual_seed(1)
    shapes = (2, 3, 4, 8), (2, 9, 8), (2, 3, 4)
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]
    indices, target, stats = sparse_inputs()[2], None, None
    if with_target:
        target = torch.rand(2, 3, 5, generator=draw)
        result = indexer_distillation.indexer_kl(*inputs, indices, target, scale=0.3)
    else:
        result = indexer_distillation.selected_index_scores(*inputs, indices, scale=0.3)
    grad = torch.randn(result.shape, generator=draw, dtype=torch.float64)
    kept = torch.where(result.isinf(), 0.0, result * grad)
    want = torch.autograd.grad(kept.sum(), inputs)
    backward = indexer_distillation_ops._INDEX_GRADIENT.backends[-1].run
    got = backward(grad, *(x.detach() for x in inputs), indices, target, stats, 0.3, False)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)


def test_gradients_of_the_dense_loss_where_no_kernel_compiles():
    draw = torch.Generator().manual_seed(2)
    shapes = (2, 3, 4, 8), (2, 9, 8), (2, 3, 4)
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]
    q_attn, kv = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((2, 3, 5, 12), (2, 9, 12)))
    lse = indexer_distillation.attention_lse(q_attn, kv, scale=0.2)
    result = indexer_distillation.dense_indexer_kl(*inputs, q_attn, kv, scale=0.3, attn_scale=0.2, attn_lse=lse)
    grad = torch.randn(result.shape, generator=draw, dtype=torch.float64)
    want = torch.autograd.grad(result, inputs, grad)
    backward = indexer_distillation_ops._DENSE_GRADIENT.backends[-1].run
    visible = torch.full((2,), 6, dtype=torch.int64), None, None
    plain = [x.detach() for x in inputs]
    got = backward(grad, *plain, [q_attn], [kv], [lse], None, 0.3, 0.2, *visible)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)
