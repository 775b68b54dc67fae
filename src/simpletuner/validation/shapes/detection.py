"""What a drawn picture shows, read from its pixels by geometry: nothing is learned, no prompt is looked at.

The ground is the colour of the border; objects are connected regions that differ from it. Colour is that of
an object's inside, size that of its bounding box. Its shape is the one whose own outline, drawn with the same
area over the same centroid, covers it best; that outline's middle is its place (a heart's box lies low).
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
MIN_BACKGROUND_DISTANCE = (
    34.0  # RGB distance from the ground at which something begins; a white stripe on cream has 52
)
MIN_OBJECT_CONTRAST = 60.0  # the same, that most of an object has; drawn ones have 80
MIN_OBJECT_AREA = 0.008  # of the picture; the smallest drawn object has 0.019
MIN_SHAPE_OVERLAP = (
    0.55  # with the best outline, else "none". Edges that waver by 2 px leave a thin ring 0.65
)
MAX_POSITION_DISTANCE = 0.14  # of the side; an object farther from every place has none
BIG_MIN_HALF_SIDE = (
    0.202  # half of the longer side of the bounding box, in shares of the picture's side
)
TOUCHING_MIN_HALF_SIDE = 0.35  # the same; whatever is longer is two objects that touch
ANGLES = (-0.05, 0.0, 0.05)


@dataclass(frozen=True)
class DetectedObject:
    """One object. centre: the middle of its shape's outline."""

    shape: str
    colour: str
    size: str
    position: str
    centre: Point


@dataclass(frozen=True)
class DetectedScene:
    """things: the largest first."""

    background: str
    objects: tuple[DetectedObject, ...]


def detect_scene(picture: Image.Image, names: tuple[str, ...] = tuple(SHAPES)) -> DetectedScene:
    """picture: RGB, SIDE_PX square. names: the shapes it may hold."""
    if picture.size != (SIDE_PX, SIDE_PX):
        raise ValueError(
            f"a picture of {SIDE_PX} x {SIDE_PX} px is read, not one of {picture.size}"
        )
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    ground = background_colour(pixels)
    apart = np.linalg.norm(pixels - ground, axis=2)
    found = [
        part
        for mask in connected_regions(close_gaps(apart > MIN_BACKGROUND_DISTANCE))
        for part in split_touching(mask)
    ]
    things = [
        _detect_object(pixels, apart, mask, names) for mask in found if _is_object(apart, mask)
    ]
    return DetectedScene(nearest_colour(ground, BACKGROUNDS), tuple(things))


def nearest_colour(rgb: np.ndarray, names: dict[str, Rgb]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(rgb - np.array(names[name]))))


