"""What must hold for every supported Python and is not seen by running the tests on one of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INLINED = (ast.ListComp, ast.SetComp, ast.DictComp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
INNER = (*INLINED, ast.GeneratorExp, *FUNCTIONS)


def files() -> list[Path]:
    folders = ("src", "tests", "benchmarks", "recipes")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of one scope. Of an inner scope, only the node that opens it."""
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (*INNER, ast.ClassDef)):
            waiting += ast.iter_child_nodes(node)


def names(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    found = (each for each in ast.walk(node) if isinstance(each, ast.Name))
    return {name.id for name in found if isinstance(name.ctx, context)}


def parameters(node: ast.AST) -> set[str]:
    return {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}


def local_names(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> set[str]:
    found = parameters(function.args)
    for node in own_nodes(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
    return found


def shared_names(tree: ast.AST) -> list[tuple[int, str]]:
    """Return line and name where a comprehension's variable hides an outer name from its sibling.

    Since Python 3.12 a comprehension is a part of its function, and its variables are the
    function's. 3.12.0 to 3.12.3 then look for a global of the same name, read in another
    comprehension of that function, among the locals: UnboundLocalError (python/cpython issue
    118513). For a name of an enclosing function this is so in 3.13 too (issue 156664).
    """
    found = []
    for function in (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)):
        inner = [node for node in own_nodes(function) if isinstance(node, INNER)]
        bound = set().union(
            *(names(node, ast.Store) for node in inner if isinstance(node, INLINED))
        )
        bound -= local_names(function)
        for node in inner:
            free = names(node, ast.Load) - names(node, ast.Store) - parameters(node)
            found += [(node.lineno, name) for name in sorted(free & bound)]
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_comprehension_hides_a_name_that_another_one_reads(path: Path) -> None:
    assert shared_names(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("a = {c.x for c in xs}; return [c(x) for x in xs]", [(2, "c")]),
        ("a = [c(x) for x in xs]; return {c: 1 for c in xs}", [(2, "c")]),
        ("a = [c for c in xs]; return (c(x) for x in xs)", [(2, "c")]),
        ("a = [c for c in xs]; return lambda: c", [(2, "c")]),
        ("a = [[c for c in x] for x in xs]; return [[c(y) for y in x] for x in xs]", [(2, "c")]),
        ("a = list(c for c in xs); return [c(x) for x in xs]", []),
        ("a = [c for c in xs]; return [c for c in xs]", []),
        ("a = [c for c in xs]; return c(xs)", []),
        ("c = abs; a = [c for c in xs]; return [c(x) for x in xs]", []),
        ("a = [c for c in xs]; return lambda c: c", []),
    ],
)
def test_a_hidden_name_is_found(body: str, found: list[tuple[int, str]]) -> None:
    assert shared_names(ast.parse(f"def f(xs):\n    {body}\n")) == found
