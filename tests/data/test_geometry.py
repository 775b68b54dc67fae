from __future__ import annotations

from dataclasses import replace
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.data.geometry import (
    ResizeCropConfig,
    bucket_size,
    covering_size,
    crop_position,
    resized_size,
)

sides = st.integers(1, 20_000)
sizes = st.tuples(sides, sides).filter(lambda size: 0.25 <= size[0] / size[1] <= 4)
alignments = st.sampled_from([16, 32, 64])
edges = st.integers(128, 2048)
kinds = st.sampled_from(["pixel", "area", "pixel_area"])
KEEP = ResizeCropConfig(crop=False)


def framing(edge: int, kind: str, **more: object) -> ResizeCropConfig:
    return ResizeCropConfig(
        resolution=edge * edge / 1e6 if kind == "area" else edge, resolution_type=kind, **more
    )


@given(sizes, edges, kinds, alignments)
def test_sides_are_the_ideal_ones_to_half_an_alignment(size, edge, kind, alignment) -> None:
    ratio = size[0] / size[1]
    ideal = (edge * max(1, ratio), edge * max(1, 1 / ratio))
    if kind != "pixel":
        ideal = (edge * sqrt(ratio), edge / sqrt(ratio))
    found = bucket_size(framing(edge, kind), size, alignment)
    for side, wanted in zip(found, ideal):
        assert side % alignment == 0
        assert side >= alignment
        assert abs(side - wanted) <= alignment / 2 + 1e-6 or side == alignment > wanted


@given(sizes, edges.filter(lambda edge: edge >= 512))
def test_area_stays_within_bounds(size, edge) -> None:
    width, height = bucket_size(framing(edge, "pixel_area"), size, 64)
    assert 0.75 * edge**2 < width * height < 1.3 * edge**2
    assert 0.75 < (width / height) / (size[0] / size[1]) < 1.35


@given(sizes, edges, kinds, st.sampled_from(["square", "preserve", "closest"]), st.booleans())
def test_the_picture_covers_its_bucket_and_keeps_its_aspect(
    size, edge, kind, aspect, cropped
) -> None:
    window = bucket_size(framing(edge, kind, crop=cropped, crop_aspect=aspect), size, 64)
    large = covering_size(size, window)
    assert large[0] >= window[0]
    assert large[1] >= window[1]
    assert large[0] == window[0] or large[1] == window[1]
    scale = max(window[0] / size[0], window[1] / size[1])
    assert abs(large[0] - size[0] * scale) <= 0.5 + 1e-6
    assert abs(large[1] - size[1] * scale) <= 0.5 + 1e-6


@given(sizes, st.sampled_from(["center", "corner", "random"]), st.integers(0, 2**63 - 1))
def test_the_crop_lies_inside(size, style, draw) -> None:
    window = bucket_size(ResizeCropConfig(crop=True), size, 64)
    large = covering_size(size, window)
    left, top = crop_position(style, large, window, draw)
    assert 0 <= left <= large[0] - window[0]
    assert 0 <= top <= large[1] - window[1]
    if style == "center":
        assert abs((large[0] - window[0]) - 2 * left) <= 1


def test_random_crops_reach_both_ends() -> None:
    places = {
        crop_position("random", (66, 64), (64, 64), draw * 0x9E3779B97F4A7C15 % 2**63)
        for draw in range(64)
    }
    assert places == {(0, 0), (1, 0), (2, 0)}


@pytest.mark.parametrize(
    ("size", "more", "expected"),
    [
        ((500, 500), {"resolution": 128}, (128, 128)),
        ((4000, 3000), {"resolution": 1024}, (1152, 896)),
        ((1600, 900), {"resolution": 512}, (704, 384)),
        ((3000, 4000), {"resolution": 512, "resolution_type": "pixel"}, (512, 704)),
        ((900, 900), {"resolution": 1.0, "resolution_type": "area"}, (1024, 1024)),
        ((900, 900), {"resolution": 0.25, "resolution_type": "area"}, (512, 512)),
        ((1600, 900), {"resolution": 512, "crop": True}, (512, 512)),
        ((1600, 900), {"resolution": 512, "crop": True, "crop_aspect": "preserve"}, (704, 384)),
        (
            (1600, 900),
            {
                "resolution": 512,
                "crop": True,
                "crop_aspect": "closest",
                "crop_aspect_buckets": (0.5, 1, 1.5),
            },
            (640, 448),
        ),
        ((1300, 1000), {"resolution": 1024, "crop": True, "crop_aspect": "closest"}, (1152, 896)),
        (
            (720, 1000),
            {
                "resolution": 512,
                "crop": True,
                "crop_aspect": "closest",
                "crop_aspect_buckets": (0.5, 1),
            },
            (512, 512),
        ),
    ],
)
def test_known_buckets(size, more, expected) -> None:
    assert bucket_size(replace(KEEP, **more), size, 64) == expected


def test_only_larger_pictures_are_first_shrunk_to_the_target() -> None:
    limits = ResizeCropConfig(
        resolution=512,
        crop=True,
        maximum_image_size=2000,
        target_downsample_size=1000,
        crop_style="corner",
    )
    assert resized_size(limits, (4000, 1000), (512, 512)) == (2048, 512)
    assert resized_size(limits, (4000, 4000), (512, 512)) == (1000, 1000)
    assert resized_size(limits, (3000, 1500), (512, 512)) == (1414, 707)
    assert resized_size(replace(limits, target_downsample_size=None), (4000, 4000), (512, 512)) == (
        512,
        512,
    )
