"""The application: the guard before everything, the routes of every noun, the pages last."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from simpletuner.errors import ConfigError
from simpletuner.server import hardware
from simpletuner.server.api import configs, datasets, jobs, runs, system
from simpletuner.server.guard import Guard
from simpletuner.server.home import Home
from simpletuner.server.pages import Pages, routes_page
from simpletuner.server.refusal import answer_refusals
from simpletuner.server.settings import Settings
from simpletuner.server.supervisor import Supervisor
from simpletuner.server.token import Gate, kept
from simpletuner.server.wire.base import Refusal

ROUTES = (system, configs, runs, jobs, datasets)


class Guarded(FastAPI):
    """The guard stands outside of everything, so that the answer to a failure passes it too."""

    def build_middleware_stack(self) -> ASGIApp:
        return Guard(super().build_middleware_stack(), self.state.home.settings, self.state.gate)


def create_app(settings: Settings) -> FastAPI:
    """What works by itself starts and ends with the serving. Raises ConfigError where others could reach a
    server without a token.
    """
    if settings.open and settings.token is None:
        raise ConfigError("a server that other machines reach needs a token")
    # Swagger's and ReDoc's pages come from another host: ours is routes_page.
    app = Guarded(
        title="simpletuner",
        version="1",
        openapi_url="/api/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=working,
        responses={422: {"model": Refusal}},
    )
    app.state.home = Home.of(settings)
    app.state.gate = settings.token and Gate(settings.token, kept(settings.place.own / "cookie.key"))
    answer_refusals(app)
    for module in ROUTES:
        app.include_router(module.router)

    @app.get("/api/v1/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(routes_page(app.openapi()))

    app.mount("/", Pages(settings))
    return app


@asynccontextmanager
async def working(app: FastAPI) -> AsyncIterator[None]:
    """The queue moves on while the server runs; what it started goes on without it."""
    home: Home = app.state.home
    supervisor = Supervisor(home.jobs, hardware.devices, home.settings.stop_grace_s)
    supervisor.start()
    yield
    await run_in_threadpool(supervisor.close)
    home.plans.close()
