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
from simpletuner.server.schemas.base import ErrorDetail, ErrorResponse
from simpletuner.server.workspace import PathOutsideWorkspace

DISK_FULL_ADVICE, PERMISSION_ADVICE = (
    "make room on the disk",
    "see whose folder it is, and whether it may be written to",
)
DISK_ERROR_ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), DISK_FULL_ADVICE)
DISK_ERROR_ADVICE |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), PERMISSION_ADVICE)


class ApiError(SimpleTunerError):
    """An answer that is no success, with every complaint at once."""

    def __init__(self, status: int, complaints: Sequence[ErrorDetail]) -> None:
        self.status, self.details = status, tuple(complaints)
        super().__init__("; ".join(complaint.message for complaint in complaints))


def abort(status: int, message: str, loc: str = "") -> NoReturn:
    """Raises Refused with one complaint; loc: the option or field that it is about."""
    raise ApiError(status, [ErrorDetail(loc=loc, message=message)])


def error_body(complaints: Sequence[ErrorDetail]) -> dict[str, Any]:
    return ErrorResponse(detail=list(complaints)).model_dump()


def to_error_response(_: Request, error: Exception) -> JSONResponse:
    """What is told of each kind of failure; of an unexpected one only where its traceback is."""
    status, headers = 500, None
    complaints: Sequence[ErrorDetail] = [
        _general_error("the server failed at this; its terminal says why")
    ]
    match error:
        case ApiError():
            status, complaints = error.status, error.details
        case PathOutsideWorkspace():  # as for what does not exist: an answer must not tell what lies outside
            status, complaints = 404, [_general_error(str(error))]
        case ConfigError():
            status = 422
            complaints = [
                ErrorDetail(loc="", message=one.message, where=one.location)
                for one in error.problems
            ]
        case SimpleTunerError():
            status, complaints = 409, [_general_error(str(error))]
        case OSError() if error.errno in DISK_ERROR_ADVICE:  # what a person can mend
            what = f"{os.path.basename(error.filename or '') or 'a file'}: {error.strerror}"
            status, complaints = 507, [_general_error(f"{what}; {DISK_ERROR_ADVICE[error.errno]}")]
        case RequestValidationError():  # without "body", "path" or "query", and without the value itself
            status, found = 422, error.errors()
            complaints = [
                ErrorDetail(loc=".".join(map(str, one["loc"][1:])), message=one["msg"])
                for one in found
            ]
        case HTTPException():
            status, headers, complaints = (
                error.status_code,
                error.headers,
                [_general_error(str(error.detail))],
            )
    return JSONResponse(error_body(complaints), status, headers)


def _handle_disk_error(request: Request, error: Exception) -> JSONResponse:
    """What nobody can mend is unexpected: it goes on, so that the terminal tells of it."""
    if isinstance(error, OSError) and error.errno not in DISK_ERROR_ADVICE:
        raise error
    return to_error_response(request, error)


def _general_error(message: str) -> ErrorDetail:
    return ErrorDetail(loc="", message=message)


def register_error_handlers(app: FastAPI) -> None:
    """From now on every exception of a route is answered."""
    app.add_exception_handler(OSError, _handle_disk_error)
    for kind in (SimpleTunerError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, to_error_response)
