"""The images of the packaged example, as datasets of a workspace."""

from __future__ import annotations

import os
import shutil

from simpletuner.config.discovery import example_folder
from simpletuner.server.api_errors import abort
from simpletuner.server.dataset_service import DatasetService
from simpletuner.server.schemas.datasets import DatasetInfo

EXAMPLE = "chroma-nano.peft-lora"
# What is taught, and images of other shapes: without them every shape becomes what is taught.
NAMES = ("zorbo", "shapes")


def create(datasets: DatasetService) -> list[DatasetInfo]:
    """Copy the folders of the example; one that is complete already stays as it is.

    Raises ApiError 409 if another dataset has one of the names.
    """
    source = example_folder(EXAMPLE)
    for name in NAMES:
        files = sorted(path.name for path in (source / name).iterdir())
        target = datasets.workspace.datasets_dir / name
        if datasets.exists(name):
            present = {entry.name for entry in os.scandir(target)} if target.is_dir() else set()
            if not present.issuperset(files):
                abort(409, f"there is already a dataset named {name}", "name")
            continue
        unfinished = target.with_name(f".{name}.unfinished")  # a copy that was interrupted
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source / name, unfinished, copy_function=shutil.copyfile)
        os.rename(unfinished, target)
    return [datasets.get_info(name) for name in NAMES]
