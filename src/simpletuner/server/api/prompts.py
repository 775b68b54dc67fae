"""Routes for prompt libraries."""

from __future__ import annotations

from fastapi import APIRouter

from simpletuner.server.schemas.library import TrashEntry
from simpletuner.server.schemas.prompts import PromptLibrary, PromptLibraryWrite
from simpletuner.server.services import ServicesDep

router = APIRouter(prefix="/api/v1/prompt-libraries", tags=["prompts"])


@router.get("")
def list_prompt_libraries(services: ServicesDep) -> list[PromptLibrary]:
    """Return all prompt libraries of the workspace."""
    return services.prompt_libraries.list_libraries()


@router.get("/{name}")
def get_prompt_library(name: str, services: ServicesDep) -> PromptLibrary:
    """Return a prompt library."""
    return services.prompt_libraries.get(name)


@router.put("/{name}")
def write_prompt_library(
    name: str, body: PromptLibraryWrite, services: ServicesDep
) -> PromptLibrary:
    """Create or replace a prompt library."""
    return services.prompt_libraries.write(name, body.prompts)


@router.delete("/{name}")
def delete_prompt_library(name: str, services: ServicesDep) -> TrashEntry:
    """Move a prompt library to the trash."""
    return services.prompt_libraries.delete(name)
