"""The description of one image of a dataset: its caption, its bucket and its crop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from simpletuner.config.model_families import BUCKET_ALIGNMENT_PX, DEFAULT_FAMILY
from simpletuner.config.schema import RunConfig
from simpletuner.data.geometry import ImageSize, ResizeCropConfig
from simpletuner.server.caption_files import read_caption
from simpletuner.server.schemas.datasets import DatasetItem

if TYPE_CHECKING:
    from simpletuner.server.image_index import ImageIndex

ALIGNMENT_PX = BUCKET_ALIGNMENT_PX[DEFAULT_FAMILY]

DEFAULT_SEED: int = RunConfig().training.seed


@dataclass(frozen=True)
class CropSettings:
    """Resize and crop settings. seed: the seed of the run, used by crop_style "random"."""

    framing: ResizeCropConfig = field(default_factory=ResizeCropConfig)
    seed: int = DEFAULT_SEED


def build_item(index: ImageIndex, file: str, crop_settings: CropSettings) -> DatasetItem:
    """Return the description of one image with its bucket and crop."""
    from simpletuner.data.crop_assignment import assign_bucket

    image = index.images.get(file)
    row = index.refresh_row(image) if image is not None else None
    if image is None or row is None:
        reason = index.rejected_names.get(file, "this file no longer exists")
        return DatasetItem(
            file=file,
            width_px=0,
            height_px=0,
            captions=[],
            caption_text=None,
            refused=reason,
            bucket_px=None,
            crop_px=None,
            excluded=file in index.choices.excluded,
            crop_box=None,
        )
    box = index.choices.boxes.get(file)
    window = None
    crop = None
    if row.problem is None:
        sample_id = f"{index.dataset.id}/{file}"
        resize, corner, window = assign_bucket(
            crop_settings.framing, row.size_px, sample_id, crop_settings.seed, ALIGNMENT_PX, box
        )
        crop = _crop_in_image(row.size_px, resize, corner, window)
    return DatasetItem(
        file=file,
        width_px=row.size_px[0],
        height_px=row.size_px[1],
        captions=list(row.captions),
        caption_text=read_caption(image.caption_path) if row.stamps[:2] != (0, 0) else None,
        refused=row.problem,
        bucket_px=window,
        crop_px=crop,
        excluded=file in index.choices.excluded,
        crop_box=box,
    )


def _crop_in_image(
    size: ImageSize, resize: ImageSize, corner: ImageSize, window: ImageSize
) -> tuple[int, int, int, int]:
    """Return the crop (left, top, width, height) in pixels of the original image, rounded."""
    first = [round(corner[at] * size[at] / resize[at]) for at in (0, 1)]
    last = [round((corner[at] + window[at]) * size[at] / resize[at]) for at in (0, 1)]
    return first[0], first[1], max(1, last[0] - first[0]), max(1, last[1] - first[1])
