"""Queueing of a configuration of the workspace when the server starts: `server --env NAME`."""

from __future__ import annotations

from pathlib import Path

from simpletuner.config.documents import read_document
from simpletuner.errors import ConfigError
from simpletuner.server.api_errors import ApiError
from simpletuner.server.draft_store import parse_import
from simpletuner.server.job_config import load_run_datasets
from simpletuner.server.schemas.configs import DraftWrite, ImportRequest
from simpletuner.server.schemas.jobs import JobRequest
from simpletuner.server.services import Services
from simpletuner.server.workspace import PathOutsideWorkspace

CONFIG_NAMES = ("config.json", "config.toml")


def queue_environment(services: Services, name: str) -> str:
    """Make a draft of config/NAME and queue its training; return a line for the terminal.

    Raises ConfigError if there is no such configuration. Other problems do not keep the server from
    starting: they are in the line that is returned, and the draft is there to be corrected.
    """
    workspace = services.workspace
    try:
        folder = workspace.resolve_below(workspace.root / "config", name)
    except PathOutsideWorkspace as error:
        raise ConfigError(f"--env {name}: {error}") from error
    path = next((folder / file for file in CONFIG_NAMES if (folder / file).is_file()), None)
    if path is None:
        raise ConfigError(f"--env {name}: there is no {folder / CONFIG_NAMES[0]}")
    imported = parse_import(
        ImportRequest(name=path.name, text=path.read_text(encoding="utf-8")), workspace
    )
    try:
        datasets = load_run_datasets({"data_backend_config": _dataset_file(path)}, workspace)
        draft = services.drafts.create(
            DraftWrite(name=name, config=imported.config or {}, datasets=datasets)
        )
        job = services.jobs.enqueue(JobRequest(draft=draft.id))
    except (ApiError, ConfigError) as error:
        return f"--env {name} was not queued: {error}"
    return f"--env {name}: queued as {job.run_dir}"


def _dataset_file(path: Path) -> str:
    """Return the path of the dataset file that a configuration names, or the usual one."""
    value = read_document(path, path.name).value
    given = value.get("data_backend_config") if isinstance(value, dict) else None
    name = given if isinstance(given, str) else "multidatabackend.json"
    return str(path.parent / name)
