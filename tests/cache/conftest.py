from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simpletuner.data.sample_types import BucketedSample, Sample
from simpletuner.data.sources import LocalFile


@pytest.fixture
def make_placed_sample() -> Callable[..., BucketedSample]:
    """Draws noise number `number` into a file of the bucket's size and places it there."""

    def make(path: Path, number: int, bucket: tuple[int, int] = (64, 64)) -> BucketedSample:
        pixels = np.random.default_rng(number).integers(
            0, 256, (bucket[1], bucket[0], 3), dtype=np.uint8
        )
        Image.fromarray(pixels).save(path)
        return BucketedSample(
            Sample(f"d/{path.name}", "d", LocalFile(path), *bucket, (f"c{number}",)),
            bucket,
            (0, 0),
            bucket,
        )

    return make


@pytest.fixture
def make_placed_samples(
    tmp_path: Path, make_placed_sample: Callable[..., BucketedSample]
) -> Callable[[int], list[BucketedSample]]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    return lambda count: [
        make_placed_sample(folder / f"{number}.png", number) for number in range(count)
    ]
