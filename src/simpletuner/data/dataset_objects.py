"""Fields of a dataset whose values have a structure of their own, or belong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from simpletuner.config.schema import DataOptions
from simpletuner.data.caption_table_field import read_table_field
from simpletuner.data.caption_variants import CaptionVariants
from simpletuner.data.dataset_config import ActivePeriod, CaptionTable
from simpletuner.data.dataset_fields import ImageDatasetFields
from simpletuner.data.geometry import ImageSize, ResizeCropConfig
from simpletuner.data.image_choices import ImageChoices, read_crop_boxes, read_excluded
from simpletuner.data.resize_crop_fields import build_resize_crop, read_resolution_buckets
from simpletuner.data.source_config import SourceConfig
from simpletuner.data.variation_fields import (
    read_active_period,
    read_caption_shuffle,
    read_filter_field,
)
from simpletuner.errors import ConfigError

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class DatasetObjects:
    """The values, checked; see DatasetConfig."""

    caption_table: CaptionTable | None
    caption_variants: CaptionVariants | None
    caption_filters: tuple[str, ...]
    active: ActivePeriod
    resize_crop: ResizeCropConfig
    choices: ImageChoices


def read_dataset_objects(
    kind: str,
    fields: ImageDatasetFields,
    own: DataOptions,
    source: SourceConfig,
    resolve: Callable[[str], Path],
    report: Callable[[str, ConfigError], None],
) -> DatasetObjects:
    """Return the values; a field with an error is reported and has no value.

    kind: dataset_type. own: the options of the run with the dataset's. source: of the images.
    resolve: from a written path to the file. report: takes the name of the field and what is wrong.
    """

    def attempt(key: str, read: Callable[[], ValueT], otherwise: ValueT) -> ValueT:
        try:
            return read()
        except ConfigError as error:
            report(key, error)
            return otherwise

    has_rows = source.table is not None
    strategy = "" if own.only_instance_prompt or has_rows else own.caption_strategy
    table, root = fields.caption_table, source.store.address if source.store is not None else ""
    shuffle = fields.caption_shuffle
    filters = fields.caption_filter_list
    sizes = fields.resolution_buckets
    no_sizes: tuple[ImageSize, ...] = ()
    buckets = attempt(
        "resolution_buckets", lambda: read_resolution_buckets(sizes, resolve), no_sizes
    )
    variants = attempt("caption_shuffle", lambda: read_caption_shuffle(shuffle), None)
    return DatasetObjects(
        attempt("caption_table", lambda: read_table_field(table, strategy, resolve, root), None),
        variants if kind == "image" else None,
        attempt("caption_filter_list", lambda: read_filter_field(filters, resolve), ()),
        attempt("end_step", lambda: read_active_period(fields), ActivePeriod()),
        build_resize_crop(kind, fields, own, buckets),
        ImageChoices(
            read_excluded(fields.exclude),
            attempt("crop_boxes", lambda: read_crop_boxes(fields.crop_boxes), ()),
        ),
    )
