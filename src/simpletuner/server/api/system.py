"""The machine, and logging in."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from simpletuner.server import system as machine
from simpletuner.server.guard import cookie_name, try_word
from simpletuner.server.home import Here
from simpletuner.server.wire.system import Login, System

router = APIRouter(prefix="/api/v1", tags=["system"])
YEAR_S = 365 * 86400


@router.get("/system")
def system(home: Here) -> System:
    return machine.describe(home.place)


@router.post("/login", status_code=204)
async def login(request: Request, response: Response, ask: Login, home: Here) -> None:
    """The token, or the launch word that the server printed, for a cookie that scripts cannot read."""
    gate = request.app.state.gate
    if gate is None:
        return
    try_word(request, gate, ask.token)
    response.set_cookie(
        cookie_name(home.settings), gate.cookie, max_age=YEAR_S, httponly=True, samesite="strict", path="/"
    )
