"""Prompt libraries of the workspace: named lists of validation prompts, for any run.

prompts/<name>.json has the format of `user_prompt_library`, so that a training from a terminal
reads the same files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from simpletuner.server.api_errors import abort
from simpletuner.server.job_config import read_prompt_file, write_prompts
from simpletuner.server.schemas.configs import PromptEntry
from simpletuner.server.schemas.library import TrashEntry
from simpletuner.server.schemas.prompts import PromptLibrary
from simpletuner.server.trash import Trash
from simpletuner.server.workspace import Workspace

LIBRARY_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
MAX_LIBRARIES = 500
SUFFIX = ".json"


class PromptLibraries:
    """The folder prompts/ of a workspace."""

    def __init__(self, workspace: Workspace, trash: Trash) -> None:
        self._workspace = workspace
        self._trash = trash
        self._folder = workspace.root / "prompts"

    def list_libraries(self) -> list[PromptLibrary]:
        """Return all libraries by name; files that hold no prompt are left out."""
        if not self._folder.is_dir():
            return []
        names = sorted(
            path.name[: -len(SUFFIX)]
            for path in self._folder.iterdir()
            if path.suffix == SUFFIX and LIBRARY_NAME.fullmatch(path.name[: -len(SUFFIX)])
        )
        libraries = (self._read(name) for name in names[:MAX_LIBRARIES])
        return [library for library in libraries if library is not None]

    def get(self, name: str) -> PromptLibrary:
        """Return a library. Raises ApiError 404 for an unknown name."""
        known = LIBRARY_NAME.fullmatch(name)
        library = self._read(name) if known else None
        return library or abort(404, "there is no such prompt library")

    def write(self, name: str, prompts: Sequence[PromptEntry]) -> PromptLibrary:
        """Create or replace a library; the one before it is in the trash.

        Raises ApiError 422 for a name that is not allowed, and for no prompts.
        """
        if not LIBRARY_NAME.fullmatch(name):
            message = "a name has at most 64 letters, digits, - _ . and does not start with a dot"
            abort(422, message, "name")
        if not prompts:
            abort(422, "give at least one prompt", "prompts")
        path = self._path(name)
        before = self._read(name)
        if before is not None and before.prompts == list(prompts):
            return before
        if path.is_file():
            self._trash.discard("prompts", name, [path], copies=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_prompts(path, prompts)
        return self.get(name)

    def delete(self, name: str) -> TrashEntry:
        """Move a library to the trash. Raises ApiError 404 for an unknown name."""
        return self._trash.discard("prompts", self.get(name).name, [self._path(name)])

    def _path(self, name: str) -> Path:
        return self._workspace.resolve_below(self._folder, name + SUFFIX)

    def _read(self, name: str) -> PromptLibrary | None:
        path = self._path(name)
        prompts, _ = read_prompt_file(str(path), self._workspace) if path.is_file() else ([], False)
        if not prompts:
            return None
        return PromptLibrary(name=name, prompts=prompts, changed_t=path.stat().st_mtime)
