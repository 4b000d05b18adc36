"""Names of kernels in Triton's cache depend on nothing that was compiled before."""

import importlib
import types
from pathlib import Path

import pytest

from indexcache.kernels.common.kernel_keys import settle_key

KERNELS = Path(importlib.import_module("indexcache.kernels.common.kernel_keys").__file__).parents[1]


class Digested:
    """A jitted function as Triton 3.6 digests it: with what its callees know by then."""

    def __init__(self, source, name, **scope):
        exec(source, scope)
        self.fn, self.hash, self.constants = scope[name], None, {}

    @property
    def cache_key(self):
        if self.hash is None:
            self.hash = "recursion"
            scope, found = self.fn.__globals__, {}
            for name in self.fn.__code__.co_names:
                value = scope.get(name) or getattr(scope.get("module"), name, None)
                if isinstance(value, Digested):
                    found |= value.constants
                    value.cache_key  # noqa: B018
                elif isinstance(value, int):
                    found[name] = value
            self.constants = found
            self.hash = str(sorted(found.items()))
        return self.hash


def family():
    leaf = Digested("def leaf(): return FEW", "leaf", FEW=3)
    middle = Digested("def middle(): return leaf()", "middle", leaf=leaf)
    top = Digested("def top(): return (lambda: middle())()", "top", middle=middle)
    module = types.ModuleType("module")
    module.middle = middle
    through_module = Digested("def top(): return module.middle()", "top", module=module)
    nested = types.SimpleNamespace(leaf=leaf, middle=middle, top=top, through_module=through_module)
    leaf.fn.__globals__["leaf"] = leaf
    return nested


def test_a_key_is_the_same_whatever_was_digested_before():
    alone, after = family(), family()
    assert family().middle.cache_key != "[('FEW', 3)]", "what is mended shows here"
    settle_key(alone.middle)
    after.leaf.cache_key  # noqa: B018
    settle_key(after.middle)
    assert alone.middle.hash == after.middle.hash == "[('FEW', 3)]"


@pytest.mark.parametrize("name", ["top", "through_module"])
def test_what_callees_call_is_digested_before_them(name):
    """Whether something is a kernel must be asked of its class: the question alone digests it otherwise."""
    held = family()
    settle_key(vars(held)[name])
    assert held.middle.hash == "[('FEW', 3)]" and None not in (held.leaf.hash, vars(held)[name].hash)


def test_no_kernel_is_digested_before_what_it_calls(monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit")
    early, update = [], jit.DependenciesFinder._update_hash

    def watched(self, callee):
        if callee.hash is None:
            early.append((self.name, callee.fn.__name__))
        return update(self, callee)

    kernels = []
    for path in sorted(KERNELS.rglob("*_*.py")):
        name = ".".join(("indexcache.kernels", *path.relative_to(KERNELS).with_suffix("").parts))
        module = importlib.import_module(name)
        kernels += [x for x in vars(module).values() if isinstance(x, jit.JITFunction) and x.fn.__module__ == name]
    if not kernels:
        pytest.skip("the interpreter or no compiler is here")
    digests = [(kernel, kernel.hash) for kernel in kernels]
    monkeypatch.setattr(jit.DependenciesFinder, "_update_hash", watched)
    for kernel in kernels:
        kernel.hash = None
    try:
        for kernel in kernels[::-1]:
            settle_key(kernel)
    finally:
        for kernel, digest in digests:
            kernel.hash = digest
    assert len(kernels) > 100 and early == []


def test_functions_inside_functions_and_circles_are_followed():
    held = family()
    held.leaf.fn.__globals__["FEW"] = held.top
    settle_key(held.top)
    assert None not in (held.leaf.hash, held.middle.hash, held.top.hash)


def test_what_has_no_digest_is_left_alone():
    settle_key(object())