def background_colour(pixels: np.ndarray) -> np.ndarray:
    """The border's dominant colour: the mean of what is near its median."""
    inner = np.ones(pixels.shape[:2], dtype=bool)
    inner[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = False
    border = pixels[inner]
    middle = np.median(border, axis=0)
    near = np.linalg.norm(border - middle, axis=1) < MIN_BACKGROUND_DISTANCE
    return border[near].mean(axis=0) if near.any() else middle


def close_gaps(mask: np.ndarray, size: int = 3) -> np.ndarray:
    """Gaps narrower than `size` px are filled: where a stripe's edge crosses the ground's colour."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return (
        np.asarray(image.filter(ImageFilter.MaxFilter(size)).filter(ImageFilter.MinFilter(size)))
        > 0
    )


def erode(mask: np.ndarray, size: int = 5) -> np.ndarray:
    """The inside of a mask, (size - 1) / 2 px from its edge; the mask itself where that leaves nothing."""
    inside = (
        np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MinFilter(size)))
        > 0
    )
    return inside if inside.sum() >= 12 else mask


def connected_regions(mask: np.ndarray) -> list[np.ndarray]:
    """Masks of the connected regions, the largest first. Rows' runs are joined where they touch."""
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
    """Left, top, right, bottom in shares of the side."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    side = len(mask)
    return columns[0] / side, rows[0] / side, (columns[-1] + 1) / side, (rows[-1] + 1) / side


def split_touching(mask: np.ndarray) -> list[np.ndarray]:
    """Two objects that touch are cut at the narrowest place of the middle fifth."""
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


def _is_object(apart: np.ndarray, mask: np.ndarray) -> bool:
    """Large enough, and not a cloud in the ground."""
    return bool(
        mask.mean() >= MIN_OBJECT_AREA and np.percentile(apart[mask], 75) >= MIN_OBJECT_CONTRAST
    )


def _detect_object(
    pixels: np.ndarray, apart: np.ndarray, mask: np.ndarray, names: tuple[str, ...]
) -> DetectedObject:
    weakest = float(np.percentile(apart[erode(mask)], 10))
    sharp = mask & (
        apart > max(MIN_BACKGROUND_DISTANCE, weakest / 2)
    )  # half way to the ground is where a blurred edge is
    left, top, right, bottom = bounding_box(sharp)
    shape, overlap, centre = max(match_outlines(sharp, names), key=lambda fit: fit[1])
    return DetectedObject(
        shape=shape if overlap >= MIN_SHAPE_OVERLAP else "none",
        colour=classify_colour(pixels, sharp),
        size="big" if max(right - left, bottom - top) / 2 >= BIG_MIN_HALF_SIDE else "small",
        position=classify_position(centre),
        centre=centre,
    )


def classify_position(centre: Point) -> str:
    """The nearest place, of a single object or of one of a pair, which stands farther out."""

    def away(name: str) -> float:
        x, y = POSITIONS[name]
        return min(
            math.dist(centre, (0.5 + f * (x - 0.5), 0.5 + f * (y - 0.5)))
            for f in (1.0, PAIR_SPREAD)
        )

    best = min(POSITIONS, key=away)
    return best if away(best) <= MAX_POSITION_DISTANCE else "none"


def classify_colour(pixels: np.ndarray, mask: np.ndarray) -> str:
    """The name of the inside's colour, where neither stripes nor dots are ever painted."""
    inside = erode(mask)
    bare = inside & unpatterned_mask(len(mask))
    chosen = bare if bare.sum() >= 12 else inside
    return nearest_colour(np.median(pixels[chosen], axis=0), COLOURS)


def unpatterned_mask(side_px: int) -> np.ndarray:
    """Pixels between the marks: stripes and dots lie on one grid in every drawn picture."""
    side = side_px * SUPERSAMPLING
    step = side // 11
    y = (np.arange(side_px) * SUPERSAMPLING + SUPERSAMPLING // 2) % step
    rows = (y > step // 2 + SUPERSAMPLING) & (y < step - SUPERSAMPLING)
    below_dots = y > step // 2 + step // 4
    return np.broadcast_to((rows & below_dots)[:, None], (side_px, side_px))


def match_outlines(mask: np.ndarray, names: tuple[str, ...]) -> Iterator[tuple[str, float, Point]]:
    """Every outline with the mask's area and centroid: intersection over union with it, and its middle."""
    x, y = centroid(mask)
    for shape in names:
        for angle in ANGLES:
            area, (unit_x, unit_y) = unit_area_and_centroid(shape, angle)
            radius = math.sqrt(mask.mean() / area)
            middle = (x - radius * unit_x, y - radius * unit_y)
            drawn = outline_mask(shape, radius, middle, angle, len(mask))
            yield shape, float((mask & drawn).sum() / (mask | drawn).sum()), middle


@lru_cache(maxsize=(len(SHAPES) + 1) * len(ANGLES))
def unit_area_and_centroid(shape: str, angle: float) -> tuple[float, Point]:
    """Area and centroid of the shape of radius 1 around the origin."""
    mask = outline_mask(shape, 0.25, (0.5, 0.5), angle, 256)
    x, y = centroid(mask)
    return float(mask.mean()) / 0.25**2, ((x - 0.5) / 0.25, (y - 0.5) / 0.25)


def centroid(mask: np.ndarray) -> Point:
    rows, columns = np.nonzero(mask)
    return float(columns.mean() + 0.5) / len(mask), float(rows.mean() + 0.5) / len(mask)


def outline_mask(shape: str, radius: float, centre: Point, angle: float, side: int) -> np.ndarray:
    thing = SceneObject(shape, "", "", "", "plain", (0, 0, 0), radius, centre, angle)
    return (
        np.asarray(
            object_mask(thing, side * SUPERSAMPLING).resize((side, side), Image.Resampling.BOX)
        )
        > 127
    )
