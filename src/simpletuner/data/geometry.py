"""Geometry of an image: bucket, resize and crop, from integers to integers.

Sizes are (width, height) in pixels, after EXIF orientation.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

ImageSize = tuple[int, int]
CropBox = tuple[int, int, int, int]  # left, top, width, height

ASPECT_TOLERANCE = 0.01  # by which the aspect ratio of a mask may differ from its image's
# Used by crop_aspect "closest" when crop_aspect_buckets is not given; width / height.
COMMON_RATIOS = (0.5, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2.0)


@dataclass(frozen=True)
class ResizeCropConfig:
    """Settings that resize and crop the images of a dataset, and divide its buckets into batches.

    Names and units are those of the dataset file. resolution and the three *_size fields have the
    unit of resolution_type: "pixel" is the shorter edge, "pixel_area" the edge of a square of the
    same area, "area" megapixels (10^6 pixels).

    crop false: the bucket has the image's own aspect ratio, whatever crop_aspect is. The image is
    resized to cover the bucket, and the few pixels beyond the alignment are trimmed; nothing is
    ever stretched. crop true: crop_aspect "square" crops squares, "preserve" is the same as crop
    false, "closest" takes the nearest ratio (by quotient) of crop_aspect_buckets, and "random" one
    of them for each crop. With resolution_buckets, "closest" and "random" choose among these sizes,
    (width, height) in px, and resolution only counts for the limits.

    crop_style chooses the window of the covering image: "center", "corner" (top left) or "random"
    (positions derived from the run's seed, the sample id and the number of the crop).
    crops_per_image: how many crops are used in turn, one at each use of the image.

    maximum_image_size with target_downsample_size: a larger image is first shrunk to the target,
    and the bucket is cropped out of that. All other images are resized to just cover their bucket.

    max_upscale_threshold: images that would be enlarged by more than this fraction are not used.

    train_batch_size: samples of one bucket that form a batch; None is that of the run.
    """

    resolution: float = 1024.0
    resolution_type: str = "pixel_area"
    crop: bool = False
    crop_style: str = "center"
    crop_aspect: str = "square"
    crop_aspect_buckets: tuple[float, ...] = ()
    resolution_buckets: tuple[ImageSize, ...] = ()
    crops_per_image: int = 1
    minimum_aspect_ratio: float = 0.25
    maximum_aspect_ratio: float = 4.0
    minimum_image_size: float | None = None
    maximum_image_size: float | None = None
    target_downsample_size: float | None = None
    max_upscale_threshold: float | None = None
    train_batch_size: int | None = None


def limit_in_pixels(value: float, resolution_type: str) -> int:
    """Return a size in pixels of the edge ("pixel") or in pixels of area (the other two)."""
    factor = {"pixel": 1.0, "pixel_area": value, "area": 1e6}[resolution_type]
    return round(value * factor)


def image_extent(size: ImageSize, resolution_type: str) -> int:
    """Return what a limit is compared with: the shorter edge or the area of the image."""
    return min(size) if resolution_type == "pixel" else size[0] * size[1]


def bucket_size(framing: ResizeCropConfig, size: ImageSize, alignment_px: int) -> ImageSize:
    """Return the size an image is trained at: multiples of alignment_px, at least one each.

    Each side is the ideal one (aspect ratio unchanged, area or shorter edge as configured) rounded
    to the nearest multiple, so it differs by at most half of alignment_px. The first of
    bucket_sizes.
    """
    return bucket_sizes(framing, size, alignment_px)[0]


def bucket_sizes(
    framing: ResizeCropConfig, size: ImageSize, alignment_px: int
) -> tuple[ImageSize, ...]:
    """Return the sizes an image may be trained at: one, or several with crop_aspect random."""
    listed = framing.resolution_buckets if framing.crop else ()
    is_random = framing.crop and framing.crop_aspect == "random"
    if listed:
        return listed if is_random else (_closest_bucket(listed, size),)
    kind = framing.resolution_type
    target = limit_in_pixels(framing.resolution, kind)
    aspects = _listed_aspects(framing) if is_random else [_target_aspect(framing, size)]
    sizes = (_scale_to_target(aspect, target, kind, alignment_px) for aspect in aspects)
    return tuple(dict.fromkeys(sizes))


def _closest_bucket(listed: tuple[ImageSize, ...], size: ImageSize) -> ImageSize:
    """Return the bucket of the nearest aspect ratio, by quotient.

    Of several with the same ratio, the largest that does not enlarge the image, else the smallest.
    """
    own = Fraction(*size)

    def rank(bucket: ImageSize) -> tuple[Fraction, bool, int]:
        ratio = Fraction(*bucket)
        area = bucket[0] * bucket[1]
        enlarges = bucket[0] > size[0] or bucket[1] > size[1]
        return max(ratio / own, own / ratio), enlarges, area if enlarges else -area

    return min(listed, key=rank)


def _scale_to_target(aspect: ImageSize, target: int, kind: str, step: int) -> ImageSize:
    """Return sides of this aspect ratio, rounded to the nearest multiples of step.

    target: the shorter edge or the area.
    """
    wide, high = aspect
    if kind == "pixel":
        shorter = min(aspect) * step
        sides = _round_division(target * wide, shorter), _round_division(target * high, shorter)
    else:
        sides = (
            _round_square_root(target * wide, high * step**2),
            _round_square_root(target * high, wide * step**2),
        )
    return max(1, sides[0]) * step, max(1, sides[1]) * step


def covering_size(size: ImageSize, window: ImageSize) -> ImageSize:
    """Return the smallest size with the image's own aspect ratio that covers the window."""
    width, height = size
    # Products of integers: a quotient in floating point may round to the wrong side.
    if window[0] * height >= window[1] * width:
        return window[0], _round_division(height * window[0], width)
    return _round_division(width * window[1], height), window[1]


def resized_size(framing: ResizeCropConfig, size: ImageSize, window: ImageSize) -> ImageSize:
    """Return the size to which the image is resized before the window is cropped."""
    kind = framing.resolution_type
    covering = covering_size(size, window)
    if framing.maximum_image_size is None or framing.target_downsample_size is None:
        return covering
    if image_extent(size, kind) <= limit_in_pixels(framing.maximum_image_size, kind):
        return covering
    shrunk = _scale_to_target(size, limit_in_pixels(framing.target_downsample_size, kind), kind, 1)
    return shrunk if shrunk[0] >= covering[0] and shrunk[1] >= covering[1] else covering


def crop_position(style: str, size: ImageSize, window: ImageSize, draw: int) -> tuple[int, int]:
    """Return (left, top) of the window inside an image that covers it.

    draw: 63 random bits, for "random".
    """
    loose = size[0] - window[0], size[1] - window[1]
    if style == "corner":
        return 0, 0
    if style == "random":
        # 31 of the 63 bits for each axis: so many that the remainder is even enough.
        return (draw & 0x7FFFFFFF) % (loose[0] + 1), (draw >> 31) % (loose[1] + 1)
    return loose[0] // 2, loose[1] // 2


def place_in_image(
    size: ImageSize, box: CropBox, resize: ImageSize, corner: tuple[int, int]
) -> tuple[ImageSize, tuple[int, int]]:
    """Return (resize, corner) of the whole image for those of a box in it.

    size: of the image. resize: that of the box. corner: (left, top) of the bucket in it. The scale
    is that of the box, so the bucket shows the same pixels, to half a pixel.
    """
    whole, place = [], []
    for axis in (0, 1):
        # Rounding must not leave the whole image smaller than the box in it.
        side = max(_round_division(size[axis] * resize[axis], box[2 + axis]), resize[axis])
        start = _round_division(box[axis] * resize[axis], box[2 + axis])
        whole.append(side)
        place.append(min(start, side - resize[axis]) + corner[axis])
    return (whole[0], whole[1]), (place[0], place[1])


def _target_aspect(framing: ResizeCropConfig, size: ImageSize) -> ImageSize:
    if not framing.crop or framing.crop_aspect == "preserve":
        return size
    if framing.crop_aspect == "square":
        return 1, 1
    own = Fraction(*size)
    return min(
        _listed_aspects(framing),
        key=lambda aspect: (
            max(Fraction(*aspect) / own, own / Fraction(*aspect)),
            Fraction(*aspect),
        ),
    )


def _listed_aspects(framing: ResizeCropConfig) -> list[ImageSize]:
    ratios = framing.crop_aspect_buckets or COMMON_RATIOS
    return [Fraction(ratio).limit_denominator(1000).as_integer_ratio() for ratio in ratios]


def _round_division(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def _round_square_root(numerator: int, denominator: int) -> int:
    """Return the square root of a fraction, rounded to the nearest integer, halves up."""
    # The root of four times the fraction is twice its root, so adding 1 and halving rounds it.
    return (isqrt(4 * numerator // denominator) + 1) // 2
