"""The modules that a saved checkpoint holds as sections of a few files; in the package they are files of their own.

A first load from the Hub takes two requests a file. So `hub_code.py` saves what is under `kernels/` in one file and
what is under `modeling_indexcache/` in another, each module as it is, as plain source behind a line with its name;
transformers copies these files and never imports them. Here a section becomes a module, when it is first imported:
compiled by itself, at its lines of the file, so that tracebacks, `inspect` and Triton, which read source by file and
line, find it.

What the package writes `from .rotary import rotate` is `from .module_sections import rotary__rotate as rotate` in a
checkpoint: transformers follows that to this file, and from here to those with the sections.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from .section_names import SECTION, parts_of

_SECTION_LINE = re.compile(SECTION.format(r"(\w+)") + "\n")
#: The files with sections beside this one; saving fills it in.
SECTION_FILES: tuple[str, ...] = ()


def __getattr__(name: str) -> Any:
    module, wanted = parts_of(name)
    if not (module and wanted):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__package__}.{module}"), wanted)


class _Sections(MetaPathFinder, Loader):
    """Finds and loads the sections of files in a folder as modules of a package."""

    def __init__(self, package: str, files: list[Path]) -> None:
        self._package = package
        # File, lines before the section, text.
        self._places: dict[str, tuple[Path, int, str]] = {}
        for file in files:
            text = file.read_text(encoding="utf-8")
            begins = list(_SECTION_LINE.finditer(text))
            for begin, behind in zip(begins, [*(match.start() for match in begins[1:]), len(text)]):
                self._places[begin[1]] = file, text.count("\n", 0, begin.end()), text[begin.end() : behind]

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Of a section of this package; None leaves the name to others."""
        package, _, module = fullname.rpartition(".")
        if package != self._package or module not in self._places:
            return None
        spec = ModuleSpec(fullname, self, origin=str(self._places[module][0]))
        spec.has_location = True
        return spec

    def exec_module(self, module: ModuleType) -> None:
        """Run a section as the module's code."""
        file, lines_before, text = self._places[module.__name__.rpartition(".")[2]]
        exec(compile("\n" * lines_before + text, str(file), "exec", dont_inherit=True), module.__dict__)


if SECTION_FILES:
    sys.meta_path.append(_Sections(__name__.rpartition(".")[0], [Path(__file__).with_name(f) for f in SECTION_FILES]))
