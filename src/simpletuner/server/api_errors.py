"""Error responses: always a status code and an ErrorResponse body, never a traceback."""

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

DISK_FULL_ADVICE = "free some disk space"
PERMISSION_ADVICE = "check the owner and the write permission of the folder"
DISK_ERROR_ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), DISK_FULL_ADVICE)
DISK_ERROR_ADVICE |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), PERMISSION_ADVICE)


class ApiError(SimpleTunerError):
    """An error response with all its details."""

    def __init__(self, status: int, details: Sequence[ErrorDetail]) -> None:
        self.status = status
        self.details = tuple(details)
        super().__init__("; ".join(detail.message for detail in details))


def abort(status: int, message: str, loc: str = "") -> NoReturn:
    """Raise ApiError with one detail. loc: the option or field that the message is about."""
    raise ApiError(status, [ErrorDetail(loc=loc, message=message)])


def error_body(details: Sequence[ErrorDetail]) -> dict[str, Any]:
    """Return the body of an error response."""
    return ErrorResponse(detail=list(details)).model_dump()


def to_error_response(_: Request, error: Exception) -> JSONResponse:
    """Convert an exception to a response.

    The response to an unexpected exception only refers to the terminal, where the traceback is
    printed.
    """
    status, headers = 500, None
    details: Sequence[ErrorDetail] = [
        _general_error("internal server error; the server's terminal shows the traceback")
    ]
    match error:
        case ApiError():
            status, details = error.status, error.details
        case PathOutsideWorkspace():
            # The same status as for a missing file, so that the response does not reveal what
            # exists.
            status, details = 404, [_general_error(str(error))]
        case ConfigError():
            status = 422
            details = [
                ErrorDetail(loc="", message=problem.message, where=problem.location)
                for problem in error.problems
            ]
        case SimpleTunerError():
            status, details = 409, [_general_error(str(error))]
        case OSError() if error.errno in DISK_ERROR_ADVICE:  # the user can fix these
            reason = f"{os.path.basename(error.filename or '') or 'a file'}: {error.strerror}"
            status, details = 507, [_general_error(f"{reason}; {DISK_ERROR_ADVICE[error.errno]}")]
        case RequestValidationError():
            # Without the prefix "body", "path" or "query", and without the rejected value.
            status = 422
            details = [
                ErrorDetail(loc=".".join(map(str, item["loc"][1:])), message=item["msg"])
                for item in error.errors()
            ]
        case HTTPException():
            status, headers = error.status_code, error.headers
            details = [_general_error(str(error.detail))]
    return JSONResponse(error_body(details), status, headers)


def _handle_disk_error(request: Request, error: Exception) -> JSONResponse:
    """Report a full or read-only disk; re-raise any other OSError to log its traceback."""
    if isinstance(error, OSError) and error.errno not in DISK_ERROR_ADVICE:
        raise error
    return to_error_response(request, error)


def _general_error(message: str) -> ErrorDetail:
    return ErrorDetail(loc="", message=message)


def register_error_handlers(app: FastAPI) -> None:
    """Convert every exception raised by a route to an error response."""
    app.add_exception_handler(OSError, _handle_disk_error)
    for kind in (SimpleTunerError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, to_error_response)
