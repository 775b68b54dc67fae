"""The field caption_table of a dataset, and SimpleTuner's block "parquet", checked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simpletuner.config.sections_data import CAPTION_TABLES
from simpletuner.data.dataset_config import CaptionTable
from simpletuner.errors import ConfigError

FORMATS_BY_SUFFIX = {
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
TEXT_KEYS = ("path", "filename_column", "fallback_caption_column")
LIST_KEYS = ("caption_column",)
# Keys of SimpleTuner that change nothing: sizes are read from the images, and a row may name an
# image with or without its suffix.
UNNEEDED_KEYS = ("width_column", "height_column", "identifier_includes_extension")


def read_table_field(
    value: str | Mapping[str, Any] | None,
    strategy: str,
    resolve: Callable[[str], Path],
    root: str = "",
) -> CaptionTable | None:
    """Return the table of a dataset; None where its captions come from elsewhere.

    root: the address of the images, if they are on a server: a path that does not exist on this
    machine is a path in it.

    strategy: caption_strategy, the format of a file whose suffix says nothing. resolve: from the
    written path to the file. Raises ConfigError with what is wrong.
    """
    if strategy not in CAPTION_TABLES:
        return None
    fields = {"path": value} if isinstance(value, str) else dict(value or {})
    known = (*TEXT_KEYS, *LIST_KEYS, *UNNEEDED_KEYS)
    if unknown := next((key for key in fields if key not in known), None):
        raise ConfigError(f"{unknown}: unknown; it takes {', '.join(known)}")
    for key in TEXT_KEYS:
        if fields.get(key) is not None and not isinstance(fields[key], str):
            raise ConfigError(f"{key} = {json.dumps(fields[key])} must be text")
    columns = fields.get("caption_column") or []
    columns = [columns] if isinstance(columns, str) else columns
    if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
        raise ConfigError("caption_column must be a name or a list of names")
    written = fields.get("path")
    if not written:
        raise ConfigError(f"is missing: caption_strategy {strategy} reads captions from a table")
    path, url = resolve(written), written if "://" in written else ""
    if not os.path.isfile(path):
        if not url and not root:
            raise ConfigError(f"{json.dumps(written, ensure_ascii=False)} is not a file ({path})")
        path, url = Path(written), url or f"{root}/{written}"
    return CaptionTable(
        path=path,
        format=FORMATS_BY_SUFFIX.get(path.suffix.lower(), strategy),
        filename_column=fields.get("filename_column"),
        caption_columns=tuple(columns),
        fallback_column=fields.get("fallback_caption_column"),
        url=url,
    )
