"""Assignment of an image to its bucket, its resize and its crops."""

from __future__ import annotations

from simpletuner.data import geometry
from simpletuner.data.image_choices import check_box
from simpletuner.data.rejections import UnusableFile
from simpletuner.randomness import seed_at

Crop = tuple[geometry.ImageSize, tuple[int, int], geometry.ImageSize]


def assign_bucket(
    framing: geometry.ResizeCropConfig,
    size: geometry.ImageSize,
    sample_id: str,
    seed: int,
    alignment_px: int,
    box: geometry.CropBox | None = None,
) -> Crop:
    """Return the first crop of an image. Raises UnusableFile, see assign_crops."""
    return assign_crops(framing, size, sample_id, seed, alignment_px, box)[0]


def assign_crops(
    framing: geometry.ResizeCropConfig,
    size: geometry.ImageSize,
    sample_id: str,
    seed: int,
    alignment_px: int,
    box: geometry.CropBox | None = None,
) -> list[Crop]:
    """Return crops_per_image times resize_px, crop_px and bucket_px (see BucketedSample).

    box: the part of the image that is used as if it were the whole.

    With crop_aspect random the first crop has one of the sizes that do not enlarge the image too
    much, and each further crop has the next one. Raises UnusableFile if the image is outside the
    limits.
    """
    if box is not None:
        check_box(box, size)
        return [
            (*geometry.place_in_image(size, box, resize, corner), bucket)
            for resize, corner, bucket in assign_crops(
                framing, box[2:], sample_id, seed, alignment_px
            )
        ]
    _check_limits(framing, size)
    buckets = geometry.bucket_sizes(framing, size, alignment_px)
    sizes = [(geometry.resized_size(framing, size, bucket), bucket) for bucket in buckets]
    usable = [pair for pair in sizes if _enlargement_problem(framing, size, pair[0]) is None]
    if not usable:
        problem = _enlargement_problem(framing, size, sizes[0][0])
        raise UnusableFile("too_small", str(problem))
    first = seed_at(seed, "crop aspect", sample_id) if len(usable) > 1 else 0
    crops = []
    for number in range(framing.crops_per_image):
        resize, bucket = usable[(first + number) % len(usable)]
        # The first crop is addressed as it was before there were several, so that caches stay
        # valid.
        address = (sample_id, number) if number else (sample_id,)
        draw = seed_at(seed, "crop", *address)
        corner = geometry.crop_position(framing.crop_style, resize, bucket, draw)
        crops.append((resize, corner, bucket))
    return crops


def _check_limits(framing: geometry.ResizeCropConfig, size: tuple[int, int]) -> None:
    ratio = size[0] / size[1]
    if not framing.minimum_aspect_ratio <= ratio <= framing.maximum_aspect_ratio:
        raise UnusableFile(
            "aspect_ratio",
            f"{size[0]}x{size[1]} has aspect {ratio:.3g}; the limits are "
            f"{framing.minimum_aspect_ratio:g} and {framing.maximum_aspect_ratio:g}",
        )
    kind, least = framing.resolution_type, framing.minimum_image_size
    if least is not None and geometry.image_extent(size, kind) < geometry.limit_in_pixels(
        least, kind
    ):
        raise UnusableFile(
            "too_small", f"{size[0]}x{size[1]} is below minimum_image_size {least:g} ({kind})"
        )


def _enlargement_problem(
    framing: geometry.ResizeCropConfig, size: geometry.ImageSize, resize: geometry.ImageSize
) -> str | None:
    limit = framing.max_upscale_threshold
    growth = max(after / before for after, before in zip(resize, size)) - 1
    if limit is None or growth <= limit:
        return None
    return (
        f"{size[0]}x{size[1]} would be enlarged by {growth:.0%}, more than "
        f"max_upscale_threshold {limit:g}"
    )
