"""Routes for managing a workspace: labels, deletion, the trash, and comparisons of runs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from simpletuner.server.comparisons import compare_runs
from simpletuner.server.schemas.datasets import DatasetInfo, DatasetRename, ImageSelection
from simpletuner.server.schemas.library import Comparison, RunLabel, TrashEntry
from simpletuner.server.schemas.preferences import (
    DefaultsWrite,
    HubToken,
    ServerPreferences,
    StorageUse,
)
from simpletuner.server.schemas.runs import RunSummary
from simpletuner.server.services import ServicesDep
from simpletuner.server.storage import clean_storage, measure_storage

router = APIRouter(prefix="/api/v1")


@router.get("/comparisons", tags=["runs"])
def get_comparison(run: Annotated[list[str], Query()], services: ServicesDep) -> Comparison:
    """Compare the runs of the given ids."""
    return compare_runs(services.runs, run)


@router.put("/runs/{id}/label", tags=["runs"])
def write_label(id: str, body: RunLabel, services: ServicesDep) -> RunSummary:
    """Set the name, the tags and the note of a run, or archive it."""
    services.runs.summary(id)
    services.runs.labels.write(id, body)
    return services.runs.summary(id)


@router.delete("/runs/{id}", tags=["runs"])
def delete_run(id: str, services: ServicesDep) -> TrashEntry:
    """Move a run to the trash."""
    return services.manager.delete_run(id)


@router.delete("/runs/{id}/checkpoints/{name}", tags=["runs"])
def delete_checkpoint(id: str, name: str, services: ServicesDep) -> TrashEntry:
    """Move a checkpoint to the trash."""
    return services.manager.delete_checkpoint(id, name)


@router.delete("/datasets/{name}", tags=["datasets"])
def delete_dataset(name: str, services: ServicesDep) -> TrashEntry:
    """Move a dataset to the trash; a folder outside the workspace is only taken off the list."""
    return services.manager.delete_dataset(name)


@router.put("/datasets/{name}/name", tags=["datasets"])
def rename_dataset(name: str, body: DatasetRename, services: ServicesDep) -> DatasetInfo:
    """Rename a dataset, also in the drafts that use it."""
    return services.manager.rename_dataset(name, body.name)


@router.post("/datasets/{name}/deletions", tags=["datasets"])
def delete_images(name: str, body: ImageSelection, services: ServicesDep) -> TrashEntry:
    """Move images with their captions to the trash."""
    return services.manager.delete_images(name, body.files)


@router.get("/trash", tags=["trash"])
def list_trash(services: ServicesDep) -> list[TrashEntry]:
    """Return the entries of the trash, the newest first."""
    return services.trash.entries()


@router.post("/trash/{id}/restore", tags=["trash"])
def restore_from_trash(id: str, services: ServicesDep) -> TrashEntry:
    """Move an entry of the trash back to where it was."""
    return services.manager.restore(id)


@router.delete("/trash/{id}", tags=["trash"], status_code=204)
def delete_permanently(id: str, services: ServicesDep) -> None:
    """Delete an entry of the trash for good."""
    services.trash.remove(id)


@router.delete("/trash", tags=["trash"], status_code=204)
def empty_trash(services: ServicesDep) -> None:
    """Delete everything in the trash for good."""
    services.trash.empty()


@router.get("/preferences", tags=["preferences"])
def get_preferences(services: ServicesDep) -> ServerPreferences:
    """Return the preferences, without the token."""
    return services.preferences.read()


@router.put("/preferences/hub-token", tags=["preferences"])
def write_hub_token(body: HubToken, services: ServicesDep) -> ServerPreferences:
    """Store a token of the model hub, which is given to jobs and never sent back."""
    return services.preferences.write_hub_token(body.token)


@router.put("/preferences/defaults", tags=["preferences"])
def write_defaults(body: DefaultsWrite, services: ServicesDep) -> ServerPreferences:
    """Set the options that new drafts start with."""
    return services.preferences.write_defaults(body.defaults)


@router.get("/storage", tags=["preferences"])
def get_storage(services: ServicesDep) -> list[StorageUse]:
    """Return the disk use of the workspace and of shared caches."""
    return measure_storage(services.workspace)


@router.delete("/storage/{name}", tags=["preferences"], status_code=204)
def delete_cache(name: str, services: ServicesDep) -> None:
    """Delete a cache that is rebuilt when it is needed."""
    clean_storage(services.workspace, name)
