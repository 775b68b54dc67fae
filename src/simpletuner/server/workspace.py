"""Where the server may look: one workspace, and the folders a person has added to it. Nothing else.

workspace/
  config/<name>/config.json, multidatabackend.json     what `simpletuner train --env <name>` trains
  datasets/<name>/                                     pictures and captions
  output/<name>/                                       run folders
  .simpletuner/                                        the server's own: index.sqlite, jobs/, drafts/, thumbs/
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from simpletuner.errors import SimpleTunerError

SERVER_FOLDER = ".simpletuner"
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095  # bytes, of Linux' and macOS' file systems


class PathOutsideWorkspace(SimpleTunerError):
    """A path that leads out of every allowed folder. Its text never repeats what is there."""


@dataclass(frozen=True)
class Workspace:
    """workspace: absolute and resolved. roots: other allowed folders, likewise."""

    root: Path
    extra_roots: tuple[Path, ...] = ()

    @property
    def server_dir(self) -> Path:
        return self.root / SERVER_FOLDER

    @property
    def datasets_dir(self) -> Path:
        return self.root / "datasets"

    @property
    def output_dir(self) -> Path:
        return self.root / "output"

    @property
    def allowed_roots(self) -> tuple[Path, ...]:
        return (self.root, *self.extra_roots)

    def make_trash_folder(self) -> Path:
        """A new folder for what is taken away; nothing of a person's is deleted."""
        made = (
            self.server_dir / "trash" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        )
        made.mkdir(parents=True)
        return made

    def resolve(self, path: Path | str) -> Path:
        """The path with every link followed, if it lies in an allowed folder; a relative one is looked up in
        the workspace. Raises Outside.
        """
        text = os.fspath(path)
        if _is_invalid_path(text):
            raise PathOutsideWorkspace("that is no path")
        try:
            real = Path(os.path.realpath(self.root / os.path.expanduser(text)))
        except (OSError, ValueError) as error:
            raise PathOutsideWorkspace("that is no path") from error
        if any(real == root or root in real.parents for root in self.allowed_roots):
            return real
        raise PathOutsideWorkspace(
            "that path is outside the workspace and the folders added with --root"
        )

    def resolve_or_none(self, path: Path | str) -> Path | None:
        """As `inside`; None for what is outside."""
        try:
            return self.resolve(path)
        except PathOutsideWorkspace:
            return None

    def resolve_below(self, folder: Path, name: str) -> Path:
        """A file below `folder` by its relative name, links followed. Raises Outside for "..", hidden and
        absolute names, backslashes, drives, NUL, and links that lead out of the folder.
        """
        parts = name.split("/")
        bad = any(part[:1] in ("", ".") for part in parts) or set(name) & set("\\:")
        if bad or _is_invalid_path(name):
            raise PathOutsideWorkspace("that is no name of a file here")
        real, home = Path(os.path.realpath(folder.joinpath(*parts))), Path(os.path.realpath(folder))
        if home not in real.parents:
            raise PathOutsideWorkspace("that file is outside its folder")
        return real


def _is_invalid_path(path: str) -> bool:
    """Where the system would fail instead of finding nothing."""
    try:
        whole = os.fsencode(path)
    except UnicodeEncodeError:
        return True
    longest = max(map(len, whole.split(b"/")))
    return b"\0" in whole or len(whole) > MAX_PATH_BYTES or longest > MAX_NAME_BYTES


def run_id(path: Path) -> str:
    """Of a run folder, the same for ever: twelve hexadecimal digits of its path's SHA-256."""
    return hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()[:12]
