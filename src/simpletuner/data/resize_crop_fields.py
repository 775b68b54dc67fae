"""The fields of a dataset about resizing and cropping, as the settings of geometry.py."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simpletuner.config.model_families import BUCKET_ALIGNMENT_PX, DEFAULT_FAMILY
from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_fields import ImageDatasetFields
from simpletuner.data.geometry import ImageSize, ResizeCropConfig
from simpletuner.errors import ConfigError

MAX_BUCKETS = 1000
MAX_SIDE_PX = 16384
MAX_FILE_BYTES = 1 << 20
SIZE_TEXT = re.compile(r"(\d{1,5})\s*[xX]\s*(\d{1,5})")


def read_resolution_buckets(
    value: str | list[Any] | Mapping[str, Any] | None, resolve: Callable[[str], Path]
) -> tuple[ImageSize, ...]:
    """Return the sizes: of a list, of SimpleTuner's object of ratios and sizes, or of a file.

    resolve: from the written path to the .json file. Raises ConfigError with what is wrong.
    """
    if not value:
        return ()
    if isinstance(value, str):
        value = _read_json(resolve(value))
    entries = list(value.values()) if isinstance(value, Mapping) else value
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_BUCKETS:
        raise ConfigError(f'must be a list of 1 to {MAX_BUCKETS} sizes such as "832x1216"')
    return tuple(dict.fromkeys(_read_size(entry) for entry in entries))


def _read_size(entry: Any) -> ImageSize:
    match = SIZE_TEXT.fullmatch(entry.strip()) if isinstance(entry, str) else None
    sides = [int(side) for side in match.groups()] if match is not None else entry
    step = BUCKET_ALIGNMENT_PX[DEFAULT_FAMILY]
    if (
        not isinstance(sides, list)
        or len(sides) != 2
        or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
        or not all(step <= side <= MAX_SIDE_PX and side % step == 0 for side in sides)
    ):
        raise ConfigError(
            f"{json.dumps(entry)} is not a size: width and height, multiples of {step} px up to "
            f'{MAX_SIDE_PX}, such as "832x1216"'
        )
    return sides[0], sides[1]


def _read_json(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
        if len(text) > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB")
        return json.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error


def build_resize_crop(
    kind: str, fields: ImageDatasetFields, own: DataOptions, buckets: tuple[ImageSize, ...]
) -> ResizeCropConfig:
    """Return the settings.

    kind: dataset_type. own: the options of the run with the dataset's. buckets: resolution_buckets.
    """
    style_counts = fields.crop or "crop_style" in fields.model_fields_set
    varies = fields.crop and "random" in (fields.crop_style, fields.crop_aspect)
    shared_names = {item.name for item in dataclasses.fields(ResizeCropConfig)}
    return ResizeCropConfig(
        crop=fields.crop,
        crop_style=fields.crop_style if kind != "eval" and style_counts else "center",
        crop_aspect=fields.crop_aspect,
        max_upscale_threshold=fields.max_upscale_threshold,
        crop_aspect_buckets=tuple(fields.crop_aspect_buckets or ()),
        resolution_buckets=buckets,
        crops_per_image=fields.crops_per_image if kind != "eval" and varies else 1,
        train_batch_size=fields.train_batch_size,
        **own.model_dump(include=shared_names),
    )
