"""Object stores by fsspec: S3 (s3fs), Google Cloud Storage (gcsfs) and Azure Blob (adlfs).

A listing is remembered page by page, so that one that was interrupted is continued, and the last
complete one serves while the store cannot be reached.
"""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from typing import Any

from simpletuner.data.address_schemes import DRIVERS, StoreDriver, require_driver
from simpletuner.data.dataset_config import StoreLocation
from simpletuner.data.listing import ListedFile, Lister, Page, version_number
from simpletuner.data.transports import PartialDownload, TransferError, Transport

DOES_NOT_EXIST = "does not exist"
CHUNK_BYTES = 1 << 24
KEYS_PER_PAGE = 1000
CREDENTIAL_ERRORS = ("NoCredentialsError", "DefaultCredentialsError", "ClientAuthenticationError")


class ObjectTransport(Transport):
    """Objects of one store. Its own retries are off: the store of copies repeats, and says so."""

    def __init__(self, location: StoreLocation) -> None:
        require_driver(location.scheme)
        import fsspec

        self.location = location
        self._driver = DRIVERS[location.scheme]
        self._errors: tuple[type[Exception], ...] = (
            OSError,
            asyncio.TimeoutError,
            ValueError,
            *_load_errors(self._driver),
        )
        try:
            self._files: Any = fsspec.filesystem(
                location.scheme,
                skip_instance_cache=True,
                use_listings_cache=False,
                **_driver_options(location),
            )
        except self._errors as error:
            raise self._to_transfer_error(error) from error
        if location.scheme == "s3":
            self._files.retries = 1

    def download(self, location: str, partial: PartialDownload) -> None:
        start = partial.file.seek(0, 2) if partial.validator else 0
        if not start:
            partial.restart()
        size = partial.expected_bytes
        if size is None:
            size = self.file_size(location)
        # The size is checked by the caller; a changed object would have another size.
        partial.validator = str(size)
        while start < size:
            block = self.read_range(location, start, min(CHUNK_BYTES, size - start))
            partial.append(block)
            start += len(block)

    def read_range(self, location: str, start: int, length: int) -> bytes:
        content = self.call("cat_file", _key(location), start=start, end=start + length)
        if len(content) != length:
            raise TransferError(f"{len(content)} of {length} bytes arrived", permanent=False)
        return bytes(content)

    def upload(self, file: Path, location: str) -> None:
        """Write a file of this machine to the store, whole or not at all. Raises TransferError."""
        self.call("put_file", str(file), _key(location))

    def is_missing_folder(self, error: TransferError) -> bool:
        """Return whether a listing failed because nothing was written to the folder yet.

        S3 lists such a folder as empty, so that its error means the bucket.
        """
        return error.strerror == DOES_NOT_EXIST and self.location.scheme != "s3"

    def file_size(self, location: str) -> int:
        return int(self.call("info", _key(location))["size"])

    def lister(self) -> Lister:
        """Begin a listing of the location."""
        return (_KeyLister if self.location.scheme == "s3" else _FolderLister)(self)

    def call(self, name: str, *values: Any, **named: Any) -> Any:
        """Call a method of the driver. Raises TransferError."""
        try:
            return getattr(self._files, name)(*values, **named)
        except self._errors as error:
            raise self._to_transfer_error(error) from error

    def _to_transfer_error(self, error: BaseException) -> TransferError:
        """Return what the failure means. The text of a driver may hold a signed URL: none is used.

        A missing bucket or object, and missing rights, will be missing later too.
        """
        names = {kind.__name__ for kind in type(error).__mro__}
        if names.intersection(CREDENTIAL_ERRORS):
            return TransferError(f"no credentials; {self._driver.credentials}", permanent=True)
        if isinstance(error, FileNotFoundError):
            return TransferError(DOES_NOT_EXIST, permanent=True)
        if isinstance(error, PermissionError):
            reason = f"access is denied; {self._driver.credentials}"
            return TransferError(reason, permanent=True)
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
            return TransferError("no answer in time", permanent=False)
        return TransferError(f"{type(error).__name__} of the store", permanent=False)


class _KeyLister(Lister):
    """All keys below a prefix, a thousand at a time, in the order of the keys."""

    def __init__(self, transport: ObjectTransport) -> None:
        self._transport = transport
        self._bucket, _, prefix = transport.location.root.partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._after = ""

    def next_page(self) -> Page:
        start = {"StartAfter": self._after} if self._after else {}
        page = self._transport.call(
            "call_s3",
            "list_objects_v2",
            Bucket=self._bucket,
            Prefix=self._prefix,
            MaxKeys=KEYS_PER_PAGE,
            **start,
        )
        objects = page.get("Contents", [])
        files = tuple(
            ListedFile(
                entry["Key"].removeprefix(self._prefix),
                entry["Size"],
                version_number(entry["ETag"]),
            )
            for entry in objects
            if not entry["Key"].endswith("/")
        )
        more = objects and page.get("IsTruncated")
        return Page(files, (objects[-1]["Key"],) if more else ())

    def follow(self, page: Page) -> None:
        self.is_complete = not page.follow_up
        self._after = page.follow_up[0] if page.follow_up else ""


class _FolderLister(Lister):
    """Folder by folder; the follow-up of a page is the folders in it."""

    def __init__(self, transport: ObjectTransport) -> None:
        self._transport = transport
        self._waiting = [""]

    def next_page(self) -> Page:
        root, folder = self._transport.location.root, self._waiting[-1]
        entries = self._transport.call("ls", f"{root}/{folder}".rstrip("/"), detail=True)
        files, folders = [], []
        for entry in entries:
            inside = entry["name"].rstrip("/").removeprefix(root).lstrip("/")
            if inside == folder:
                continue
            if entry["type"] == "directory":
                folders.append(inside)
                continue
            tag = str(entry.get("etag") or entry.get("md5Hash") or entry.get("last_modified"))
            files.append(ListedFile(inside, int(entry["size"]), version_number(tag)))
        return Page(tuple(sorted(files)), tuple(sorted(folders, reverse=True)))

    def follow(self, page: Page) -> None:
        self._waiting.pop()
        self._waiting += page.follow_up
        self.is_complete = not self._waiting


def _driver_options(location: StoreLocation) -> dict[str, Any]:
    if location.scheme != "s3":
        return {}
    options: dict[str, Any] = {
        "config_kwargs": {
            "retries": {"max_attempts": 1, "mode": "standard"},
            "connect_timeout": 30,
            "read_timeout": 60,
        }
    }
    client = {"endpoint_url": location.endpoint_url, "region_name": location.region}
    options["client_kwargs"] = {name: value for name, value in client.items() if value}
    if location.access_key_id:
        options |= {"key": location.access_key_id, "secret": location.secret_access_key}
    return options


def _load_errors(driver: StoreDriver) -> tuple[type[Exception], ...]:
    classes = []
    for written in driver.errors:
        module, _, name = written.partition(":")
        classes.append(vars(importlib.import_module(module))[name])
    return tuple(classes)


def _key(location: str) -> str:
    return location.partition("://")[2]
