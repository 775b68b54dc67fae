"""The disk use of a workspace and of the caches that its runs share."""

from __future__ import annotations

import shutil
from pathlib import Path

from simpletuner.config import environment
from simpletuner.server.api_errors import abort
from simpletuner.server.schemas.preferences import StorageUse
from simpletuner.server.trash import folder_size
from simpletuner.server.workspace import Workspace

REMOVABLE = ("thumbnails", "quantized", "compiled")


def storage_folders(workspace: Workspace) -> dict[str, Path]:
    """Return the folders whose size is shown, by name."""
    variables = environment.copy_process_environment()
    cache = environment.user_cache_dir()
    hub = Path(variables.get("HF_HOME") or cache.parent / "huggingface")
    return {
        "runs": workspace.output_dir,
        "datasets": workspace.datasets_dir,
        "thumbnails": workspace.server_dir / "thumbs",
        "trash": workspace.server_dir / "trash",
        "hub": hub / "hub",
        "quantized": cache / "quantized",
        "compiled": environment.compiled_code_dir(),
    }


def measure_storage(workspace: Workspace) -> list[StorageUse]:
    """Return the size of each folder that exists."""
    return [
        StorageUse(
            name=name,
            path=str(folder),
            size_bytes=folder_size(folder),
            removable=name in REMOVABLE,
        )
        for name, folder in storage_folders(workspace).items()
        if folder.is_dir()
    ]


def clean_storage(workspace: Workspace, name: str) -> None:
    """Delete a cache. Raises ApiError 404 for any other folder."""
    if name not in REMOVABLE:
        abort(404, "there is no such cache")
    shutil.rmtree(storage_folders(workspace)[name], ignore_errors=True)
