"""The folders build on each other in one direction, no two modules import each other, and each stays readable.

import-linter needs an `__init__.py` in every folder, which would shadow other packages (CONTRIBUTING.md), so the
imports are read here, those inside functions included.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lowest first; those of one line are siblings that do not know each other. `command.py` of a folder is the arguments
# of its verbs, and belongs to the command line.
LAYERS = [
    {"configuration"},
    {"kernels"},
    {"modeling_indexcache"},
    {"conversion"},
    {"runs"},
    {"evaluation", "planning"},
    {"pattern_search", "distillation"},
    {"benchmarks.bench"},
    {"command"},
    {"cli"},
]
# Scripts beside the package: they may use all of it, and nothing of it uses them.
SCRIPTS = {"benchmarks.kernels", "benchmarks.studies", "demo"}
MOST_MODULES, MOST_LINES = 12, 500
# TO BE EMPTIED: being split elsewhere. Folders above MOST_MODULES, files above MOST_LINES.
LARGE_FOLDERS: set[str] = set()
LONG_FILES: set[str] = set()


def sources():
    """The text of every module of the package, by dotted name below the root; the root's own `__init__` aside."""
    paths = [path for path in ROOT.rglob("*.py") if not is_foreign(path)]
    return {module_name(path): path.read_text() for path in paths if path.name != "__init__.py"}


def is_foreign(path):
    parts = path.relative_to(ROOT).parts
    # Checkpoints that `make demo` wrote hold the package's code in one folder.
    is_written = parts[:2] == ("demo", "output")
    return parts[0] in {"tests", "docs", "build"} or is_written or any(part.startswith(".") for part in parts)


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(name, text, modules):
    """`(module, line)` of every import of the package's own, wherever in the file it stands."""
    for node in ast.walk(ast.parse(text)):
        found = []
        if isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            path = [*base, *(node.module or "").split(".")] if node.module else base
            if not node.level and path[:1] != ["indexcache"]:
                continue
            whole = ".".join(path if node.level else path[1:])
            found = [f"{whole}.{part.name}".strip(".") for part in node.names] + [whole]
        elif isinstance(node, ast.Import):
            found = [part.name.removeprefix("indexcache.") for part in node.names]
        yield from ((module, node.lineno) for module in found if module in modules and module != name)


def broken_imports(texts):
    """Imports of the package's own that name nothing there; mypy takes them for packages that are not installed."""
    found = []
    for name, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = name.split(".")
            target = ".".join([*base[: -node.level], *(node.module or "").split(".")]).strip(".")
            known = target in texts or any(f"{target}.{part.name}".strip(".") in texts for part in node.names)
            if node.level > len(base) or not (known or target == ""):
                found.append(f"{name}:{node.lineno} imports {'.' * node.level}{node.module or ''}")
    return found


def layer_of(name):
    """Its height and the part of it, or None for scripts."""
    if name.endswith(".command"):
        name = "command"
    for height, parts in enumerate(LAYERS):
        for part in parts:
            if name == part or name.startswith(f"{part}."):
                return height, part
    assert any(name.startswith(f"{script}.") for script in SCRIPTS), f"{name} lies in no folder with a layer"
    return len(LAYERS), "scripts"


def wrong_arrows(texts):
    found = []
    for name, text in texts.items():
        height, part = layer_of(name)
        for other, line in imported(name, text, texts):
            other_height, other_part = layer_of(other)
            if other_height > height or (other_height == height and other_part != part):
                found.append(f"{name}:{line} imports {other}")
    return found


def circles(texts):
    """Groups of modules that import each other, directly or through others."""
    graph = {name: {other for other, _ in imported(name, text, texts)} for name, text in texts.items()}
    reached = {}
    for name in graph:
        seen, left = set(), [name]
        while left:
            left += [other for other in graph[left.pop()] if other not in seen and not seen.add(other)]
        reached[name] = seen
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def test_nothing_imports_upwards_and_siblings_do_not_know_each_other():
    texts = sources()
    assert len(texts) > 150
    assert wrong_arrows(texts) == []


def test_no_two_modules_import_each_other():
    assert circles(sources()) == []


def test_relative_imports_name_modules_that_exist():
    assert broken_imports(sources()) == []
    for planted in ("from ..runs import journal", "from .runs.absent import Journal"):
        assert len(broken_imports({**sources(), "cli": planted})) == 1


@pytest.mark.parametrize(
    ("name", "planted", "message"),
    [
        ("runs.monitor", "from ..pattern_search.result import FORMAT", "imports pattern_search.result"),
        ("distillation.run", "def f():\n    from ..pattern_search import search", "imports pattern_search.search"),
        ("pattern_search.run", "import indexcache.distillation.recipe", "imports distillation.recipe"),
        ("conversion.io.fp8", "from indexcache.runs.errors import RunError", "imports runs.errors"),
        ("evaluation.run", "from . import command", "imports evaluation.command"),
    ],
)
def test_a_planted_arrow_is_found(name, planted, message):
    texts = sources()
    line = texts[name].count("\n") + 1
    texts[name] += planted + "\n"
    assert [found for found in wrong_arrows(texts) if message in found] == [
        f"{name}:{line + planted.count(chr(10))} {message}"
    ]


def test_a_planted_circle_is_found():
    texts = sources()
    texts["runs.errors"] += "def f():\n    from .journal import Journal\n"
    (circle,) = circles(texts)
    assert {"runs.errors", "runs.journal"} <= set(circle)


def test_folders_and_files_stay_small():
    paths = [path for path in ROOT.rglob("*.py") if not is_foreign(path) or path.relative_to(ROOT).parts[0] == "tests"]
    folders = {}
    for path in paths:
        folders.setdefault(path.parent.relative_to(ROOT), []).append(path)
    large = {
        folder.as_posix()
        for folder, held in folders.items()
        if len(held) > MOST_MODULES and "tests" not in folder.parts
    }
    long = {path.relative_to(ROOT).as_posix() for path in paths if path.read_text().count("\n") > MOST_LINES}
    assert large == LARGE_FOLDERS and long == LONG_FILES, "split what is new, and take out what is no longer so"
