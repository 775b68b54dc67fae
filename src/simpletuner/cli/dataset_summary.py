"""Summary of an image folder: how many images, their captions, sizes and buckets."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from simpletuner.config.model_families import BUCKET_ALIGNMENT_PX, DEFAULT_FAMILY
from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.geometry import ImageSize, ResizeCropConfig, bucket_size
from simpletuner.data.scan import scan_datasets
from simpletuner.errors import DataError
from simpletuner.events.formatting import count_of

ALIGNMENT_PX = BUCKET_ALIGNMENT_PX[DEFAULT_FAMILY]
MAX_BUCKETS_LISTED = 6


@dataclass(frozen=True)
class DatasetSummary:
    """Summary of a folder.

    folder: absolute. sizes_px: one per usable image. captioned_count: images with a caption.
    example_caption: one of the captions.
    """

    folder: Path
    sizes_px: tuple[ImageSize, ...]
    captioned_count: int
    example_caption: str
    unusable_count: int

    @property
    def caption_coverage(self) -> str:
        return (
            "all"
            if self.captioned_count == len(self.sizes_px)
            else "some"
            if self.captioned_count
            else "none"
        )

    @property
    def median_side_px(self) -> float:
        """The side of a square with the median area."""
        return median(math.sqrt(width * height) for width, height in self.sizes_px)

    @property
    def text(self) -> str:
        small, large = (
            pick(self.sizes_px, key=lambda size: size[0] * size[1]) for pick in (min, max)
        )
        bad = (
            f" {count_of(self.unusable_count, 'file')} cannot be used."
            if self.unusable_count
            else ""
        )
        return (
            f"{count_of(len(self.sizes_px), 'image')}, {self.captioned_count} with captions, from "
            f"{small[0]}x{small[1]} to {large[0]}x{large[1]} px.{bad}"
        )

    def describe_buckets(self, resolution: float, resolution_type: str) -> str:
        framing = ResizeCropConfig(resolution=resolution, resolution_type=resolution_type)
        image_counts = Counter(bucket_size(framing, size, ALIGNMENT_PX) for size in self.sizes_px)
        most = ", ".join(
            f"{size[0]}x{size[1]} ({count_of(count, 'image')})"
            for size, count in image_counts.most_common(MAX_BUCKETS_LISTED)
        )
        more = (
            f" and {len(image_counts) - MAX_BUCKETS_LISTED} more"
            if len(image_counts) > MAX_BUCKETS_LISTED
            else ""
        )
        return f"{count_of(len(image_counts), 'bucket')}: {most}{more}."


def summarize_dataset(folder: Path) -> DatasetSummary:
    """Read headers and captions of a folder; nothing is decoded.

    Raises DataError if there is no such folder or no usable image.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    folder = folder.resolve()
    options = DataOptions(missing_caption="empty", max_bad_sample_fraction=1.0)
    scanned = scan_datasets(
        [DatasetConfig("images", "image", folder)], options, 0, lambda event: None
    )
    samples = [item.sample for item in scanned.samples]
    captions = [caption for sample in samples for caption in sample.captions[:1] if caption]
    sizes = tuple((sample.width_px, sample.height_px) for sample in samples)
    example = captions[0] if captions else ""
    return DatasetSummary(folder, sizes, len(captions), example, len(scanned.rejected))
