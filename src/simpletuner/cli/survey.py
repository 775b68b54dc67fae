"""The pictures of a folder at a glance: how many, with which captions, in which sizes and buckets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset import Dataset
from simpletuner.data.geometry import Framing, Size, bucket
from simpletuner.data.scan import scan
from simpletuner.errors import DataError

ALIGNMENT_PX = 64
BUCKETS_SHOWN = 6


@dataclass(frozen=True)
class Survey:
    """folder: absolute. sizes: one a usable picture. captioned: how many. sample: a caption."""

    folder: Path
    sizes: tuple[Size, ...]
    captioned: int
    sample: str
    unusable: int

    @property
    def captions(self) -> str:
        return "all" if self.captioned == len(self.sizes) else "some" if self.captioned else "none"

    @property
    def side_px(self) -> float:
        """Of the square of the middle picture's area."""
        return median((width * height) ** 0.5 for width, height in self.sizes)

    @property
    def told(self) -> str:
        small, large = (pick(self.sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
        bad = f" {self.unusable} files cannot be used." if self.unusable else ""
        return (
            f"{len(self.sizes)} pictures, {self.captioned} with captions, from {small[0]}x{small[1]} to "
            f"{large[0]}x{large[1]} px.{bad}"
        )

    def buckets(self, resolution: float, resolution_type: str) -> str:
        framing = Framing(resolution=resolution, resolution_type=resolution_type)
        found = Counter(bucket(framing, size, ALIGNMENT_PX) for size in self.sizes)
        most = ", ".join(f"{size[0]}x{size[1]}: {count}" for size, count in found.most_common(BUCKETS_SHOWN))
        more = f" and {len(found) - BUCKETS_SHOWN} more" if len(found) > BUCKETS_SHOWN else ""
        return f"Trained in {len(found)} buckets: {most}{more}."


def look(folder: Path) -> Survey:
    """Headers and captions are read, nothing is decoded. Raises DataError: no folder, no usable picture."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    folder = folder.resolve()
    options = DataOptions(missing_caption="empty", max_bad_sample_fraction=1.0)
    found = scan([Dataset("pictures", "image", folder)], options, 0, lambda event: None)
    said = [caption for one in found.placed for caption in one.sample.captions[:1] if caption]
    sizes = tuple((one.sample.width_px, one.sample.height_px) for one in found.placed)
    return Survey(folder, sizes, len(said), said[0] if said else "", len(found.rejected))
