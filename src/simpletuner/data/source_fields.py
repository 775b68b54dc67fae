"""Fields of a dataset whose images are not in a folder of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpletuner.config.option import OptionSection, option
from simpletuner.config.option_catalog import Option, section_options

# Read this file as a table: name, type and default; one sentence of help.

TABLE_TYPES = ("csv", "jsonl", "parquet")
SOURCE_TYPES = ("local", "webdataset", "aws", "huggingface", "webshart", *TABLE_TYPES)


class SourceFields(OptionSection):
    """Fields of a location, and of the columns of a table."""

    aws_bucket_name: str = option("", "Bucket of the images, for type aws.")
    aws_data_prefix: str = option("", "Folder of the images in the bucket.")
    aws_region_name: str = option("", "Region of the bucket.")
    aws_endpoint_url: str = option("", "Address of an S3 service that is not Amazon's.")
    aws_access_key_id: str = option("", "Access key; {env:NAME} reads it from the environment.")
    aws_secret_access_key: str = option("", "Secret key; {env:NAME} reads it from the environment.")
    table: str = option(
        "", "Table whose rows are the images, for type csv, jsonl or parquet: a path or a URL."
    )
    csv_file: str = option("", "Alias for table, with type csv.")
    csv_url_column: str = option("", "Alias for image_column, with type csv.")
    csv_caption_column: str = option("", "Alias for caption_column, with type csv.")
    image_column: str = option(
        "", "Column of the images: URLs, paths, or the image files themselves."
    )
    caption_column: str | list[str] | None = option(
        None, "Column of the captions, or a list of columns; each is an alternative."
    )
    fallback_caption_column: str = option(
        "", "Column that is read where the captions of a row are empty."
    )
    width_column: str = option("", "Column of the widths in px; without it images are read.")
    height_column: str = option("", "Column of the heights in px.")
    weight_column: str = option(
        "", "Column that says how often an image is used, relative to the others; 0 is never."
    )
    dataset_name: str = option("", "Dataset of the Hugging Face Hub: owner/name.")
    dataset_subset: str = option("", "Subset (configuration) of a hub dataset.")
    split: str = option("train", "Split of a hub dataset.")
    revision: str = option("", "Branch, tag or commit of a hub dataset.")
    subfolder: str = option("", "Folder of a hub dataset; files outside of it are not read.")
    streaming: bool = option(
        False, "Read parts of the parquet files from the hub instead of copying them first."
    )
    huggingface: dict[str, Any] | None = option(
        None, "SimpleTuner's block of columns and filters of a hub dataset."
    )
    source: str = option("", "Hub dataset of tar files, for type webshart: owner/name.")


SOURCE_FIELDS: Mapping[str, Option] = section_options("dataset", SourceFields)
STORE_KEYS = (
    "aws_region_name",
    "aws_endpoint_url",
    "aws_access_key_id",
    "aws_secret_access_key",
)
COLUMN_FIELDS = (
    "image_column",
    "caption_column",
    "fallback_caption_column",
    "width_column",
    "height_column",
    "weight_column",
)
HUB_FIELDS = ("dataset_subset", "split", "revision", "subfolder", "streaming")
# The fields that have an effect, by type.
FIELDS_BY_TYPE: Mapping[str, tuple[str, ...]] = {
    "local": STORE_KEYS,
    "webdataset": STORE_KEYS,
    "aws": ("aws_bucket_name", "aws_data_prefix", *STORE_KEYS),
    "huggingface": ("dataset_name", "huggingface", *HUB_FIELDS, *COLUMN_FIELDS),
    "webshart": ("source", *HUB_FIELDS),
    "csv": ("table", "csv_file", "csv_url_column", "csv_caption_column", *COLUMN_FIELDS),
    "jsonl": ("table", *COLUMN_FIELDS),
    "parquet": ("table", *COLUMN_FIELDS),
}
FIELDS_BY_TYPE = {
    name: fields + STORE_KEYS if name in TABLE_TYPES else fields
    for name, fields in FIELDS_BY_TYPE.items()
}
