"""Detect what a generated image shows, from its pixels by geometry, without a model or the prompt.

The background is the colour of the border; objects are connected regions that differ from it. The
colour of an object is that of its inside, its size that of its bounding box. Its shape is the one
whose outline, rendered with the same area over the same centroid, covers it best. The centre of
that outline is its position (the bounding box of a heart would be too low).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from simpletuner.validation.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    PAIR_SPREAD,
    POSITIONS,
    SHAPES,
    SIDE_PX,
    SUPERSAMPLING,
    Point,
    Rgb,
    SceneObject,
    object_mask,
)

BORDER_PX = 5
# RGB distance from the background at which an object begins; a white stripe on cream has 52.
MIN_BACKGROUND_DISTANCE = 34.0
# The RGB distance that three quarters of an object have at least; rendered objects have 80.
MIN_OBJECT_CONTRAST = 60.0
MIN_OBJECT_AREA = 0.008  # fraction of the image; the smallest rendered object has 0.019
# Overlap with the best outline, else the shape is "none". With edges that are off by 2 px a thin
# ring still has 0.65.
MIN_SHAPE_OVERLAP = 0.55
MAX_POSITION_DISTANCE = 0.14  # fraction of the side; farther from every position there is none
# Half of the longer side of the bounding box, as a fraction of the image side.
BIG_MIN_HALF_SIDE = 0.202
TOUCHING_MIN_HALF_SIDE = 0.35  # the same; a longer region is two objects that touch
ANGLES = (-0.05, 0.0, 0.05)


@dataclass(frozen=True)
class DetectedObject:
    """One object. centre: of the outline of its shape, as fractions of the image side."""

    shape: str
    colour: str
    size: str
    position: str
    centre: Point


@dataclass(frozen=True)
class DetectedScene:
    """The content of an image. objects: the largest first."""

    background: str
    objects: tuple[DetectedObject, ...]


def detect_scene(image: Image.Image, shapes: tuple[str, ...] = tuple(SHAPES)) -> DetectedScene:
    """Return the content of an RGB image of SIDE_PX x SIDE_PX. shapes: those it may have.

    Raises ValueError for an image of another size.
    """
    if image.size != (SIDE_PX, SIDE_PX):
        raise ValueError(f"the image must have {SIDE_PX} x {SIDE_PX} px, not {image.size}")
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    background = background_colour(pixels)
    distance = np.linalg.norm(pixels - background, axis=2)
    masks = [
        part
        for mask in connected_regions(close_gaps(distance > MIN_BACKGROUND_DISTANCE))
        for part in split_touching(mask)
    ]
    objects = [
        _detect_object(pixels, distance, mask, shapes)
        for mask in masks
        if _is_object(distance, mask)
    ]
    return DetectedScene(nearest_colour(background, BACKGROUNDS), tuple(objects))


def nearest_colour(rgb: np.ndarray, names: dict[str, Rgb]) -> str:
    """Return the name of the colour with the smallest RGB distance."""
    return min(names, key=lambda name: float(np.linalg.norm(rgb - np.array(names[name]))))


def background_colour(pixels: np.ndarray) -> np.ndarray:
    """Return the dominant colour of the border: the mean of the pixels near its median."""
    is_border = np.ones(pixels.shape[:2], dtype=bool)
    is_border[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = False
    border = pixels[is_border]
    median: np.ndarray = np.median(border, axis=0)
    near = np.linalg.norm(border - median, axis=1) < MIN_BACKGROUND_DISTANCE
    mean: np.ndarray = border[near].mean(axis=0) if near.any() else median
    return mean


def close_gaps(mask: np.ndarray, size: int = 3) -> np.ndarray:
    """Fill gaps narrower than `size` px, where the edge of a stripe has the background's colour."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    closed = image.filter(ImageFilter.MaxFilter(size)).filter(ImageFilter.MinFilter(size))
    return np.asarray(closed) > 0


def erode(mask: np.ndarray, size: int = 5) -> np.ndarray:
    """Return the inside of a mask, (size - 1) / 2 px from its edge.

    Where fewer than 12 pixels remain, the mask itself is returned.
    """
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    inside = np.asarray(image.filter(ImageFilter.MinFilter(size))) > 0
    return inside if inside.sum() >= 12 else mask


def connected_regions(mask: np.ndarray) -> list[np.ndarray]:
    """Return masks of the connected regions, the largest first.

    Each row is split into runs of pixels, and runs that touch a run of the row above are joined.
    """
    runs: list[tuple[int, int, int]] = []
    parents: list[int] = []
    above: list[int] = []
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], row.astype(np.int8), [0]))))
        here = []
        for start, stop in zip(edges[::2], edges[1::2]):
            here.append(len(runs))
            runs.append((y, int(start), int(stop)))
            parents.append(here[-1])
            for other in above:
                if runs[other][1] <= stop and start <= runs[other][2]:
                    parents[_find_root(parents, other)] = _find_root(parents, here[-1])
        above = here
    masks: dict[int, np.ndarray] = {}
    for number, (y, start, stop) in enumerate(runs):
        masks.setdefault(_find_root(parents, number), np.zeros_like(mask))[y, start:stop] = True
    return sorted(masks.values(), key=lambda region: -int(region.sum()))


def _find_root(parents: list[int], number: int) -> int:
    while parents[number] != number:
        number = parents[number]
    return number


