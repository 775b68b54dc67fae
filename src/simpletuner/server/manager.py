"""Deletes, restores and renames what a workspace holds: runs, checkpoints, datasets, images.

Nothing is deleted for good: it moves to the trash, from which it can be restored.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from simpletuner.server.api_errors import abort
from simpletuner.server.dataset_service import DATASET_NAME, NAME_RULE, DatasetService
from simpletuner.server.draft_store import DraftStore
from simpletuner.server.file_reader import is_locked
from simpletuner.server.job_service import JobService
from simpletuner.server.job_states import ENDED_STATES
from simpletuner.server.run_artifacts import CHECKPOINT_NAME
from simpletuner.server.run_service import RunService
from simpletuner.server.schemas.datasets import DatasetInfo
from simpletuner.server.schemas.library import TrashEntry
from simpletuner.server.trash import Trash
from simpletuner.server.workspace import Workspace

LISTED_KEY = "listed_dataset"


class Manager:
    """Changes that concern several services at once."""

    def __init__(
        self,
        workspace: Workspace,
        trash: Trash,
        runs: RunService,
        jobs: JobService,
        datasets: DatasetService,
        drafts: DraftStore,
    ) -> None:
        self._workspace = workspace
        self._trash = trash
        self._runs = runs
        self._jobs = jobs
        self._datasets = datasets
        self._drafts = drafts

    def delete_run(self, id: str) -> TrashEntry:
        """Move a run with its jobs to the trash. Raises ApiError 409 unless it has ended."""
        summary = self._runs.summary(id)
        folder = self._runs.find_folder(id)
        if summary.state not in ENDED_STATES or (folder and is_locked(folder / "run.lock")):
            abort(409, f"the run is {summary.state}; stop it, or remove it from the queue, first")
        with self._jobs.lock:
            paths = [self._jobs.jobs_dir / job for job in self._jobs.ids_of_run(id)]
            return self._trash.discard("run", summary.name, [*([folder] if folder else []), *paths])

    def delete_checkpoint(self, id: str, name: str) -> TrashEntry:
        """Move a checkpoint to the trash. Raises ApiError: 404, or 409 while the run is active."""
        summary = self._runs.summary(id)
        folder = self._runs.find_folder(id) or abort(404, "the run has no folder")
        checkpoint = self._workspace.resolve_below(folder, name)
        if not CHECKPOINT_NAME.fullmatch(name) or not checkpoint.is_dir():
            abort(404, "there is no such checkpoint")
        if is_locked(folder / "run.lock"):
            abort(409, "the run is active and manages its checkpoints itself; stop it first")
        return self._trash.discard("checkpoint", f"{summary.name} {name}", [checkpoint])

    def delete_dataset(self, name: str) -> TrashEntry:
        """Move a dataset of the workspace to the trash; an added folder is only taken off the list.

        Raises ApiError: 404, or 409 if an active or queued job uses it.
        """
        folder = self._datasets.require_folder(name)
        self._require_unused(folder)
        if self._datasets.is_owned(name):
            return self._trash.discard("dataset", name, [folder])
        listed = self._datasets.added_folders()
        path = listed.pop(name)
        self._datasets.write_added_folders(listed)
        return self._trash.discard("dataset", name, [], {LISTED_KEY: {name: path}})

    def rename_dataset(self, name: str, new_name: str) -> DatasetInfo:
        """Rename a dataset, also in the drafts. Raises ApiError 404, 409 or 422."""
        folder = self._datasets.require_folder(name)
        if not DATASET_NAME.fullmatch(new_name):
            abort(422, NAME_RULE, "name")
        if self._datasets.exists(new_name):
            abort(409, f"there is already a dataset named {new_name}", "name")
        self._require_unused(folder)
        new_folder = folder
        if self._datasets.is_owned(name):
            new_folder = folder.with_name(new_name)
            os.rename(folder, new_folder)
            self._datasets.choices.move(folder, new_folder)
        else:
            listed = self._datasets.added_folders()
            listed[new_name] = listed.pop(name)
            self._datasets.write_added_folders(listed)
        self._drafts.rename_dataset((name, folder), (new_name, new_folder))
        return self._datasets.get_info(new_name)

    def delete_images(self, name: str, files: list[str]) -> TrashEntry:
        """Move images with their captions to the trash.

        Raises ApiError: 404 for an unknown file, 409 for a folder that is not of the workspace.
        """
        folder = self._datasets.require_folder(name)
        if not self._datasets.is_owned(name):
            abort(409, f"this folder is not of the workspace; delete the files in {folder}")
        paths: dict[Path, None] = {}
        for file in files:
            for path in self._datasets.files_of_image(name, file):
                paths[path] = None
        label = files[0] if len(files) == 1 else f"{len(files)} images"
        entry = self._trash.discard("image", f"{name}: {label}", list(paths), {"dataset": name})
        self._datasets.invalidate(name)
        return entry

    def restore(self, id: str) -> TrashEntry:
        """Move an entry of the trash back. Raises ApiError 404 or 409."""
        entry, extra = self._trash.restore(id)
        listed = extra.get(LISTED_KEY)
        if isinstance(listed, dict):
            self._datasets.write_added_folders({**listed, **self._datasets.added_folders()})
        dataset = extra.get("dataset")
        if isinstance(dataset, str) and self._datasets.exists(dataset):
            self._datasets.invalidate(dataset)
        return entry

    def _require_unused(self, folder: Path) -> None:
        """Raise ApiError 409 if an active or queued job trains on a folder."""
        for job in self._jobs.get_queue().jobs:
            if job.state in ENDED_STATES:
                continue
            config = self._jobs.jobs_dir / job.id / "config" / "multidatabackend.json"
            if json.dumps(str(folder)) in _read_text(config):
                abort(409, f"the run {job.name} uses this dataset and is {job.state}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
