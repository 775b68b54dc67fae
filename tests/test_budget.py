"""The project stays small enough to read."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "simpletuner"
FILE_LINES = 400
COLUMNS = 100
FILE_LINES_EXCEPT: dict[str, int] = {}
FUNCTION_LINES = 60  # and more is too many
BROAD_EXCEPTS = 3
WEIGHTS_BYTES = 25 * 10**6


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_growth_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Concepts are bounded by what a reader can hold, so the test prints them: no total is a limit."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files()]
    classes = sum(isinstance(node, ast.ClassDef) for tree in trees for node in ast.walk(tree))
    with capsys.disabled():
        print(f"\n{len(trees)} modules, {classes} classes, {sum(map(lines, files()))} lines")
    assert classes


def test_files() -> None:
    found = [
        f"{path.relative_to(SOURCE)}{problem}" for path in files() for problem in problems(path)
    ]
    assert found == []


def problems(path: Path) -> Iterator[str]:
    """Yield what is wrong in a file, each with its line."""
    text = path.read_text(encoding="utf-8")
    size = len(text.splitlines())
    if size > FILE_LINES_EXCEPT.get(path.relative_to(SOURCE).as_posix(), FILE_LINES):
        yield f" has {size} lines"
    for number, line in enumerate(text.splitlines(), 1):
        if len(line.partition("  # type: ignore")[0]) > COLUMNS:
            yield f":{number} has {len(line)} columns"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > FUNCTION_LINES:
                yield f":{node.lineno} {node.name} has {size} lines"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "hasattr":
                yield f":{node.lineno} uses hasattr"
            if node.func.id == "getattr" and len(node.args) == 3:
                yield f":{node.lineno} uses getattr with a default"


def test_each_problem_of_a_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    path = tmp_path / "sample.py"
    path.write_text(
        "hasattr(1, 'a')\ngetattr(1, 'a', 2)\ngetattr(1, 'a')\ndef f():\n"
        + "    pass\n" * (FUNCTION_LINES - 2)
        + "def g():\n"
        + "    pass\n" * (FILE_LINES - 3)
    )
    assert set(problems(path)) == {
        f" has {FILE_LINES + FUNCTION_LINES} lines",
        ":1 uses hasattr",
        ":2 uses getattr with a default",
        f":{FUNCTION_LINES + 3} g has {FILE_LINES - 2} lines",
    }


def test_broad_excepts_only_at_the_outer_edges() -> None:
    found = []
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                name = node.type.id if isinstance(node.type, ast.Name) else None
                if node.type is None or name in ("Exception", "BaseException"):
                    found.append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    assert len(found) <= BROAD_EXCEPTS, found


def test_bundled_weights() -> None:
    weights = (SOURCE / "models" / "nano").rglob("*")
    assert sum(path.stat().st_size for path in weights if path.is_file()) <= WEIGHTS_BYTES


def test_no_unfinished_work() -> None:
    for path in files():
        text = path.read_text(encoding="utf-8")
        for word in ("TODO", "FIXME", "XXX", "NotImplementedError"):
            assert word not in text, f"{path}: {word}"
