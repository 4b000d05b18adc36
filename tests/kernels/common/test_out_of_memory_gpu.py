"""Out of memory for real, in every operation: raised as such; the next call runs on the same backends, same bits."""

import math

import pytest
import torch
from testing.full_memory import equal_bits, full_memory, same_bits
from torch.utils._pytree import tree_leaves, tree_map

from indexcache.kernels.common.backend_listing import operations
from indexcache.kernels.common.dispatch import forget_failures, no_fallback, why_set_aside
from indexcache.kernels.indexer_distillation.indexer_distillation import dense_indexer_kl, indexer_kl
from indexcache.kernels.sparse_mla.sparse_mla import sparse_mla

pytest.importorskip("triton")
# The largest example is 11 GB of experts' weights, which are here twice.
LEAST_BYTES = 40 * 10**9
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < LEAST_BYTES,
        reason="needs a CUDA device with 40 GB",
    ),
]
EXAMPLES = [(operation, example) for _, operation in operations() for example in operation.examples]


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    forget_failures()
    with same_bits():
        yield
    forget_failures()


def new(*shape, dtype=torch.bfloat16):
    """Random numbers; integers count along a row: what a list names is there, and nothing is in it twice."""
    if dtype == torch.float8_e4m3fn:
        return torch.randint(0, 0x7F, shape, dtype=torch.uint8, device="cuda").view(dtype)  # no NaN
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=dtype, device="cuda")
    return (torch.arange(math.prod(shape), device="cuda") % shape[-1]).reshape(shape).to(dtype)


def tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def run(call, given, before):
    """Results and changed arguments of a call on arguments as they were `before`; what ran; whether it took memory."""
    for mine, earlier in zip(tensors(given), tensors(before), strict=True):
        mine.copy_(earlier)
    torch.cuda.reset_peak_memory_stats()
    taken = torch.cuda.memory_allocated()
    with no_fallback() as ran:
        result = call(*given)
    takes_memory = torch.cuda.max_memory_allocated() > taken
    changed = [x for x, earlier in zip(tensors(given), tensors(before), strict=True) if not equal_bits(x, earlier)]
    return [x.clone() for x in tensors(result) + changed], ran, takes_memory


def check(call, given):
    before = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, given)
    # Compiles, and makes what is made once.
    run(call, given, before)
    expected, ran, takes_memory = run(call, given, before)
    assert expected and ran
    with full_memory():
        if takes_memory:
            with no_fallback() as failed, pytest.raises(torch.OutOfMemoryError):
                call(*given)
            assert failed and failed == ran[: len(failed)]
            # Where another backend may run, none is tried.
            with pytest.raises(torch.OutOfMemoryError):
                call(*given)
        else:
            call(*given)
    assert not why_set_aside()
    again, ran_again, _ = run(call, given, before)
    assert ran_again == ran
    assert all(equal_bits(one, other) for one, other in zip(again, expected, strict=True))


@pytest.mark.parametrize(
    ("operation", "example"), EXAMPLES, ids=[f"{operation.name}-{example}" for operation, example in EXAMPLES]
)
def test_an_operation_without_memory_raises_and_runs_as_before(operation, example):
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    # The one flag that is False in examples: whether a gradient is added up in a fixed order.
    given = tuple(True if value is False else value for value in operation.examples[example](new))
    with torch.no_grad():
        check(lambda *arguments: operation(device, *arguments), given)


def differentiable():
    """How many of the arguments have a gradient, what is differentiated, and the arguments."""
    q, k, weights, lists = (
        new(1, 1024, 32, 128),
        new(1, 4096, 128),
        new(1, 1024, 32),
        new(1, 1024, 512, dtype=torch.int32),
    )
    latents = new(1, 1024, 20, 576), new(1, 4096, 576)
    return {
        "sparse_mla": (2, lambda q, kv: sparse_mla(q, kv, lists, scale=0.06, value_dim=512), latents),
        "indexer_kl": (3, lambda *x: (indexer_kl(*x, lists, new(1, 1024, 512).abs()),), (q, k, weights)),
        "dense_indexer_kl": (3, lambda *x: (dense_indexer_kl(*x, *latents, attn_scale=0.06),), (q, k, weights)),
    }


@pytest.mark.parametrize("name", ["sparse_mla", "indexer_kl", "dense_indexer_kl"])
def test_a_gradient_without_memory_raises_and_runs_as_before(name):
    torch.manual_seed(0)
    number, function, given = differentiable()[name]
    leaves = [x.requires_grad_() for x in given[:number]]

    def forward():
        torch.manual_seed(1)
        return function(*leaves)

    upstream = [torch.ones_like(x) for x in forward()]

    def backward(results):
        with no_fallback() as ran:
            return torch.autograd.grad(results, leaves, upstream), ran

    expected, ran = backward(forward())
    assert len(ran) > 0
    results = forward()
    with full_memory(), pytest.raises(torch.OutOfMemoryError), no_fallback() as failed:
        torch.autograd.grad(results, leaves, upstream)
    # What comes before the kernels may be the first that finds no memory.
    assert failed == ran[: len(failed)] and not why_set_aside()
    again, ran_again = backward(forward())
    assert ran_again == ran and all(equal_bits(*pair) for pair in zip(again, expected, strict=True))
