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


def answer(_: Request, error: Exception) -> JSONResponse:
    """What is told of each kind of failure; of an unexpected one only where its traceback is."""
    status, headers = 500, None
    complaints: Sequence[Complaint] = [_whole("the server failed at this; its terminal says why")]
    match error:
        case Refused():
            status, complaints = error.status, error.complaints
        case Outside():  # as for what does not exist: an answer must not tell what lies outside
            status, complaints = 404, [_whole(str(error))]
        case ConfigError():
            status = 422
            complaints = [Complaint(loc="", message=one.what, where=one.where) for one in error.problems]
        case SimpleTunerError():
            status, complaints = 409, [_whole(str(error))]
        case OSError() if error.errno in DISK:  # what a person can mend
            what = f"{os.path.basename(error.filename or '') or 'a file'}: {error.strerror}"
            status, complaints = 507, [_whole(f"{what}; {DISK[error.errno]}")]
        case RequestValidationError():  # without "body", "path" or "query", and without the value itself
            status, found = 422, error.errors()
            complaints = [
                Complaint(loc=".".join(map(str, one["loc"][1:])), message=one["msg"]) for one in found
            ]
        case HTTPException():
            status, headers, complaints = error.status_code, error.headers, [_whole(str(error.detail))]
    return JSONResponse(body(complaints), status, headers)


def _of_disk(request: Request, error: Exception) -> JSONResponse:
    """What nobody can mend is unexpected: it goes on, so that the terminal tells of it."""
    if isinstance(error, OSError) and error.errno not in DISK:
        raise error
    return answer(request, error)


def _whole(message: str) -> Complaint:
    return Complaint(loc="", message=message)


def answer_refusals(app: FastAPI) -> None:
    """From now on every exception of a route is answered."""
    app.add_exception_handler(OSError, _of_disk)
    for kind in (SimpleTunerError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
