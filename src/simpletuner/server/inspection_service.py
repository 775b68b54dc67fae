"""Inspections of datasets, as jobs of `simpletuner inspect`.

.simpletuner/inspections/<id of the folder>/
    dataset.json   the dataset that is inspected, with the images that are left out
    request.json   what it was inspected for
    result.json    the output of the command, written when it is complete
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from simpletuner.atomic_io import write_atomically
from simpletuner.server.api_errors import abort
from simpletuner.server.dataset_service import DatasetService
from simpletuner.server.file_reader import read_json_object
from simpletuner.server.job_service import JobService
from simpletuner.server.schemas.inspection import (
    Inspection,
    InspectionRequest,
    InspectionResult,
)
from simpletuner.server.schemas.jobs import Job
from simpletuner.server.workspace import Workspace, run_id

DATASET_ID = "dataset"  # sample ids begin with it


class InspectionService:
    """The inspections of the datasets of a workspace.

    command: the start of the command line of this program.
    """

    def __init__(
        self,
        workspace: Workspace,
        datasets: DatasetService,
        jobs: JobService,
        command: Sequence[str],
    ) -> None:
        self._workspace = workspace
        self._datasets = datasets
        self._jobs = jobs
        self._command = tuple(command)

    def start(self, name: str, request: InspectionRequest) -> Job:
        """Queue an inspection. Raises ApiError: 404, or 409 if the dataset is being inspected."""
        folder = self._datasets.require_folder(name)
        job = self._newest_job(name)
        if job is not None and job.ended_t is None:
            abort(409, f"{name} is being inspected already")
        place = self._place(folder)
        place.mkdir(parents=True, exist_ok=True)
        entry: dict[str, Any] = {
            "id": DATASET_ID,
            "type": "local",
            "instance_data_dir": str(folder),
            **request.model_dump(exclude={"trigger"}),
        }
        entry |= self._datasets.choices.of(folder).to_fields(entry)
        write_atomically(place / "dataset.json", json.dumps([entry]))
        write_atomically(place / "request.json", request.model_dump_json())
        argv = [*self._command, "inspect", f"--dataset={place / 'dataset.json'}"]
        argv += [f"--output={place / 'result.json'}"]
        argv += [f"--trigger={request.trigger.strip()}"] if request.trigger.strip() else []
        return self._jobs.enqueue_command("inspect", name, argv)

    def get(self, name: str) -> Inspection:
        """Return the newest inspection of a dataset. Raises ApiError 404."""
        place = self._place(self._datasets.require_folder(name))
        result = _read_result(place / "result.json")
        content = read_json_object(place / "request.json")
        try:
            request = InspectionRequest.model_validate(content)
        except ValidationError:
            request = None
        return Inspection(
            job=self._newest_job(name),
            made_t=(place / "result.json").stat().st_mtime if result is not None else None,
            request=request if result is not None else None,
            result=result,
        )

    def _place(self, folder: Path) -> Path:
        return self._workspace.server_dir / "inspections" / run_id(folder)

    def _newest_job(self, name: str) -> Job | None:
        jobs = self._jobs.get_queue().jobs
        mine = [job for job in jobs if job.kind == "inspect" and job.name == name]
        return max(mine, key=lambda job: job.queued_t, default=None)


def _read_result(path: Path) -> InspectionResult | None:
    """Return the output of the command; None if there is none, or one of another version."""
    content = read_json_object(path)
    if content is None:
        return None
    try:
        return _to_result(content)
    except (KeyError, TypeError, AttributeError, ValidationError):
        return None


def _to_result(content: dict[str, Any]) -> InspectionResult:
    captions, sizes = content["captions"], content["sizes"]
    trigger = captions["trigger"]
    same = (
        "images", "rejected_count", "buckets", "enlarged_count", "blurred_count",
        "identical_count", "near_count",
    )  # fmt: skip
    return InspectionResult.model_validate(
        {name: content[name] for name in same}
        | {name: sizes[name] for name in ("smallest_px", "median_px", "largest_px")}
        | {name: [_files(group) for group in content[name]] for name in ("identical", "near")}
        | {name: _measured(content[name]) for name in ("enlarged", "blurred")}
        | {name: _files(content[name]) for name in ("blank", "damaged")}
        | {name: _counted(captions[name], "captions") for name in ("tags", "phrases")}
        | {
            "captions": captions["captions"],
            "uncaptioned": captions["uncaptioned"],
            "words": captions["lengths"],
            "tokens": captions["tokens"],
            "equal_captions": _counted(captions["equal_captions"], "images"),
            "trigger": trigger
            and {
                "trigger": trigger["trigger"],
                "images": trigger["images"],
                "missing": _files(trigger["missing_ids"]),
            },
            "findings": [
                {name: row[name] for name in ("level", "code", "message", "advice")}
                | {"files": _files(row["sample_ids"])}
                for row in content["findings"]
            ],
        }
    )


def _files(sample_ids: Sequence[str]) -> list[str]:
    """Return the paths inside the dataset."""
    return [name.removeprefix(f"{DATASET_ID}/") for name in sample_ids]


def _measured(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"file": _files([row["sample_id"]])[0], "value": row["value"]} for row in rows]


def _counted(rows: Sequence[dict[str, Any]], count: str) -> list[dict[str, Any]]:
    return [
        {"text": row["text"], "count": row[count], "files": _files(row.get("sample_ids", ()))}
        for row in rows
    ]
