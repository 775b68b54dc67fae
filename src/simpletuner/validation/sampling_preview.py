"""Rough previews of images that are being sampled, as one small file that is overwritten.

The clean latents that a step predicts become colours by a linear map, which is fitted to the VAE
itself: no second model is needed, and a preview costs about as much as its JPEG. What is sampled is
only read, so the finished images have the same bits with and without previews.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate

from simpletuner.atomic_io import write_atomically
from simpletuner.models.encoders import Vae
from simpletuner.models.family import ArchitectureConstants
from simpletuner.randomness import seed_at
from simpletuner.validation.validation_images import pixels_to_image

# As in server/sampling_previews.py, which imports nothing of this package.
PREVIEW_FILE = "preview.jpg"
MIN_INTERVAL_S = 0.5
MAX_TILE_PX = 128  # of each image in the preview: the latents of a side of 1024 px
FIT_IMAGES, FIT_SIDE = 4, 16  # images, and latent rows and columns of each


@dataclass(frozen=True)
class RgbProjection:
    """A linear map from latents to colours. weight: (C, 3). bias: (3,). Both float32 on the CPU."""

    weight: Tensor
    bias: Tensor

    def to_pixels(self, latents: Tensor) -> Tensor:
        """Return one pixel in about [-1, 1] for each latent position: (B, C, H, W) to (B, 3, H, W).

        latents: scaled, as the transformer has them. The result is on the CPU.
        """
        colours = torch.einsum("bchw,cr->brhw", latents.float(), self.weight.to(latents.device))
        return colours.cpu() + self.bias.view(1, 3, 1, 1)


def fit_projection(vae: Vae, constants: ArchitectureConstants) -> RgbProjection:
    """Fit the map by least squares, to the latents of images of random colours.

    The colour of a latent position is the mean of its pixels. The images have soft areas of four
    sizes; they are the same in every run.
    """
    generator = torch.Generator().manual_seed(seed_at(0, "preview"))
    side_px = FIT_SIDE * constants.stride_px
    pixels = torch.zeros(FIT_IMAGES, 3, side_px, side_px)
    for areas in (2, 4, 8, 16):
        colours = torch.randn(FIT_IMAGES, 3, areas, areas, generator=generator) / math.sqrt(areas)
        pixels += interpolate(colours, size=(side_px, side_px), mode="bilinear")
    pixels.clamp_(-1, 1)
    mean = vae.encode(pixels)[:, : constants.latent_channels].float()
    latents = (mean - constants.latent_shift) * constants.latent_scale
    inputs = latents.movedim(1, -1).flatten(0, -2).double()
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
    means = avg_pool2d(pixels, constants.stride_px).movedim(1, -1).flatten(0, -2).double()
    solution = torch.linalg.lstsq(inputs, means).solution.float()
    return RgbProjection(solution[:-1].contiguous(), solution[-1])


@dataclass
class SamplingPreview:
    """Writes what the images that are being sampled will look like.

    path: the file. every: number of sampling steps from one preview to the next; at most one is
    written in MIN_INTERVAL_S, however fast the steps are. load_projection: called once.
    """

    path: Path
    every: int
    load_projection: Callable[[], RgbProjection]
    clock: Callable[[], float] = time.monotonic
    _projection: RgbProjection | None = field(default=None, init=False)
    _written_at: float = field(default=-math.inf, init=False)

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Fit the projection if that was not done yet; remove the file at the end.

        A process that is killed leaves the file, which the next session removes.
        """
        if self._projection is None:
            self._projection = self.load_projection()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        try:
            yield
        finally:
            self.path.unlink(missing_ok=True)

    def observe(self, step: int, predict_clean: Callable[[], Tensor]) -> None:
        """Write a preview after a sampling step, where one is due.

        predict_clean: returns the clean latents (B, C, H, W) that the step predicts.
        """
        now = self.clock()
        if step % self.every or now - self._written_at < MIN_INTERVAL_S or not self._projection:
            return
        self._written_at = now
        tiles = self._projection.to_pixels(predict_clean())
        # A disk that is full ends a run where images are saved, not for the sake of a preview.
        with contextlib.suppress(OSError):
            write_atomically(self.path, encode_tiles(tiles))


def encode_tiles(tiles: Tensor) -> bytes:
    """Return a JPEG with the images (B, 3, H, W) in rows, no side of one above MAX_TILE_PX."""
    scale = min(1.0, MAX_TILE_PX / max(tiles.shape[2:]))
    height, width = (max(1, round(side * scale)) for side in tiles.shape[2:])
    tiles = adaptive_avg_pool2d(tiles, (height, width))
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        sheet.paste(pixels_to_image(tile[None]), (column * width, row * height))
    data = io.BytesIO()
    sheet.save(data, format="JPEG", quality=90, subsampling=0)
    return data.getvalue()
