"""Routes for the option schema, validation of a configuration, drafts, imports and memory plans."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from simpletuner.server import draft_store, form_schema
from simpletuner.server.api_errors import abort
from simpletuner.server.schemas import configs as schemas
from simpletuner.server.schemas.base import ERROR_RESPONSES
from simpletuner.server.services import ServicesDep

router = APIRouter(prefix="/api/v1", tags=["configs"], responses=ERROR_RESPONSES)


@router.get("/schema")
def get_schema() -> schemas.FormSchema:
    """Return the option schema for the form."""
    return form_schema.build_form_schema()


@router.post("/validate")
def validate_draft_config(
    body: schemas.ValidateRequest, services: ServicesDep
) -> schemas.ConfigValidationResult:
    """Validate a configuration."""
    return services.checks.check(body.config, body.datasets, body.name)


@router.get("/drafts")
def list_drafts(services: ServicesDep) -> list[schemas.Draft]:
    """Return all drafts."""
    return services.drafts.list_drafts()


@router.post("/drafts", status_code=201)
def create_draft(body: schemas.DraftWrite, services: ServicesDep) -> schemas.Draft:
    """Create a draft."""
    return services.drafts.create(body)


@router.get("/drafts/{id}")
def get_draft(id: str, services: ServicesDep) -> schemas.Draft:
    """Return a draft."""
    return services.drafts.get(id)


@router.put("/drafts/{id}")
def update_draft(id: str, body: schemas.DraftWrite, services: ServicesDep) -> schemas.Draft:
    """Replace a draft."""
    return services.drafts.update(id, body)


@router.delete("/drafts/{id}", status_code=204)
def delete_draft(id: str, services: ServicesDep) -> None:
    """Move a draft to the trash."""
    services.drafts.remove(id)


@router.get("/drafts/{id}/config.json", response_model=dict[str, Any])
def export_config(id: str, services: ServicesDep) -> JSONResponse:
    """Download the options of a draft as config.json."""
    return _json_download("config.json", services.drafts.get(id).config)


@router.get("/drafts/{id}/multidatabackend.json", response_model=list[dict[str, Any]])
def export_datasets(id: str, services: ServicesDep) -> JSONResponse:
    """Download the datasets of a draft as multidatabackend.json."""
    return _json_download("multidatabackend.json", services.drafts.get(id).datasets)


@router.post("/import")
def import_text(body: schemas.ImportRequest, services: ServicesDep) -> schemas.ImportResult:
    """Parse a configuration file without saving it."""
    return draft_store.parse_import(body, services.workspace)


@router.post("/plan")
def get_plan(body: schemas.PlanRequest, services: ServicesDep) -> schemas.PlanResponse:
    """Return the memory plan of a configuration, or start planning."""
    response = services.plans.get_or_start(body)
    if response.state != "ready":
        return response
    flavour = body.config.get("model_flavour")
    factor, run = services.step_times.correction(flavour if isinstance(flavour, str) else "base")
    return response.model_copy(update={"correction": factor, "corrected_by": run})


@router.delete("/plan", status_code=204)
def cancel_plan(services: ServicesDep) -> None:
    """End the planning process that is running."""
    services.plans.cancel()


@router.post("/runs/{id}/draft", status_code=201)
def create_draft_from_run(id: str, body: dict[str, Any], services: ServicesDep) -> schemas.Draft:
    """Create a draft with the configuration of a run."""
    folder = services.runs.find_folder(id) or abort(404, "there is no such run")
    return services.drafts.create_from_run(folder)


def _json_download(name: str, content: Any) -> JSONResponse:
    return JSONResponse(content, headers={"Content-Disposition": f'attachment; filename="{name}"'})
