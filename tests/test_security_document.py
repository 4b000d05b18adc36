"""docs/security.md: each statement's tests exist, and what can be read off the source is read off it."""

import ast
import re
from pathlib import Path

import pytest

import indexcache

ROOT = Path(indexcache.__file__).parent
# What is installed; tests, demo and build folders are not.
APART = {"tests", "demo", "build", "dist"}
SOURCES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not set(path.relative_to(ROOT).parts) & APART and not any(part.startswith(".") for part in path.parts)
)
DOCUMENT = ROOT / "docs/security.md"


def calls():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_there_is_source_to_look_at():
    assert {"cli.py", "hub_source.py", "modeling_indexcache.py"} <= {path.name for path in SOURCES}


def test_no_verb_trusts_the_code_of_a_checkpoint():
    trusting = [at for at, call in calls() if any(word.arg == "trust_remote_code" for word in call.keywords)]
    assert trusting == []


def test_nothing_is_unpickled_but_what_a_process_sends_its_own_child():
    unpickling = [
        at.rpartition(":")[0]
        for at, call in calls()
        if re.fullmatch(r"(torch|pickle|joblib|dill|cloudpickle|marshal)\.loads?", ast.unparse(call.func))
    ]
    # The process that compiles kernels reads what to compile from a pipe of the process that started it.
    assert unpickling == ["kernels/compilation/compile_process.py"]


@pytest.mark.skipif(not DOCUMENT.is_file(), reason="documents are not installed")
def test_every_test_that_the_document_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", DOCUMENT.read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, name in named:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^\s*def {name}\(", text, re.MULTILINE), f"{file}::{name}"


@pytest.mark.skipif(not DOCUMENT.is_file(), reason="documents are not installed")
def test_every_statement_of_what_holds_names_a_test():
    """Paragraphs and points under a heading, introductions and exceptions that are spelled out apart."""
    text = DOCUMENT.read_text(encoding="utf-8")
    points = re.findall(r"^- (.*(?:\n  .*)*)", text, re.MULTILINE)
    without = [point for point in points if "`tests/" not in point]
    assert without == []
