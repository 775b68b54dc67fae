"""Masks of images: which file is the mask of an image, and its values on the latent grid.

White is trained and black is not; levels of grey are weights between. A mask is in a dataset of its
own, in `photo.mask.png` next to `photo.png`, or in the alpha channel of the image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from posixpath import splitext
from typing import TYPE_CHECKING

from PIL import Image

from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.geometry import ASPECT_TOLERANCE
from simpletuner.data.image_files import MASK_ENDING, ImageFile, find_image_files
from simpletuner.data.pixels import (
    SIXTEEN_BIT_MODES,
    ImageHeader,
    open_upright,
    read_image_header,
    to_eight_bits,
)
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.remote_store import RemoteStore
from simpletuner.data.sample_types import BucketedSample, RejectedFile, SampleMask
from simpletuner.errors import DataError
from simpletuner.events.event_types import Emit
from simpletuner.events.formatting import count_of

if TYPE_CHECKING:
    import numpy as np


def find_masks(
    dataset: DatasetConfig, images: Sequence[ImageFile], store: RemoteStore | None, emit: Emit
) -> tuple[list[ImageFile], list[RejectedFile], list[str]]:
    """Return the images with their masks, those whose mask is missing, and notices.

    An image must have a mask where the dataset names a dataset of masks, and may have one next to
    it otherwise. store: as in find_image_files. Raises DataError for a dataset of masks without a
    file.
    """
    beside = sum(image.mask is not None for image in images)
    if dataset.dataset_type == "eval" or dataset.alpha_mask:
        notice = f"{dataset.id}: {count_of(beside, 'mask')} next to images not used"
        own = SampleMask(None, "alpha") if dataset.alpha_mask else None
        return [replace(image, mask=own) for image in images], [], [notice] if beside else []
    if dataset.masks is None:
        return list(images), [], []
    return _match_masks(dataset.masks, images, store, emit)


def _match_masks(
    masks: DatasetConfig, images: Sequence[ImageFile], store: RemoteStore | None, emit: Emit
) -> tuple[list[ImageFile], list[RejectedFile], list[str]]:
    """Match by the path without its suffix, else by the name alone where that is unique."""
    files, misnamed, _, _ = find_image_files(masks, store, emit)
    if not files:
        raise DataError(f"{masks.id}: no masks in {masks.address}")
    by_path = {splitext(file.relative_path)[0].removesuffix(MASK_ENDING): file for file in files}
    names = Counter(path.rpartition("/")[2] for path in by_path)
    by_name = {path.rpartition("/")[2]: file for path, file in by_path.items()}
    matched, missing, used = [], list[RejectedFile](), set[str]()
    for image in images:
        path = splitext(image.relative_path)[0]
        name = path.rpartition("/")[2]
        # A name in two folders could be the mask of another image.
        file = by_path.get(path) or (by_name[name] if names[name] == 1 else None)
        if file is None:
            detail = f"{masks.id} has no mask named {name}"
            missing.append(
                RejectedFile(image.relative_path, image.dataset.id, "mask_missing", detail)
            )
        else:
            used.add(file.relative_path)
            matched.append(replace(image, mask=SampleMask(file.file, "luminance")))
    spare = len(files) - len(used) + len(misnamed)
    notice = f"{masks.id}: {count_of(spare, 'mask')} without an image"
    return matched, missing, [notice] if spare else []


def check_mask(
    mask: SampleMask | None, image: ImageHeader, max_megapixels: float
) -> SampleMask | None:
    """Return the mask of an image after reading its header; None for one without transparency.

    Raises UnusableFile if the mask cannot be read or has another aspect ratio.
    """
    if mask is None or mask.file is None:
        return mask if image.has_alpha else None
    try:
        width, height = read_image_header(mask.file, max_megapixels).size_px
    except UnusableFile as error:
        raise UnusableFile("mask_unreadable", f"its mask {mask.file.name}: {error}") from error
    if abs(width * image.size_px[1] / (height * image.size_px[0]) - 1) > ASPECT_TOLERANCE:
        raise UnusableFile(
            "mask_size",
            f"its mask {mask.file.name} is {width}x{height} px and the image is "
            f"{image.size_px[0]}x{image.size_px[1]}; a mask has the size of its image, or the same "
            "aspect ratio",
        )
    return mask


def load_mask(placed: BucketedSample, stride_px: int) -> np.ndarray:
    """Return the mask of a sample on its latent grid, (H, W) float32 in [0, 1].

    It is resized and cropped exactly as its image is; each cell has the mean of the stride_px x
    stride_px pixels that it stands for. Colours count by their luminance, transparent parts of a
    mask file as black. Raises UnusableFile for a damaged file, and for a mask that is black within
    the crop.
    """
    import numpy as np

    sample, mask = placed.sample, placed.sample.mask
    assert mask is not None
    try:
        image = open_upright(mask.file or sample.file)
    except UnusableFile as error:
        raise UnusableFile("mask_damaged", f"its mask: {error}") from error
    # BOX is the mean of the pixels, so the weight of a cell is the part of it that is white.
    grey = _levels(image, mask.channel).resize(placed.resize_px, Image.Resampling.BOX)
    left, top = placed.crop_px
    width, height = placed.bucket_px
    pixels = np.asarray(grey.crop((left, top, left + width, top + height)), dtype=np.float64)
    cells = pixels.reshape(height // stride_px, stride_px, width // stride_px, stride_px)
    levels: np.ndarray = (cells.mean(axis=(1, 3)) / 255).astype(np.float32)
    if not levels.any():
        raise UnusableFile(
            "mask_black", "its mask is black where the image is cropped, so nothing is trained"
        )
    return levels


def _levels(image: Image.Image, channel: str) -> Image.Image:
    """Return the levels of a mask, mode L."""
    if channel == "alpha":
        return image.convert("RGBA").getchannel("A")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        # Black below transparent pixels, whose own colours are never seen.
        opaque = Image.new("RGB", image.size)
        opaque.paste(image, mask=image.getchannel("A"))
        return opaque.convert("L")
    if image.mode in SIXTEEN_BIT_MODES:
        image = to_eight_bits(image)
    return image.convert("L")


def masked_count_notices(placed: Iterable[BucketedSample]) -> list[str]:
    """Return one notice for each dataset with masks: how many of its images have one."""
    total = Counter[str]()
    masked = Counter[str]()
    for item in placed:
        total[item.sample.dataset] += 1
        masked[item.sample.dataset] += item.sample.mask is not None
    return [
        f"{name}: masks for {count} of {count_of(total[name], 'image')}"
        for name, count in sorted(masked.items())
        if count
    ]
