"""Files behind http and https URLs. Nothing else can be asked for, also not by a redirect."""

from __future__ import annotations

import http.client
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import IO, Any
from urllib.parse import quote, urlsplit

from simpletuner.data.address_schemes import WEB_SCHEMES
from simpletuner.data.transports import PartialDownload, TransferError, Transport, too_large

TIMEOUT_S = 30.0
BLOCK_BYTES = 1 << 18
# Slower than this for a whole minute counts as a dead connection.
SLOWEST_BYTES_PER_S = 1024
SLOW_AFTER_S = 60.0
MAX_RETRY_AFTER_S = 120.0
# Statuses after which the same request may succeed.
TRANSIENT_STATUSES = frozenset({408, 421, 423, 425, 429, 500, 502, 503, 504})
REASONS = {status.value: status.phrase for status in HTTPStatus}
URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"  # what quoting leaves as it is


class HttpTransport(Transport):
    """Requests with Python's own client; proxies come from the usual environment variables.

    headers: sent to the hosts of `headers_host` only, and never along with a redirect to another.
    """

    def __init__(
        self,
        headers: Mapping[str, str] | None = None,
        headers_host: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._headers = dict(headers or {})
        self._headers_host = headers_host
        self._clock = clock
        # build_opener() would add handlers for file:, ftp: and data: addresses.
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            _WebRedirects(),
        ):
            self._opener.add_handler(handler)

    def download(self, location: str, partial: PartialDownload) -> None:
        start = partial.file.seek(0, os.SEEK_END) if partial.validator else 0
        extra = {"Range": f"bytes={start}-", "If-Range": partial.validator} if start else {}
        with self._request(location, extra) as response:
            if not start or response.status != HTTPStatus.PARTIAL_CONTENT:
                partial.restart()
                start = 0
            etag = response.headers.get("ETag", "")
            partial.validator = etag if etag.startswith('"') else ""
            length = _content_length(response)
            if length is not None and start + length > partial.max_bytes:
                raise too_large(partial.max_bytes)
            for block in self._blocks(response, length):
                partial.append(block)

    def read_range(self, location: str, start: int, length: int) -> bytes:
        extra = {"Range": f"bytes={start}-{start + length - 1}"}
        with self._request(location, extra) as response:
            if response.status != HTTPStatus.PARTIAL_CONTENT:
                raise TransferError("the server does not send parts of a file", permanent=True)
            content = b"".join(self._blocks(response, _content_length(response)))
        if len(content) != length:
            raise TransferError(f"{len(content)} of {length} bytes arrived", permanent=False)
        return content

    def file_size(self, location: str) -> int:
        with self._request(location, {"Range": "bytes=0-0"}) as response:
            total = re.fullmatch(r"bytes 0-0/(\d+)", response.headers.get("Content-Range", ""))
            if total is not None:
                return int(total.group(1))
            length = _content_length(response)  # of the whole file, where parts are not sent
            if response.status != HTTPStatus.OK or length is None:
                raise TransferError("the server does not send the size of the file", permanent=True)
            return length

    @contextmanager
    def _request(self, location: str, extra: Mapping[str, str]) -> Iterator[Any]:
        """Yield the response; every failure inside the body, too, is a TransferError."""
        try:
            url = quote(location, safe=URL_CHARACTERS)
            parts = urlsplit(url)
            if parts.scheme not in WEB_SCHEMES or not parts.hostname:
                raise TransferError("is not an http or https address", permanent=True)
            request = urllib.request.Request(url, headers={"User-Agent": "simpletuner", **extra})
            if self._headers_host == parts.netloc:
                for name, value in self._headers.items():
                    request.add_unredirected_header(name, value)
            with self._opener.open(request, timeout=TIMEOUT_S) as response:
                yield response
        except TransferError:
            raise
        except urllib.error.HTTPError as error:
            error.close()
            raise _status_error(error) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _connection_error(error) from error

    def _blocks(self, response: Any, length: int | None) -> Iterator[bytes]:
        """Yield the body; its end before `length` bytes is an error."""
        begun = self._clock()
        received = 0
        while block := response.read1(BLOCK_BYTES):
            yield block
            received += len(block)
            elapsed = self._clock() - begun
            if elapsed > SLOW_AFTER_S and received < elapsed * SLOWEST_BYTES_PER_S:
                detail = f"only {received} bytes arrived in {elapsed:.0f} s"
                raise TransferError(detail, permanent=False)
        if length is not None and received < length:
            detail = f"the connection was cut after {received} of {length} bytes"
            raise TransferError(detail, permanent=False)


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects to other http and https addresses only, ten at most."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in WEB_SCHEMES:
            raise TransferError("is redirected to another kind of address", permanent=True)
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and following.host == req.host:
            for name, value in req.unredirected_hdrs.items():
                if name.lower() == "authorization":
                    following.add_unredirected_header(name, value)
        return following


def _content_length(response: Any) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _status_error(error: urllib.error.HTTPError) -> TransferError:
    # The text of the server is not used: it may hold the address, with a signature.
    transient = error.code in TRANSIENT_STATUSES
    phrase = REASONS.get(error.code, "")
    if 300 <= error.code < 400:
        phrase += ", which is not followed: it leads in a circle, or to no http address"
    wait = error.headers.get("Retry-After", "") if error.headers is not None else ""
    return TransferError(
        f"HTTP {error.code} {phrase}".strip(),
        permanent=not transient,
        retry_after_s=min(float(wait), MAX_RETRY_AFTER_S) if wait.isdigit() else None,
    )


def _connection_error(error: Exception) -> TransferError:
    """Return what a failed connection means: a name that does not exist will not exist later."""
    cause: object = error
    while isinstance(cause, urllib.error.URLError) and isinstance(cause.reason, Exception):
        cause = cause.reason
    if isinstance(cause, TransferError):
        return cause
    if isinstance(cause, socket.gaierror):
        gone = cause.errno == socket.EAI_NONAME
        return TransferError("the host has no address", permanent=gone)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return TransferError("the certificate of the host is not valid", permanent=True)
    if isinstance(cause, TimeoutError):
        return TransferError(f"no answer within {TIMEOUT_S:.0f} s", permanent=False)
    if isinstance(cause, OSError):
        return TransferError(cause.strerror or type(cause).__name__, permanent=False)
    permanent = isinstance(cause, (ValueError, http.client.InvalidURL))
    return TransferError(f"{type(cause).__name__} in the exchange", permanent=permanent)
