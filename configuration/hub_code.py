"""The code that travels with a saved checkpoint, so that it loads with `trust_remote_code=True` and nothing installed.

transformers' loader takes single files that import only their siblings, two requests for each. The package keeps its
shipped code in three folders (`configuration`, `kernels`, `modeling_indexcache`) and folders in them, so saving
flattens it: what the config needs, and what is imported by its name from elsewhere, stays a file (`_FILES`), with each
relative import turned into an import of a sibling; all other modules that the model imports become sections of one
file a folder, see `module_sections.py`. A copy that was loaded from a checkpoint is flat already and writes itself out
again, byte for byte, so a model loaded from the Hub saves and pushes as one from the installed package does.

Contract for the shipped classes: `IndexCacheConfig.save_pretrained` sets `auto_map = dict(AUTO_MAP)` and calls
`write_hub_code(save_directory)` before its parent. transformers saves the config in the middle of saving a model,
after it has noted which files were there and before it uploads the new ones, so that one call serves
`config.save_pretrained`, `model.save_pretrained` (with `push_to_hub=True` too) and `model.push_to_hub`. A model may
call it as well; the second call writes the same bytes.

Rules for shipped files: unique file names; relative imports only among themselves and only as
"from .file import name" (or "from ..folder.file import name"); triton and other optional packages inside `try:`.
`conversion/publish/bundle.py` checks them.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.version import InvalidVersion, Version
from transformers.utils import logging

from .section_names import SECTION, name_of

AUTO_MAP = {
    "AutoConfig": "configuration_indexcache.IndexCacheConfig",
    "AutoModel": "modeling_indexcache.IndexCacheModel",
    "AutoModelForCausalLM": "modeling_indexcache.IndexCacheForCausalLM",
}
SHIPPED_FOLDERS = ("configuration", "kernels", "modeling_indexcache")
# Where the walk over imports starts. transformers caches a local checkpoint's config apart from its model, so a copy
# of this file beside the config alone knows only the config's own files; the model's are saved by the model's copy.
ENTRY_MODULES = ("modeling_indexcache", "configuration_indexcache")
# What stays a file of its own: the entries and all that the config imports; what side processes start with; and what
# makes modules of sections.
_CONFIG, _LOADER = "configuration_indexcache", "module_sections"
_FILES = (*ENTRY_MODULES, "compile_process", _LOADER)

_LICENCE = "SPDX-License-Identifier: Apache-2.0"
_HEADER = re.compile(rf"# IndexCache for Transformers (\S+)\. {re.escape(_LICENCE)}")
_NO_SECTIONS = re.compile(r"^(SECTION_FILES: tuple\[str, \.\.\.\] = )\(\)$", re.MULTILINE)
_RELATIVE_IMPORT = re.compile(r"^([ \t]*from[ \t]+)(\.+)([\w.]*)([ \t]+import\b)", re.MULTILINE)


def write_hub_code(folder: str | os.PathLike[str]) -> list[Path]:
    """Write the model's own source code, flat, into `folder`.

    Each file is replaced in one step and depends on the package's version and source alone.

    Args:
        folder: the checkpoint's folder, made when absent.

    Returns:
        The files written, by name.

    Raises:
        ValueError: a shipped file has another's name, or imports what does not ship.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in hub_code().items():
        target, partial = folder / name, folder / f".{name}.{os.getpid()}.partial"
        try:
            partial.write_bytes(text.encode())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        written.append(target)
    return written


def hub_code() -> dict[str, str]:
    """The model's source files as they are shipped: file name -> text, sorted by name."""
    here = Path(__file__).resolve().parent
    in_package = _is_in_package()
    folders = _shipped_folders(here.parent) if in_package else [here]
    sources = _sources_by_module(folders)
    needed = _imported_from((*ENTRY_MODULES, _LOADER), sources, folders)
    if not in_package:
        return {f"{module}.py": text for module, text in sorted(needed.items())}
    header = f"# IndexCache for Transformers {code_version()}. {_LICENCE}\n"
    files = frozenset({*_FILES, *_imported_from((_CONFIG,), sources, folders)})
    sections: dict[str, list[str]] = {}
    for module in sorted(needed.keys() - files, key=lambda module: sources[module]):
        top = sources[module].relative_to(here.parent).parts[0]
        sections.setdefault(f"{top}_sections.py", []).append(module)
    code = {f"{module}.py": header + _flat(needed[module], files) for module in needed.keys() & files}
    for file, modules in sections.items():
        parts = [f"{SECTION.format(module)}\n{_flat(needed[module], files)}" for module in modules]
        code[file] = (
            header + "# Modules that module_sections.py loads, each as it is in the package.\n" + "".join(parts)
        )
    if sections:
        code[f"{_LOADER}.py"] = _knowing(code[f"{_LOADER}.py"], sorted(sections))
    return dict(sorted(code.items()))


