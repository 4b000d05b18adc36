"""Limits of time stand in one place, so that none is too short for a busy machine."""

import ast
from pathlib import Path

HERE = Path(__file__).parent


def numbers_given_as_limits(tree):
    """Lines where a number is a `timeout` of a call, or of pytest's mark; a queue's `get` only looks again later."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if getattr(call.func, "attr", None) == "get":
            continue
        limits = [keyword.value for keyword in call.keywords if keyword.arg == "timeout"]
        if getattr(call.func, "attr", None) == "timeout":
            limits += call.args
        yield from (limit.lineno for limit in limits if isinstance(limit, ast.Constant) and limit.value is not None)


def test_no_test_has_a_limit_of_its_own():
    found = [
        f"{path.relative_to(HERE)}:{line}"
        for path in HERE.rglob("*.py")
        for line in numbers_given_as_limits(ast.parse(path.read_text()))
    ]
    assert not found, f"import PROCESS_SECONDS or TEST_SECONDS from time_limits instead: {found}"


def test_the_search_finds_them():
    source = "run(x, timeout=300)\npytest.mark.timeout(60)\nf(timeout=LIMIT)\nq.get(timeout=9)\n"
    assert list(numbers_given_as_limits(ast.parse(source))) == [1, 2]
