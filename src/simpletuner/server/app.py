"""The FastAPI application: security middleware first, then API routes, then static pages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from simpletuner.errors import ConfigError
from simpletuner.server import hardware
from simpletuner.server.api import (
    captioning,
    configs,
    datasets,
    generations,
    jobs,
    library,
    prompts,
    runs,
    system,
)
from simpletuner.server.api_errors import register_error_handlers
from simpletuner.server.json_compression import JsonCompression
from simpletuner.server.schemas.base import ERROR_RESPONSES
from simpletuner.server.security_middleware import SecurityMiddleware
from simpletuner.server.services import Services
from simpletuner.server.settings import ServerSettings
from simpletuner.server.static_pages import StaticPages, render_routes_page
from simpletuner.server.supervisor import Supervisor
from simpletuner.server.token_auth import TokenAuth, read_or_create_secret
from simpletuner.server.translation import LanguageMiddleware

ROUTE_MODULES = (system, configs, runs, jobs, datasets, generations, library, captioning, prompts)


class SecuredApp(FastAPI):
    """A FastAPI whose security middleware is outermost.

    FastAPI would put its own error middleware outside of ours, and responses to unexpected
    exceptions would then lack the security headers.
    """

    def build_middleware_stack(self) -> ASGIApp:
        return SecurityMiddleware(
            LanguageMiddleware(super().build_middleware_stack()),
            self.state.services.settings,
            self.state.token_auth,
        )


def create_app(settings: ServerSettings) -> FastAPI:
    """Build the application; its background workers start and stop with it.

    Raises ConfigError if other machines can reach the server and no token is set.
    """
    if settings.is_public and settings.token is None:
        raise ConfigError("a server that other machines can reach needs a token")
    # Swagger's and ReDoc's pages load scripts from another host; render_routes_page replaces them.
    app = SecuredApp(
        title="simpletuner",
        version="1",
        openapi_url="/api/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=ERROR_RESPONSES,
    )
    app.state.services = Services.from_settings(settings)
    app.state.token_auth = settings.token and TokenAuth(
        settings.token, read_or_create_secret(settings.workspace.server_dir / "cookie.key")
    )
    app.add_middleware(JsonCompression)
    register_error_handlers(app)
    for module in ROUTE_MODULES:
        app.include_router(module.router)

    @app.get("/api/v1/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(render_routes_page(app.openapi()))

    app.mount("/", StaticPages(settings))
    return app


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Run the supervisor while the server runs. Jobs that it started outlive the server."""
    services: Services = app.state.services
    supervisor = Supervisor(
        services.jobs,
        hardware.list_devices,
        services.settings.stop_grace_s,
        services.preferences.job_variables,
        services.generations.release_device,
    )
    supervisor.start()
    services.usage.start()
    yield
    services.usage.close()
    await run_in_threadpool(supervisor.close)
    services.plans.close()