def _imported_from(entries: tuple[str, ...], sources: dict[str, Path], folders: list[Path]) -> dict[str, str]:
    """The source of these modules and of all that they import, by name; entries that are not there are left out."""
    queue = [module for module in entries if module in sources]
    found: dict[str, str] = {}
    while queue:
        module = queue.pop()
        if module not in found:
            found[module] = text = sources[module].read_text(encoding="utf-8")
            queue += [_imported_module(sources[module], match, folders) for match in _RELATIVE_IMPORT.finditer(text)]
    return found


@cache
def _flat(text: str, files: frozenset[str]) -> str:
    """A module's source with its relative imports as they are in a checkpoint: from siblings, or from sections."""
    lines = text.splitlines(keepends=True)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level]
    for node in sorted(nodes, key=lambda node: node.lineno, reverse=True):
        module = str(node.module).rpartition(".")[2]
        if module in files:
            lines[node.lineno - 1] = _RELATIVE_IMPORT.sub(_import_of_sibling, lines[node.lineno - 1])
            continue
        names = [f"{name_of(module, alias.name)} as {alias.asname or alias.name}" for alias in node.names]
        # As many lines as there were, so that all that follow keep their numbers.
        more = (node.end_lineno or node.lineno) - node.lineno
        begin = f"{lines[node.lineno - 1][: node.col_offset]}from .{_LOADER} import "
        inside = f"(\n    {', '.join(names)}{(more - 1) * chr(10)})" if more else ", ".join(names)
        lines[node.lineno - 1 : node.end_lineno] = [f"{begin}{inside}\n"]
    return "".join(lines)


def _knowing(loader: str, files: list[str]) -> str:
    """The source of `module_sections.py` with the files that have sections, in a way that transformers follows."""
    known, count = _NO_SECTIONS.subn(f"\\g<1>{tuple(files)!r}", loader)
    if count != 1:
        raise ValueError(f"{_LOADER}.py must say SECTION_FILES once: it is how a checkpoint's code finds its sections")
    followed = "".join(f"    from .{file.removesuffix('.py')} import *  # noqa: F403\n" for file in files)
    return f"{known}\nif False:  # Never run: transformers copies the files that it sees imported.\n{followed}"


def code_version() -> str | None:
    """The release that this code is of: the package's version, or that in the header of a copy beside a checkpoint."""
    if _is_in_package():
        return str(sys.modules[__name__.partition(".")[0]].__version__)
    return version_in_header(Path(__file__).read_text(encoding="utf-8"))


def version_in_header(text: str) -> str | None:
    """The release that shipped a code file, from the file's first line; `None` for a file of others."""
    match = _HEADER.match(text)
    return match[1] if match else None


def newer_release_installed() -> str | None:
    """For a copy beside a checkpoint: the version of the installed package, where that is a later release."""
    own = None if _is_in_package() else code_version()
    if own is None:
        return None
    try:
        installed = metadata.version("indexcache")
        return installed if Version(installed) > Version(own) else None
    except (metadata.PackageNotFoundError, InvalidVersion):
        return None


def _shipped_folders(package: Path) -> list[Path]:
    """The folders that hold shipped files: those of `SHIPPED_FOLDERS` and all under them."""
    tops = [package / folder for folder in SHIPPED_FOLDERS]
    return tops + sorted({path.parent for top in tops for path in top.rglob("*.py")} - set(tops))


def _is_in_package() -> bool:
    here = Path(__file__).resolve().parent
    return here.name in SHIPPED_FOLDERS and all((here.parent / folder).is_dir() for folder in SHIPPED_FOLDERS)


def _sources_by_module(folders: list[Path]) -> dict[str, Path]:
    sources: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.py")):
            if path.stem in sources:
                raise ValueError(
                    f"{path} and {sources[path.stem]} would both be saved as {path.name}: rename one of them"
                )
            sources[path.stem] = path
    return sources


def _imported_module(source: Path, match: re.Match[str], folders: list[Path]) -> str:
    """The module that a relative import in `source` names, checked to be one that ships."""
    _, dots, dotted, _ = match.groups()
    *parents, module = dotted.split(".")
    target = source.parents[len(dots) - 1].joinpath(*parents, f"{module}.py")
    if not module or target.parent not in folders or not target.is_file():
        line = source.read_text(encoding="utf-8").count("\n", 0, match.start()) + 1
        raise ValueError(
            f"{source}:{line}: '{match.group().strip()}' names no file that ships with a checkpoint: import names "
            f"from one file of {', '.join(SHIPPED_FOLDERS)}"
        )
    return module


def _import_of_sibling(match: re.Match[str]) -> str:
    keyword, _, dotted, rest = match.groups()
    return f"{keyword}.{dotted.rpartition('.')[2]}{rest}"


# transformers may import a local checkpoint's copies twice, for its config and its model: one logger says it once.
if (_newer := newer_release_installed()) is not None:
    logging.get_logger("indexcache").warning_once(
        f"This checkpoint brings the code of IndexCache {code_version()}, and {_newer} is installed. `indexcache "
        "refresh` on its folder or Hub repository puts the newer code in; `import indexcache` before loading uses "
        "the installed one."
    )
