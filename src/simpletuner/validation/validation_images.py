"""Pictures on disk: PNG files that say how they were made."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from simpletuner import __version__
from simpletuner.errors import DiskFull
from simpletuner.validation.prompts import ImageSpec


@dataclass(frozen=True)
class GenerationSettings:
    """How every picture of a run is drawn. model: what a person calls it.

    identity: changes when the same step would be other weights (another base, another training), so that
    pictures of an earlier run in the same folder are neither kept nor shown.
    """

    steps: int
    guidance: float
    model: str
    identity: str = ""


def pixels_to_image(pixels: Tensor) -> Image.Image:
    """(1, 3, H, W) in [-1, 1] -> an 8-bit picture; values outside are cut, not-a-number is grey."""
    levels = (torch.nan_to_num(pixels[0].float(), nan=0.0).clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def image_metadata(picture: ImageSpec, settings: GenerationSettings, **more: str) -> dict[str, str]:
    """What the file says of itself. "parameters" is the line that other programs read back.

    more: what only this picture has, such as its step.
    """
    prompt, (width, height) = picture.prompt, picture.size_px
    negative = prompt.negative if settings.guidance > 1 else ""
    parameters = prompt.text + (f"\nNegative prompt: {negative}" if negative else "")
    parameters += (
        f"\nSteps: {settings.steps}, Sampler: Euler, CFG scale: {settings.guidance:g}, Seed: {picture.seed}, "
        f"Size: {width}x{height}, Model: {settings.model}, Version: simpletuner {__version__}"
    )
    said = {
        "parameters": parameters,
        "prompt": prompt.text,
        "negative_prompt": negative,
        "seed": str(picture.seed),
        "steps": str(settings.steps),
        "guidance": f"{settings.guidance:g}",
        "size": f"{width}x{height}",
        "model": settings.model,
        "identity": settings.identity,
        **more,
    }
    return {key: value for key, value in said.items() if value}


def read_image_metadata(path: Path) -> dict[str, str]:
    """The text inside a PNG; empty when there is no readable picture."""
    try:
        with Image.open(path) as image:
            image.load()
            return {
                str(key): str(value) for key, value in image.info.items() if isinstance(value, str)
            }
    except (OSError, SyntaxError, ValueError):  # Pillow's three ways to say that a PNG is damaged
        return {}


def save_png(image: Image.Image, path: Path, description: Mapping[str, str] | None = None) -> None:
    """The whole picture or nothing is found at path, whenever the process ends."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in (description or {}).items():
        chunks.add_text(key, value)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(temporary, format="PNG", pnginfo=chunks)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise DiskFull(f"no space left on the disk for the picture {path}") from error
        raise


def image_path(run_dir: Path, picture: ImageSpec, step: int, weights: str) -> Path:
    """images/step-000500/<prompt id>-<number>-<W>x<H>.png; the average's end in -ema.png, those of a LoRA
    at another strength in -strength-0.5.png.
    """
    ending = "" if weights in ("base", "trained") else f"-{weights.replace(' ', '-')}"
    return run_dir / "images" / f"step-{step:06d}" / f"{picture.stem}{ending}.png"


def is_generated(
    run_dir: Path, picture: ImageSpec, settings: GenerationSettings, step: int, weights: str
) -> bool:
    """Is exactly this picture there, whole?"""
    path = image_path(run_dir, picture, step, weights)
    return read_image_metadata(path) == image_metadata(
        picture, settings, step=str(step), weights=weights
    )
