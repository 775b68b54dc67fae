"""Folders that can become a dataset."""

from __future__ import annotations

import os
from pathlib import Path

from simpletuner.data.image_suffixes import IMAGE_SUFFIXES
from simpletuner.server.api_errors import abort
from simpletuner.server.schemas.datasets import FolderListing
from simpletuner.server.workspace import Workspace


def list_folder(workspace: Workspace, path: str) -> FolderListing:
    """Return the content of an allowed folder; for path "", the allowed roots.

    Raises PathOutsideWorkspace, and ApiError 404 if the path is not a folder.
    """
    if not path:
        roots = [str(root) for root in workspace.allowed_roots]
        return FolderListing(path="", folders=roots, pictures=0)
    folder = workspace.resolve(path)
    if not folder.is_dir() or is_server_folder(workspace, folder):
        abort(404, "this is not a folder")
    subfolders = []
    image_count = 0
    for entry in os.scandir(folder):
        visible = not entry.name.startswith(".") and entry.name.isprintable()
        image_count += visible and os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES
        if visible and entry.is_dir() and workspace.resolve_or_none(entry.path):
            subfolders.append(entry.path)
    return FolderListing(path=str(folder), folders=sorted(subfolders), pictures=image_count)


def is_server_folder(workspace: Workspace, folder: Path) -> bool:
    """Return whether a folder is the server's own, or below it."""
    return workspace.server_dir in (folder, *folder.parents)
