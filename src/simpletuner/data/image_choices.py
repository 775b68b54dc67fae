"""Choices of a user about single images of a dataset; the files stay as they are."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simpletuner.data.geometry import CropBox, ImageSize
from simpletuner.data.rejections import UnusableFile
from simpletuner.errors import ConfigError

MAX_SIDE_PX = 1 << 20
# The whole image is enlarged with its box, so a smaller box would need too much memory.
MIN_BOX_FRACTION = 0.2


@dataclass(frozen=True)
class ImageChoices:
    """excluded: paths of images that are not used. boxes: (path, crop box) of other images.

    Paths are inside the dataset, POSIX, NFC.
    """

    excluded: tuple[str, ...] = ()
    boxes: tuple[tuple[str, CropBox], ...] = ()

    def box_by_path(self) -> dict[str, CropBox]:
        return dict(self.boxes)

    def describe_unknown(self, paths: Collection[str]) -> list[str]:
        """Return a notice for each field that names images which the dataset does not have."""
        named = {"exclude": self.excluded, "crop_boxes": [path for path, _ in self.boxes]}
        notices = []
        for field, names in named.items():
            unknown = [name for name in names if name not in paths]
            if unknown:
                count = "1 image" if len(unknown) == 1 else f"{len(unknown)} images"
                notices.append(
                    f"{field} names {count} that the dataset does not have: {unknown[0]}"
                )
        return notices


def read_excluded(paths: Sequence[str] | None) -> tuple[str, ...]:
    """Return the paths of the field `exclude`."""
    return tuple(dict.fromkeys(map(_normalize_path, paths or ())))


def read_crop_boxes(value: Mapping[str, Any] | None) -> tuple[tuple[str, CropBox], ...]:
    """Return the boxes of the field `crop_boxes`. Raises ConfigError for other values."""
    boxes: dict[str, CropBox] = {}
    for path, numbers in (value or {}).items():
        if not _is_box(numbers):
            raise ConfigError(
                f"{path!r}: {numbers!r} is not a box; write [left, top, width, height] as whole "
                "pixels"
            )
        boxes[_normalize_path(path)] = (numbers[0], numbers[1], numbers[2], numbers[3])
    return tuple(boxes.items())


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 4
        and all(type(number) is int and 0 <= number <= MAX_SIDE_PX for number in value)
        and min(value[2:]) >= 1
    )


def check_box(box: CropBox, size: ImageSize) -> None:
    """Raise UnusableFile for a box that is not inside the image, or too small a part of it."""
    left, top, width, height = box
    shown = f"the crop box {left}, {top}, {width} x {height}"
    if left + width > size[0] or top + height > size[1]:
        raise UnusableFile("crop_box", f"{shown} is not inside the image of {size[0]}x{size[1]}")
    if width < MIN_BOX_FRACTION * size[0] or height < MIN_BOX_FRACTION * size[1]:
        raise UnusableFile(
            "crop_box",
            f"{shown} is less than {MIN_BOX_FRACTION:.0%} of a side of the image of "
            f"{size[0]}x{size[1]}; crop the file itself",
        )


def _normalize_path(path: str) -> str:
    return unicodedata.normalize("NFC", path)
