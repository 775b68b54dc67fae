"""The schema, what is wrong with a configuration, drafts, and what a run would need."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from simpletuner.server import drafts, options
from simpletuner.server.home import Here
from simpletuner.server.judge import judge
from simpletuner.server.refusal import refuse
from simpletuner.server.wire import configs as wire
from simpletuner.server.wire.base import Refusal

router = APIRouter(prefix="/api/v1", tags=["configs"], responses={422: {"model": Refusal}})


@router.get("/schema")
def schema() -> wire.Schema:
    return options.schema()


@router.post("/validate")
def validate(body: wire.Wanted, home: Here) -> wire.Verdict:
    return judge(home.place, body.config, body.datasets)


@router.get("/drafts")
def all_drafts(home: Here) -> list[wire.Draft]:
    return home.drafts.all()


@router.post("/drafts", status_code=201)
def new_draft(body: wire.DraftWrite, home: Here) -> wire.Draft:
    return home.drafts.create(body)


@router.get("/drafts/{id}")
def draft(id: str, home: Here) -> wire.Draft:
    return home.drafts.get(id)


@router.put("/drafts/{id}")
def write_draft(id: str, body: wire.DraftWrite, home: Here) -> wire.Draft:
    return home.drafts.write(id, body)


@router.delete("/drafts/{id}", status_code=204)
def drop_draft(id: str, home: Here) -> None:
    home.drafts.remove(id)


@router.get("/drafts/{id}/config.json", response_model=dict[str, Any])
def export_config(id: str, home: Here) -> JSONResponse:
    return _file("config.json", home.drafts.get(id).config)


@router.get("/drafts/{id}/multidatabackend.json", response_model=list[dict[str, Any]])
def export_datasets(id: str, home: Here) -> JSONResponse:
    return _file("multidatabackend.json", home.drafts.get(id).datasets)


@router.post("/import")
def import_text(body: wire.Import) -> wire.Imported:
    return drafts.imported(body)


@router.post("/plan")
def plan(body: wire.PlanAsk, home: Here) -> wire.PlanState:
    return home.plans.ask(body)


@router.post("/runs/{id}/draft", status_code=201)
def duplicate(id: str, body: dict[str, Any], home: Here) -> wire.Draft:
    folder = home.runs.find(id) or refuse(404, "there is no such run")
    return home.drafts.of_run(folder)


def _file(name: str, content: Any) -> JSONResponse:
    return JSONResponse(content, headers={"Content-Disposition": f'attachment; filename="{name}"'})
