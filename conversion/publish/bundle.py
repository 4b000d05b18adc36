"""Write the model's code beside a checkpoint's weights, checked against the rules of transformers' loader."""

from __future__ import annotations

import ast
import os
import sys
import tempfile
from pathlib import Path

from transformers.dynamic_module_utils import get_imports, get_relative_imports

from ...configuration.hub_code import AUTO_MAP, hub_code, write_hub_code

# What every transformers installation with torch has; anything else belongs inside `try:`.
_ALWAYS_INSTALLED = frozenset({"huggingface_hub", "numpy", "packaging", "safetensors", "torch", "transformers"})


def write_bundle(folder: str | os.PathLike[str]) -> list[Path]:
    """Write the flat model code into a checkpoint's folder.

    Args:
        folder: the checkpoint's folder, made when absent.

    Returns:
        The files written, by name. Their bytes depend on the package's version and source alone.

    Raises:
        ValueError: a shipped file breaks a rule of transformers' loader; nothing has been written then.
    """
    checked_hub_code()
    return write_hub_code(folder)


def checked_hub_code() -> dict[str, str]:
    """The model's code as it ships, file name -> text; ValueError when transformers could not load it."""
    with tempfile.TemporaryDirectory() as trial:
        check_bundle(write_hub_code(trial))
    return hub_code()


def check_bundle(files: list[Path]) -> None:
    """Check that transformers can load these files from one folder in a process without `indexcache` and triton.

    Args:
        files: the code files of one checkpoint, side by side.

    Raises:
        ValueError: naming the file, the import and the mend, for all of them at once.
    """
    shipped = {path.stem for path in files}
    faults = [fault for path in files for fault in _faults(path, shipped)]
    if faults:
        raise ValueError("the code would not load with trust_remote_code=True:\n" + "\n".join(faults))


def _faults(path: Path, shipped: set[str]) -> list[str]:
    followed = set(get_relative_imports(path))
    faults = []
    for name in sorted(followed - shipped):
        faults.append(f"{path.name}: '.{name}' is not among the shipped files: import from a shipped file by its name")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        at = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or node.module is None:
                faults.append(f"{at}: '{ast.unparse(node)}': write 'from .file import name'")
            elif node.module not in followed:
                faults.append(f"{at}: '{ast.unparse(node)}' is not seen by transformers: put it on a line of its own")
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(name.partition(".")[0] == "indexcache" for name in names):
            faults.append(f"{at}: '{ast.unparse(node)}': a loaded checkpoint has no package `indexcache`")
    for name in get_imports(path):
        if name not in sys.stdlib_module_names | _ALWAYS_INSTALLED | {"indexcache"}:
            faults.append(f"{path.name}: `import {name}` outside `try:` is demanded of every user: put it inside one")
    return faults


__all__ = ["AUTO_MAP", "check_bundle", "checked_hub_code", "write_bundle"]