def bounding_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom as fractions of the image side."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    side = len(mask)
    return columns[0] / side, rows[0] / side, (columns[-1] + 1) / side, (rows[-1] + 1) / side


def split_touching(mask: np.ndarray) -> list[np.ndarray]:
    """Cut two objects that touch at the narrowest place of the middle fifth of the image."""
    left, top, right, bottom = bounding_box(mask)
    if max(right - left, bottom - top) / 2 < TOUCHING_MIN_HALF_SIDE:
        return [mask]
    axis = 0 if right - left > bottom - top else 1
    start, stop = round(0.4 * len(mask)), round(0.6 * len(mask))
    cut = start + int(np.argmin(mask.sum(axis=axis)[start:stop]))
    first, second = mask.copy(), mask.copy()
    if axis == 0:
        first[:, cut:], second[:, :cut] = False, False
    else:
        first[cut:], second[:cut] = False, False
    return [part for part in (first, second) if part.any()]


def _is_object(distance: np.ndarray, mask: np.ndarray) -> bool:
    """Return whether a region is large enough, and distinct enough from the background."""
    return bool(
        mask.mean() >= MIN_OBJECT_AREA and np.percentile(distance[mask], 75) >= MIN_OBJECT_CONTRAST
    )


def _detect_object(
    pixels: np.ndarray, distance: np.ndarray, mask: np.ndarray, shapes: tuple[str, ...]
) -> DetectedObject:
    # A blurred edge is where the colour is half way to the background.
    weakest = float(np.percentile(distance[erode(mask)], 10))
    sharp = mask & (distance > max(MIN_BACKGROUND_DISTANCE, weakest / 2))
    left, top, right, bottom = bounding_box(sharp)
    shape, overlap, centre = max(match_outlines(sharp, shapes), key=lambda fit: fit[1])
    return DetectedObject(
        shape=shape if overlap >= MIN_SHAPE_OVERLAP else "none",
        colour=classify_colour(pixels, sharp),
        size="big" if max(right - left, bottom - top) / 2 >= BIG_MIN_HALF_SIDE else "small",
        position=classify_position(centre),
        centre=centre,
    )


def classify_position(centre: Point) -> str:
    """Return the nearest position, of a single object or of a pair, which is farther out."""

    def distance(name: str) -> float:
        x, y = POSITIONS[name]
        return min(
            math.dist(centre, (0.5 + spread * (x - 0.5), 0.5 + spread * (y - 0.5)))
            for spread in (1.0, PAIR_SPREAD)
        )

    nearest = min(POSITIONS, key=distance)
    return nearest if distance(nearest) <= MAX_POSITION_DISTANCE else "none"


def classify_colour(pixels: np.ndarray, mask: np.ndarray) -> str:
    """Return the name of the inside's colour, measured where no stripe or dot can be."""
    inside = erode(mask)
    plain = inside & unpatterned_mask(len(mask))
    measured = plain if plain.sum() >= 12 else inside
    return nearest_colour(np.median(pixels[measured], axis=0), COLOURS)


def unpatterned_mask(side_px: int) -> np.ndarray:
    """Return the pixels between the marks; every rendered image has them on the same grid."""
    side = side_px * SUPERSAMPLING
    step = side // 11
    y = (np.arange(side_px) * SUPERSAMPLING + SUPERSAMPLING // 2) % step
    rows = (y > step // 2 + SUPERSAMPLING) & (y < step - SUPERSAMPLING)
    below_dots = y > step // 2 + step // 4
    return np.broadcast_to((rows & below_dots)[:, None], (side_px, side_px))


def match_outlines(mask: np.ndarray, shapes: tuple[str, ...]) -> Iterator[tuple[str, float, Point]]:
    """Yield every shape with its outline's intersection over union with the mask, and its centre.

    The outline has the mask's area and centroid.
    """
    x, y = centroid(mask)
    for shape in shapes:
        for angle in ANGLES:
            area, (unit_x, unit_y) = unit_area_and_centroid(shape, angle)
            radius = math.sqrt(mask.mean() / area)
            centre = (x - radius * unit_x, y - radius * unit_y)
            outline = outline_mask(shape, radius, centre, angle, len(mask))
            yield shape, float((mask & outline).sum() / (mask | outline).sum()), centre


@lru_cache(maxsize=(len(SHAPES) + 1) * len(ANGLES))
def unit_area_and_centroid(shape: str, angle: float) -> tuple[float, Point]:
    """Return area and centroid of the shape with radius 1 around the origin."""
    mask = outline_mask(shape, 0.25, (0.5, 0.5), angle, 256)
    x, y = centroid(mask)
    return float(mask.mean()) / 0.25**2, ((x - 0.5) / 0.25, (y - 0.5) / 0.25)


def centroid(mask: np.ndarray) -> Point:
    """Return the mean position (x, y) of the mask, as fractions of the image side."""
    rows, columns = np.nonzero(mask)
    return float(columns.mean() + 0.5) / len(mask), float(rows.mean() + 0.5) / len(mask)


def outline_mask(shape: str, radius: float, centre: Point, angle: float, side: int) -> np.ndarray:
    """Return the mask of a shape, rendered with the antialiasing of the training images."""
    item = SceneObject(shape, "", "", "", "plain", (0, 0, 0), radius, centre, angle)
    mask = object_mask(item, side * SUPERSAMPLING)
    return np.asarray(mask.resize((side, side), Image.Resampling.BOX)) > 127
