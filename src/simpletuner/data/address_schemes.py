"""The kinds of addresses of remote files, and the driver of fsspec that each object store needs.

Apart from the transports, so that a dataset file is checked without their imports (asyncio, ssl).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

from simpletuner.errors import MissingExtra

SCHEME_ALIASES = {"gcs": "gs", "abfs": "az", "abfss": "az"}
WEB_SCHEMES = ("http", "https")


@dataclass(frozen=True)
class StoreDriver:
    """A driver of fsspec. errors: "module:class" of what it raises besides OSError."""

    package: str
    extra: str
    credentials: str
    errors: tuple[str, ...]


DRIVERS: Mapping[str, StoreDriver] = {
    "s3": StoreDriver(
        "s3fs",
        "s3",
        "set aws_access_key_id and aws_secret_access_key, or the AWS_* variables",
        (
            "botocore.exceptions:BotoCoreError",
            "botocore.exceptions:ClientError",
            "aiohttp:ClientError",
        ),
    ),
    "gs": StoreDriver(
        "gcsfs",
        "gcs",
        "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
        (
            "gcsfs.retry:HttpError",
            "google.auth.exceptions:GoogleAuthError",
            "aiohttp:ClientError",
        ),
    ),
    "az": StoreDriver(
        "adlfs",
        "azure",
        "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and _KEY",
        ("azure.core.exceptions:AzureError", "aiohttp:ClientError"),
    ),
}


def split_address(written: str) -> tuple[str, str]:
    """Return the scheme ("s3", also for its other names) and what follows, without a last slash."""
    scheme, _, root = written.partition("://")
    scheme = scheme.lower()
    return SCHEME_ALIASES.get(scheme, scheme), root.rstrip("/")


def store_problem(written: str) -> str:
    """Return why an address cannot be that of an object store, or ""."""
    scheme, root = split_address(written)
    if scheme not in DRIVERS or not root.split("/")[0]:
        return "must be an address such as s3://bucket/folder, gs://bucket/folder or az://container"
    try:
        require_driver(scheme)
    except MissingExtra as error:
        return str(error)
    return ""


def require_driver(scheme: str) -> None:
    """Raise MissingExtra unless the package for this kind of store is installed."""
    driver = DRIVERS[scheme]
    if importlib.util.find_spec(driver.package) is None:
        raise MissingExtra(f"{scheme}:// needs: pip install 'simpletuner[{driver.extra}]'")
