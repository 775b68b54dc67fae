"""The application: the guard before everything, the routes of every noun, the pages last."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.types import ASGIApp

from simpletuner.errors import ConfigError
from simpletuner.server.api import system
from simpletuner.server.guard import Guard
from simpletuner.server.home import Home
from simpletuner.server.pages import Pages, routes_page
from simpletuner.server.refusal import answer_refusals
from simpletuner.server.settings import Settings
from simpletuner.server.token import Gate, kept
from simpletuner.server.wire.base import Refusal

ROUTES = (system,)


class Guarded(FastAPI):
    """The guard stands outside of everything, so that the answer to a failure passes it too."""

    def build_middleware_stack(self) -> ASGIApp:
        return Guard(super().build_middleware_stack(), self.state.home.settings, self.state.gate)


def create_app(settings: Settings) -> FastAPI:
    """Touches the disk only for the secret behind a token; what runs by itself starts with the first request
    loop. Raises ConfigError where others could reach a server without a token.
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
        responses={422: {"model": Refusal}},
    )
    app.state.home = furnished(settings)
    app.state.gate = settings.token and Gate(settings.token, kept(settings.place.own / "cookie.key"))
    answer_refusals(app)
    for module in ROUTES:
        app.include_router(module.router)

    @app.get("/api/v1/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(routes_page(app.openapi()))

    app.mount("/", Pages(settings))
    return app


def furnished(settings: Settings) -> Home:
    place = settings.place
    return Home(place, settings, None, None, None, None, None)  # type: ignore[arg-type]
