"""An operation's folder has one face: models import public functions, and no backend."""

import ast
from pathlib import Path

import pytest

import indexcache

ROOT = Path(indexcache.__file__).parent
BACKENDS = ("_triton", "_gluon", "_reference")


def imported(path):
    """The modules that a file imports from, by the last part of their names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield (node.module or "").rpartition(".")[2]
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.Import):
            yield from (alias.name.rpartition(".")[2] for alias in node.names)


@pytest.mark.parametrize("path", sorted(ROOT.glob("modeling_indexcache/**/*.py")), ids=lambda path: path.name)
def test_models_import_no_backend(path):
    files = {file.stem for file in ROOT.glob("kernels/**/*.py")}
    assert [name for name in imported(path) if name in files and name.endswith(BACKENDS)] == []


def test_such_an_import_is_found(tmp_path):
    file = tmp_path / "layer.py"
    file.write_text("from ...kernels.sparse_mla.sparse_mla_triton import f\nfrom ..sparse_mla import rope_gluon\n")
    assert [name for name in imported(file) if name.endswith(BACKENDS)] == ["sparse_mla_triton", "rope_gluon"]


def test_files_and_folders_stay_small_and_names_unique():
    folders = ("configuration", "kernels", "modeling_indexcache")
    shipped = [path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
    names = [path.name for path in shipped]
    assert len(set(names)) == len(names)
    for path in ROOT.glob("kernels/**/*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path.name
        assert len(list(path.parent.glob("*.py"))) <= 12, path.parent.name
