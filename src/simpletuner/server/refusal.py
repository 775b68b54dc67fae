"""How a request is refused: always a status and a body of `wire.base.Refusal`, never a traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from simpletuner.errors import ConfigError, SimpleTunerError
from simpletuner.server.place import Outside
from simpletuner.server.wire.base import Complaint, Refusal

ROOM, RIGHTS = "make room on the disk", "see whose folder it is, and whether it may be written to"
DISK = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), ROOM)
DISK |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), RIGHTS)


class Refused(SimpleTunerError):
    """An answer that is no success, with every complaint at once."""

    def __init__(self, status: int, complaints: Sequence[Complaint]) -> None:
        self.status, self.complaints = status, tuple(complaints)
        super().__init__("; ".join(complaint.message for complaint in complaints))


def refuse(status: int, message: str, loc: str = "") -> NoReturn:
    """Raises Refused with one complaint; loc: the option or field that it is about."""
    raise Refused(status, [Complaint(loc=loc, message=message)])


def body(complaints: Sequence[Complaint]) -> dict[str, Any]:
    return Refusal(detail=list(complaints)).model_dump()


def _refused(_: Request, error: Refused) -> JSONResponse:
    return JSONResponse(body(error.complaints), error.status)


def _outside(_: Request, error: Outside) -> JSONResponse:
    """404, as for what does not exist: an answer must not tell what lies outside."""
    return JSONResponse(body([Complaint(loc="", message=str(error))]), 404)


def _config(_: Request, error: ConfigError) -> JSONResponse:
    return JSONResponse(body([Complaint(loc="", message=p.what, where=p.where) for p in error.problems]), 422)


def _mendable(_: Request, error: SimpleTunerError) -> JSONResponse:
    return JSONResponse(body([Complaint(loc="", message=str(error))]), 409)


def _disk(_: Request, error: OSError) -> JSONResponse:
    """What a person can mend; anything else is a failure of the server's own."""
    if error.errno not in DISK:
        raise error
    what = f"{os.path.basename(error.filename or '') or 'a file'}: {error.strerror}"
    return JSONResponse(body([Complaint(loc="", message=f"{what}; {DISK[error.errno]}")]), 507)


def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """loc without its first word, which says body, path or query; the value itself is not repeated."""
    found = [
        Complaint(loc=".".join(str(word) for word in one["loc"][1:]), message=one["msg"])
        for one in error.errors()
    ]
    return JSONResponse(body(found), 422)


def _http(_: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse(
        body([Complaint(loc="", message=str(error.detail))]), error.status_code, headers=error.headers
    )


def _unexpected(_: Request, __: Exception) -> JSONResponse:
    """The traceback goes to the server's terminal only."""
    return JSONResponse(
        body([Complaint(loc="", message="the server failed at this; its terminal says why")]), 500
    )


HANDLERS: dict[type[Exception], Any] = {
    Refused: _refused,
    Outside: _outside,
    ConfigError: _config,
    SimpleTunerError: _mendable,
    OSError: _disk,
    RequestValidationError: _invalid,
    HTTPException: _http,
    Exception: _unexpected,
}


def answer_refusals(app: FastAPI) -> None:
    """From now on every exception of a route is answered by its row of HANDLERS."""
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
