"""The folders that the server can access: one workspace, and the folders added with --root.

workspace/
  config/<name>/config.json, multidatabackend.json     what `simpletuner train --env <name>` trains
  datasets/<name>/                                     images and captions
  output/<name>/                                       run folders
  .simpletuner/                                        queue.json, jobs/, drafts/, thumbs/
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
# Limits of the file systems of Linux and macOS.
MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4095


class PathOutsideWorkspace(SimpleTunerError):
    """A path outside all allowed folders. The message never reveals whether the path exists."""


@dataclass(frozen=True)
class Workspace:
    """root: the workspace.

    extra_roots: other allowed folders. All are absolute with links resolved.
    """

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
        """Create a folder for removed files; the server never deletes a user's file."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        folder = self.server_dir / "trash" / name
        folder.mkdir(parents=True)
        return folder

    def resolve(self, path: Path | str) -> Path:
        """Return the path with all links resolved; a relative path starts at the workspace.

        Raises PathOutsideWorkspace if the result is not in an allowed folder.
        """
        text = os.fspath(path)
        if _is_invalid_path(text):
            raise PathOutsideWorkspace("this is not a valid path")
        try:
            real = Path(os.path.realpath(self.root / os.path.expanduser(text)))
        except (OSError, ValueError) as error:
            raise PathOutsideWorkspace("this is not a valid path") from error
        if any(real == root or root in real.parents for root in self.allowed_roots):
            return real
        raise PathOutsideWorkspace(
            "This path is outside the workspace. "
            "Use a path inside it, or restart the server with --root FOLDER"
        )

    def resolve_or_none(self, path: Path | str) -> Path | None:
        """Return resolve(path), or None if the path is outside the allowed folders."""
        try:
            return self.resolve(path)
        except PathOutsideWorkspace:
            return None

    def resolve_below(self, folder: Path, name: str) -> Path:
        """Return the resolved path of a file below `folder`, given by its relative name.

        Raises PathOutsideWorkspace for "..", hidden and absolute names, backslashes, drives, NUL,
        and links that lead out of the folder.
        """
        parts = name.split("/")
        bad = any(part[:1] in ("", ".") for part in parts) or set(name) & set("\\:")
        if bad or _is_invalid_path(name):
            raise PathOutsideWorkspace("this is not a valid file name")
        real = Path(os.path.realpath(folder.joinpath(*parts)))
        if Path(os.path.realpath(folder)) not in real.parents:
            raise PathOutsideWorkspace("this file is outside its folder")
        return real


def _is_invalid_path(path: str) -> bool:
    """Return True for a path that makes system calls fail with an error other than "not found"."""
    try:
        whole = os.fsencode(path)
    except UnicodeEncodeError:
        return True
    longest = max(map(len, whole.split(b"/")))
    return b"\0" in whole or len(whole) > MAX_PATH_BYTES or longest > MAX_NAME_BYTES


def run_id(path: Path) -> str:
    """Return the permanent id of a run folder: twelve digits of the SHA-256 of its path."""
    return hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()[:12]
