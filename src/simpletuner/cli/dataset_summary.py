"""The pictures of a folder at a glance: how many, with which captions, in which sizes and buckets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.geometry import ImageSize, ResizeCropConfig, bucket_size
from simpletuner.data.scan import scan_datasets
from simpletuner.errors import DataError

ALIGNMENT_PX = 64
MAX_BUCKETS_LISTED = 6


@dataclass(frozen=True)
class DatasetSummary:
    """folder: absolute. sizes: one a usable picture. captioned: how many. sample: a caption."""

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
        """Of the square of the middle picture's area."""
        return median((width * height) ** 0.5 for width, height in self.sizes_px)

    @property
    def text(self) -> str:
        small, large = (
            pick(self.sizes_px, key=lambda size: size[0] * size[1]) for pick in (min, max)
        )
        bad = f" {self.unusable_count} files cannot be used." if self.unusable_count else ""
        return (
            f"{len(self.sizes_px)} pictures, {self.captioned_count} with captions, from "
            f"{small[0]}x{small[1]} to {large[0]}x{large[1]} px.{bad}"
        )

    def describe_buckets(self, resolution: float, resolution_type: str) -> str:
        framing = ResizeCropConfig(resolution=resolution, resolution_type=resolution_type)
        found = Counter(bucket_size(framing, size, ALIGNMENT_PX) for size in self.sizes_px)
        most = ", ".join(
            f"{size[0]}x{size[1]}: {count}" for size, count in found.most_common(MAX_BUCKETS_LISTED)
        )
        more = (
            f" and {len(found) - MAX_BUCKETS_LISTED} more"
            if len(found) > MAX_BUCKETS_LISTED
            else ""
        )
        return f"Trained in {len(found)} buckets: {most}{more}."


def summarize_dataset(folder: Path) -> DatasetSummary:
    """Headers and captions are read, nothing is decoded. Raises DataError: no folder, no usable picture."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    folder = folder.resolve()
    options = DataOptions(missing_caption="empty", max_bad_sample_fraction=1.0)
    found = scan_datasets(
        [DatasetConfig("pictures", "image", folder)], options, 0, lambda event: None
    )
    said = [caption for one in found.samples for caption in one.sample.captions[:1] if caption]
    sizes = tuple((one.sample.width_px, one.sample.height_px) for one in found.samples)
    return DatasetSummary(folder, sizes, len(said), said[0] if said else "", len(found.rejected))
