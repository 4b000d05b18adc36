"""Every kernel is launched under its tensors' device, by one function."""

import ast
from pathlib import Path

import pytest
import torch

from indexcache.kernels.common import kernel_launch
from indexcache.kernels.common.kernel_launch import is_capturing, launcher

GUARD = Path(kernel_launch.__file__)
FILES = sorted(GUARD.parent.glob("*.py"))
# Of `torch.cuda`, what asks about the current device if it is not given one.
ABOUT_A_DEVICE = (
    "get_device_properties",
    "get_device_capability",
    "get_device_name",
    "mem_get_info",
    "current_stream",
)


def is_kernel(definition):
    """Whether a function of a file is decorated as a kernel, by `triton.jit` or `gluon.jit`, called or not."""
    decorators = [d.func if isinstance(d, ast.Call) else d for d in definition.decorator_list]
    return any(isinstance(d, ast.Attribute) and d.attr == "jit" for d in decorators)


def host_code(path):
    """The nodes of a file that are not inside a kernel."""
    pending = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef) and is_kernel(node):
            continue
        yield node
        pending += ast.iter_child_nodes(node)


def where(path, node):
    return f"{path.name}:{node.lineno}: {ast.unparse(node)[:60]}"


def bypasses(path):
    """Launches of a file that do not go through `launcher`: `kernel[grid](...)`, and `kernel.run` or `.warmup`."""
    names = {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and is_kernel(n)}
    for node in host_code(path):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Subscript) and path.name != "kernel_launch.py":
            yield where(path, node)
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id in names:
            yield where(path, node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_launch_bypasses_the_guard(path):
    assert not list(bypasses(path))


def test_a_launch_beside_the_guard_would_be_found(tmp_path):
    source = "@triton.jit\ndef a_kernel(x):\n    x[0](1)\n\ndef f(x):\n    a_kernel[(1,)](x)\n    a_kernel.run(x)\n"
    (tmp_path / "beside.py").write_text(source)
    assert len(list(bypasses(tmp_path / "beside.py"))) == 2


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_asks_about_the_current_device(path):
    asked = [
        where(path, node)
        for node in host_code(path)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and not node.args
        and (node.func.attr in ABOUT_A_DEVICE or (node.func.attr == "current_device" and path != GUARD))
    ]
    assert not asked


class PretendTensor(torch.Tensor):
    """A CPU tensor that says it is on `cuda:{on}`."""

    def get_device(self):
        return self.on


class PretendCuda:
    """What the guard asks of `torch.cuda`, with the device that is current."""

    def __init__(self, current):
        self.current, self.switches = current, 0

    def current_device(self):
        return self.current

    def device(self, index):
        return Switched(self, index)


class Switched:
    def __init__(self, cuda, index):
        self.cuda, self.index = cuda, index

    def __enter__(self):
        self.cuda.switches += 1
        self.before, self.cuda.current = self.cuda.current, self.index

    def __exit__(self, *_):
        self.cuda.current = self.before


class Kernel:
    """Notes the device that it is launched on."""

    def __init__(self, cuda, fails=False):
        self.cuda, self.fails, self.seen = cuda, fails, []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.run(grid, arguments, options)

    def run(self, grid, arguments, options):
        self.seen.append((self.cuda.current, grid, len(arguments), options))
        if self.fails:
            raise RuntimeError("no luck")


def tensor_on(index):
    tensor = torch.zeros(2).as_subclass(PretendTensor)
    tensor.on = index
    return tensor


@pytest.mark.parametrize(("current", "on", "switches"), [(0, 0, 0), (0, 1, 1), (1, 0, 1), (3, 3, 0)])
def test_launches_on_the_tensors_device_and_switches_only_if_another_is_current(monkeypatch, current, on, switches):
    cuda = PretendCuda(current)
    monkeypatch.setattr(kernel_launch.torch, "cuda", cuda)
    kernel = Kernel(cuda)
    launcher(kernel, (2, 3), tensor_on(on))(1, 5, num_warps=4)
    assert kernel.seen == [(on, (2, 3), 2, {"num_warps": 4})]
    assert (cuda.current, cuda.switches) == (current, switches)


def test_the_current_device_is_as_before_when_a_launch_fails(monkeypatch):
    cuda = PretendCuda(0)
    monkeypatch.setattr(kernel_launch.torch, "cuda", cuda)
    with pytest.raises(RuntimeError, match="no luck"):
        launcher(Kernel(cuda, fails=True), (1,), tensor_on(1))()
    assert cuda.current == 0


def test_tensors_of_a_cpu_ask_nothing_of_cuda(monkeypatch):
    monkeypatch.setattr(kernel_launch.torch, "cuda", None)
    kernel = Kernel(PretendCuda(None))
    launcher(kernel, (1,), torch.zeros(1))()
    assert len(kernel.seen) == 1 and not is_capturing(torch.zeros(1))
