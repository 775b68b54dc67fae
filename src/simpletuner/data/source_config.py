"""The source of a dataset, as the fields of the dataset file describe it, checked."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.config.schema import DataOptions
from simpletuner.data.address_schemes import DRIVERS, WEB_SCHEMES, require_driver, split_address
from simpletuner.data.caption_table_field import FORMATS_BY_SUFFIX
from simpletuner.data.dataset_config import HubLocation, ImageTable, StoreLocation
from simpletuner.data.dataset_fields import ImageDatasetFields
from simpletuner.data.row_filters import RowFilters
from simpletuner.data.source_fields import FIELDS_BY_TYPE, TABLE_TYPES, SourceFields
from simpletuner.data.table_rows import PARQUET_HINT
from simpletuner.errors import ConfigError, MissingExtra, Problem

REPOSITORY_PATTERN = re.compile(r"[\w.-]+/[\w.-]+")
BLOCK_COLUMNS = ("image_column", "caption_column", "fallback_caption_column")
SIZE_COLUMNS = ("width_column", "height_column")
FILTER_KEYS = ("collection", "quality_thresholds", "min_width", "min_height")
BLOCK_KEYS = (*BLOCK_COLUMNS, *SIZE_COLUMNS, "description_column", "filter_func")
UNNEEDED_BLOCK_KEYS = ("file_extension", "cache_dir", "num_proc")  # found by content, set elsewhere
COMPOSITE_KEY = "composite_image_config"
ResolvePath = Callable[[str], Path]


@dataclass(frozen=True)
class SourceConfig:
    """Location of the images of a dataset.

    folder: of this machine; that of the images, or the one where paths in the table begin.
    """

    folder: Path = Path()
    store: StoreLocation | None = None
    hub: HubLocation | None = None
    table: ImageTable | None = None


def unused_fields(storage: str, given: Mapping[str, Any]) -> list[str]:
    """Return the given fields of sources that have no effect with this type."""
    used = FIELDS_BY_TYPE[storage]
    return [name for name in SourceFields.model_fields if name in given and name not in used]


def read_source(
    storage: str, fields: ImageDatasetFields, own: DataOptions, resolve: ResolvePath
) -> SourceConfig:
    """Return the source. Raises ConfigError; each problem is located at a field.

    storage: the field type. own: the options of the run with those of the dataset. resolve: from a
    written path to the file.
    """
    if own.caption_strategy == "huggingface" and storage not in ("huggingface", "webshart"):
        raise _problem("caption_strategy", "huggingface needs type huggingface")
    from_rows = own.caption_strategy not in ("instanceprompt", "filename")
    rows_have_captions = from_rows and not own.only_instance_prompt
    if storage == "aws":
        return SourceConfig(store=_read_bucket(fields))
    if storage == "huggingface":
        return _read_hub(fields, rows_have_captions)
    if storage == "webshart":
        repository = _read_repository(fields.source, "source")
        return SourceConfig(hub=_hub_location(repository, fields))
    if storage in TABLE_TYPES:
        return _read_image_table(storage, fields, rows_have_captions, resolve)
    store = _read_address(storage, fields.instance_data_dir, fields)
    if store is not None:
        return SourceConfig(store=store)
    return SourceConfig(find_folder(fields.instance_data_dir, resolve))


def is_address(written: str) -> bool:
    """Return whether the text is an address and not a path."""
    return re.match(r"[A-Za-z][\w+.-]*://", written) is not None


def _read_bucket(fields: SourceFields) -> StoreLocation:
    if not fields.aws_bucket_name:
        raise _problem("aws_bucket_name", "is missing: the bucket of the images")
    root = f"{fields.aws_bucket_name}/{fields.aws_data_prefix.strip('/')}".rstrip("/")
    return _store_location("s3", root, fields, "aws_bucket_name")


def _read_address(storage: str, written: str, fields: SourceFields) -> StoreLocation | None:
    if not is_address(written):
        return None
    scheme, root = split_address(written)
    if scheme in WEB_SCHEMES and storage == "webdataset":
        return StoreLocation(scheme, root)
    if scheme in WEB_SCHEMES:
        reason = (
            "is a URL, and the files behind one cannot be listed; list them in a table (type csv), "
            'or use tar files ("type": "webdataset", ".../{000..127}.tar")'
        )
        raise _problem("instance_data_dir", reason)
    if scheme not in DRIVERS:
        known = ", ".join(f"{name}://" for name in DRIVERS)
        raise _problem("instance_data_dir", f"cannot be read from {scheme}://; allowed: {known}")
    return _store_location(scheme, root, fields, "instance_data_dir")


def _store_location(scheme: str, root: str, fields: SourceFields, field: str) -> StoreLocation:
    try:
        require_driver(scheme)
    except MissingExtra as error:
        raise _problem(field, f"cannot be read: {error}") from error
    if bool(fields.aws_access_key_id) != bool(fields.aws_secret_access_key):
        missing = "aws_secret_access_key" if fields.aws_access_key_id else "aws_access_key_id"
        raise _problem(missing, "is missing: a key needs both parts")
    if not root.split("/")[0]:
        raise _problem(field, "names no bucket")
    return StoreLocation(
        scheme,
        root,
        fields.aws_endpoint_url,
        fields.aws_region_name,
        fields.aws_access_key_id,
        fields.aws_secret_access_key,
    )


def find_folder(written: str, resolve: ResolvePath) -> Path:
    """Return the folder of this machine. Raises ConfigError where there is none."""
    if not written:
        raise _problem("instance_data_dir", "is missing: the folder of the images")
    folder = resolve(written)
    if not os.path.isdir(folder):
        reason = "is not a folder" if os.path.exists(folder) else "does not exist"
        shown = f"= {json.dumps(written, ensure_ascii=False)}"
        raise _problem("instance_data_dir", f"{shown} {reason} (resolved to {folder})")
    return folder


def _read_repository(written: str, field: str) -> str:
    if not REPOSITORY_PATTERN.fullmatch(written):
        reason = "must be owner/name of a dataset" if written else "is missing: owner/name"
        raise _problem(field, reason)
    return written


def _hub_location(repository: str, fields: SourceFields) -> HubLocation:
    subfolder = fields.subfolder.strip("/")
    if ".." in subfolder.split("/"):
        raise _problem("subfolder", f"= {json.dumps(fields.subfolder)} must be inside the dataset")
    return HubLocation(
        repository,
        fields.revision,
        fields.dataset_subset,
        fields.split,
        fields.streaming,
        subfolder,
    )


def _read_hub(fields: SourceFields, rows_have_captions: bool) -> SourceConfig:
    block = dict(fields.huggingface or {})
    named = block.pop("dataset_name", None) or fields.dataset_name
    if not isinstance(named, str) or (fields.dataset_name and named != fields.dataset_name):
        raise _problem("huggingface", f"dataset_name: is not {fields.dataset_name}, named outside")
    repository = _read_repository(named, "dataset_name")
    for key in UNNEEDED_BLOCK_KEYS:
        block.pop(key, None)
    composite = block.pop(COMPOSITE_KEY, None)
    if isinstance(composite, dict) and composite.get("enabled"):
        raise _problem("huggingface", f"{COMPOSITE_KEY}: images are not cut into parts")
    if unknown := next((key for key in block if key not in BLOCK_KEYS), None):
        raise _problem("huggingface", f"{unknown}: unknown; it takes {', '.join(BLOCK_KEYS)}")
    for key in (*SIZE_COLUMNS, "image_column", "fallback_caption_column", "description_column"):
        if not isinstance(block.get(key, ""), str):
            raise _problem("huggingface", f"{key} must be the name of a column")
    captions = block.get("caption_column") or fields.caption_column
    width = fields.width_column or block.get("width_column") or None
    height = fields.height_column or block.get("height_column") or None
    table = ImageTable(
        location="",
        format="parquet",
        image_column=fields.image_column or block.get("image_column") or None,
        caption_columns=_column_names(captions, "huggingface"),
        fallback_column=fields.fallback_caption_column
        or block.get("fallback_caption_column")
        or block.get("description_column")
        or None,
        width_column=width,
        height_column=height,
        weight_column=fields.weight_column or None,
        filters=_read_filters(block.get("filter_func"), width, height),
        needs_captions=rows_have_captions,
    )
    return SourceConfig(hub=_hub_location(repository, fields), table=table)


def _read_filters(block: Any, width: str | None, height: str | None) -> RowFilters:
    if block is None:
        return RowFilters()
    if not isinstance(block, dict) or any(key not in FILTER_KEYS for key in block):
        allowed = ", ".join(FILTER_KEYS)
        raise _problem("huggingface", f"filter_func must be an object of {allowed}")
    collections = block.get("collection") or []
    collections = [collections] if isinstance(collections, str) else collections
    quality = block.get("quality_thresholds") or {}
    sides = [block.get("min_width"), block.get("min_height")]
    numbers = [*(quality.values() if isinstance(quality, dict) else [None]), *filter(None, sides)]
    if not all(isinstance(number, (int, float)) for number in numbers):
        reason = "quality_thresholds, min_width and min_height take numbers"
        raise _problem("huggingface", f"filter_func: {reason}")
    return RowFilters(
        collections=tuple(map(str, collections)),
        quality=tuple(sorted(quality.items())),
        minimum_width=sides[0],
        minimum_height=sides[1],
        width_column=width or "width",
        height_column=height or "height",
    )


def _read_image_table(
    storage: str, fields: ImageDatasetFields, rows_have_captions: bool, resolve: ResolvePath
) -> SourceConfig:
    field = "csv_file" if fields.csv_file and storage == "csv" else "table"
    written = fields.table or (fields.csv_file if storage == "csv" else "")
    if not written:
        raise _problem(field, f"is missing: the {storage} file whose rows are the images")
    if storage == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise _problem(field, PARQUET_HINT)
    store = None
    if is_address(written):
        scheme, _, root = written.partition("://")
        if scheme in DRIVERS:
            store = _store_location(scheme, root, fields, field)
        elif scheme not in WEB_SCHEMES:
            known = ", ".join(f"{name}://" for name in (*WEB_SCHEMES, *DRIVERS))
            raise _problem(field, f"cannot be read from {scheme}://; allowed: {known}")
        location = written
    else:
        path = resolve(written)
        if not os.path.isfile(path):
            shown = json.dumps(written, ensure_ascii=False)
            raise _problem(field, f"{shown} is not a file (resolved to {path})")
        location = str(path)
    captions = fields.caption_column or (fields.csv_caption_column if storage == "csv" else None)
    suffix = os.path.splitext(location.partition("?")[0])[1].lower()
    table = ImageTable(
        location=location,
        format=FORMATS_BY_SUFFIX.get(suffix, storage),
        image_column=fields.image_column or fields.csv_url_column or None,
        caption_columns=_column_names(captions, "caption_column"),
        fallback_column=fields.fallback_caption_column or None,
        width_column=fields.width_column or None,
        height_column=fields.height_column or None,
        weight_column=fields.weight_column or None,
        needs_captions=rows_have_captions,
    )
    folder = Path() if is_address(location) else Path(location).parent
    if fields.instance_data_dir:
        folder = find_folder(fields.instance_data_dir, resolve)
    return SourceConfig(folder, store, table=table)


def _column_names(columns: Any, field: str) -> tuple[str, ...]:
    names = [columns] if isinstance(columns, str) and columns else list(columns or [])
    if not all(isinstance(name, str) for name in names):
        raise _problem(field, "must be the name of a column, or a list of names")
    return tuple(names)


def _problem(field: str, message: str) -> ConfigError:
    return ConfigError([Problem(field, message)])
