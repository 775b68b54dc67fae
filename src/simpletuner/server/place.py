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

OWN = ".simpletuner"
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, of Linux' and macOS' file systems


class Outside(SimpleTunerError):
    """A path that leads out of every allowed folder. Its text never repeats what is there."""


@dataclass(frozen=True)
class Place:
    """workspace: absolute and resolved. roots: other allowed folders, likewise."""

    workspace: Path
    roots: tuple[Path, ...] = ()

    @property
    def own(self) -> Path:
        return self.workspace / OWN

    @property
    def datasets(self) -> Path:
        return self.workspace / "datasets"

    @property
    def outputs(self) -> Path:
        return self.workspace / "output"

    @property
    def allowed(self) -> tuple[Path, ...]:
        return (self.workspace, *self.roots)

    def trash(self) -> Path:
        """A new folder for what is taken away; nothing of a person's is deleted."""
        made = self.own / "trash" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        made.mkdir(parents=True)
        return made

    def inside(self, path: Path | str) -> Path:
        """The path with every link followed, if it lies in an allowed folder; a relative one is looked up in
        the workspace. Raises Outside.
        """
        text = os.fspath(path)
        if _impossible(text):
            raise Outside("that is no path")
        try:
            real = Path(os.path.realpath(self.workspace / os.path.expanduser(text)))
        except (OSError, ValueError) as error:
            raise Outside("that is no path") from error
        if any(real == root or root in real.parents for root in self.allowed):
            return real
        raise Outside("that path is outside the workspace and the folders added with --root")

    def allows(self, path: Path | str) -> Path | None:
        """As `inside`; None for what is outside."""
        try:
            return self.inside(path)
        except Outside:
            return None

    def below(self, folder: Path, name: str) -> Path:
        """A file below `folder` by its relative name, links followed. Raises Outside for "..", hidden and
        absolute names, backslashes, drives, NUL, and links that lead out of the folder.
        """
        parts = name.split("/")
        bad = any(part[:1] in ("", ".") for part in parts) or set(name) & set("\\:")
        if bad or _impossible(name):
            raise Outside("that is no name of a file here")
        real, home = Path(os.path.realpath(folder.joinpath(*parts))), Path(os.path.realpath(folder))
        if home not in real.parents:
            raise Outside("that file is outside its folder")
        return real


def _impossible(path: str) -> bool:
    """Where the system would fail instead of finding nothing."""
    try:
        whole = os.fsencode(path)
    except UnicodeEncodeError:
        return True
    longest = max(map(len, whole.split(b"/")))
    return b"\0" in whole or len(whole) > LONGEST_PATH or longest > LONGEST_NAME


def run_id(path: Path) -> str:
    """Of a run folder, the same for ever: twelve hexadecimal digits of its path's SHA-256."""
    return hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()[:12]
