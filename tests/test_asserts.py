"""`python -O` takes assert statements out: in the package they narrow types for the type checker, and do nothing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for path in ROOT.rglob("*.py")
    if not any(part == "tests" or part.startswith(".") for part in path.relative_to(ROOT).parts)
]
CLASS = """
class A:
    @property
    def teacher(self):
        return agree()
    @property
    def name(self):
        return self.x
"""


def properties(trees):
    """Names that call something when they are read, in any class."""
    computed = {"property", "cached_property"}
    return {
        node.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(getattr(one, "attr", getattr(one, "id", "")) in computed for one in node.decorator_list)
        and any(isinstance(part, ast.Call) for statement in node.body for part in ast.walk(statement))
    }


def is_plain(node, computed):
    """A name, or attributes of one that are only read."""
    while isinstance(node, ast.Attribute) and node.attr not in computed:
        node = node.value
    return isinstance(node, ast.Name)


def narrows(test, computed):
    """`x is not None`, or `isinstance(x, T)`."""
    match test:
        case ast.Compare(left=value, ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
            return is_plain(value, computed)
        case ast.Call(func=ast.Name(id="isinstance"), args=[value, kind], keywords=[]):
            return is_plain(value, computed) and is_plain(kind, computed)
    return False


def asserts_that_do_more(sources):
    trees = {path: ast.parse(source) for path, source in sources.items()}
    computed = properties(trees.values())
    return [
        f"{path}:{node.lineno}: assert {ast.unparse(node.test)}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert) and not narrows(node.test, computed)
    ]


def test_asserts_narrow_types_and_do_nothing_else():
    assert len(FILES) > 100
    assert asserts_that_do_more({path.relative_to(ROOT): path.read_text() for path in FILES}) == []


@pytest.mark.parametrize(
    ("test", "allowed"),
    [
        ("x is not None", True),
        ("isinstance(self.name, str)", True),
        ("self.part.x is not None", True),
        ("isinstance(x, torch.Tensor)", True),
        ("self.teacher", False),
        ("self.teacher is not None", False),
        ("dist.all_reduce(x) is not None", False),
        ("next(found)", False),
        ("isinstance(queue.pop(), int)", False),
        ("(x := run()) is not None", False),
        ("x == 3", False),
    ],
)
def test_the_rule_tells_them_apart(test, allowed):
    source = f"{CLASS}\nassert {test}\n"
    assert (asserts_that_do_more({"a.py": source}) == []) is allowed
