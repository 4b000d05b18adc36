"""Operations that `torch.compile` keeps as one and does not look into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])
# Functions of this package's operations, by what a call of one looks like to a mode of PyTorch.
_functions: dict[Any, Callable[..., Any]] = {}


def custom_op(
    shapes: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    keep: Callable[..., None] | None = None,
) -> Callable[[_Function], _Function]:
    """Make a function of tensors, whose schema is its annotations, a custom operation that changes no argument.

    Its namespace is its file's: the installed one and each revision loaded from the Hub have one of their own.

    Args:
        shapes: called with the same arguments, gives tensors like the results: contiguous, of their shapes and dtypes.
        backward: called with autograd's context and the results' gradients, gives those of the arguments.
        keep: called with the context, arguments and results, keeps in the context what `backward` needs.
    """

    def register(function: _Function) -> _Function:
        name = f"{function.__module__.replace('.', '_')}::{function.__name__.lstrip('_')}"
        operation: Any = torch.library.custom_op(name, function, mutates_args=())
        operation.register_fake(shapes)
        if backward is not None:
            operation.register_autograd(backward, setup_context=keep)
        _functions[operation._opoverload] = function
        return cast(_Function, operation)

    return register


@contextmanager
def differentiable_again() -> Iterator[None]:
    """Let autograd record inside a custom operation, which PyTorch runs below it; `enable_grad` alone does not."""
    keys = [torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView]
    excluded = [key for key in keys if torch._C._dispatch_tls_is_dispatch_key_excluded(key)]
    for key in excluded:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for key in excluded:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)


def function_of(operation: Any) -> Callable[..., Any] | None:
    """The Python function of one of this package's custom operations, or None."""
    return _functions.get(operation)
