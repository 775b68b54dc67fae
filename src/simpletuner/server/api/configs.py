"""The schema, what is wrong with a configuration, drafts, and what a run would need."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from simpletuner.server import draft_service, form_schema
from simpletuner.server.api_errors import abort
from simpletuner.server.config_validation import validate_config
from simpletuner.server.schemas import configs as wire
from simpletuner.server.schemas.base import ErrorResponse
from simpletuner.server.services import ServicesDep

router = APIRouter(prefix="/api/v1", tags=["configs"], responses={422: {"model": ErrorResponse}})


@router.get("/schema")
def get_schema() -> wire.FormSchema:
    return form_schema.build_form_schema()


@router.post("/validate")
def validate_draft_config(
    body: wire.ValidateRequest, home: ServicesDep
) -> wire.ConfigValidationResult:
    return validate_config(home.workspace, body.config, body.datasets)


@router.get("/drafts")
def list_drafts(home: ServicesDep) -> list[wire.Draft]:
    return home.drafts.list_drafts()


@router.post("/drafts", status_code=201)
def create_draft(body: wire.DraftWrite, home: ServicesDep) -> wire.Draft:
    return home.drafts.create(body)


@router.get("/drafts/{id}")
def get_draft(id: str, home: ServicesDep) -> wire.Draft:
    return home.drafts.get(id)


@router.put("/drafts/{id}")
def update_draft(id: str, body: wire.DraftWrite, home: ServicesDep) -> wire.Draft:
    return home.drafts.update(id, body)


@router.delete("/drafts/{id}", status_code=204)
def delete_draft(id: str, home: ServicesDep) -> None:
    home.drafts.remove(id)


@router.get("/drafts/{id}/config.json", response_model=dict[str, Any])
def export_config(id: str, home: ServicesDep) -> JSONResponse:
    return _json_download("config.json", home.drafts.get(id).config)


@router.get("/drafts/{id}/multidatabackend.json", response_model=list[dict[str, Any]])
def export_datasets(id: str, home: ServicesDep) -> JSONResponse:
    return _json_download("multidatabackend.json", home.drafts.get(id).datasets)


@router.post("/import")
def import_text(body: wire.ImportRequest) -> wire.ImportResult:
    return draft_service.parse_import(body)


@router.post("/plan")
def get_plan(body: wire.PlanRequest, home: ServicesDep) -> wire.PlanResponse:
    return home.plans.get_or_start(body)


@router.post("/runs/{id}/draft", status_code=201)
def create_draft_from_run(id: str, body: dict[str, Any], home: ServicesDep) -> wire.Draft:
    folder = home.runs.find_folder(id) or abort(404, "there is no such run")
    return home.drafts.create_from_run(folder)


def _json_download(name: str, content: Any) -> JSONResponse:
    return JSONResponse(content, headers={"Content-Disposition": f'attachment; filename="{name}"'})
