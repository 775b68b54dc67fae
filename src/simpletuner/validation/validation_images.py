"""Validation images on disk: PNG files with the settings that generated them as metadata."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from simpletuner import __version__
from simpletuner.errors import DiskFull
from simpletuner.image_decoding import UndecodableImage, decoder_errors
from simpletuner.peers import Peers
from simpletuner.validation.prompts import ImageSpec


@dataclass(frozen=True)
class GenerationSettings:
    """Settings that all images of a run share.

    model: the name that users know. identity: differs when the same step would have other weights
    (another base model, another training), so that images of an earlier run in the same folder are
    neither reused nor shown.
    """

    steps: int
    guidance: float
    model: str
    identity: str = ""


def pixels_to_image(pixels: Tensor) -> Image.Image:
    """Convert (1, 3, H, W) in [-1, 1] to an 8-bit image.

    Values outside the range are clipped; NaN becomes grey.
    """
    levels = (torch.nan_to_num(pixels[0].float(), nan=0.0).clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def gather_images(own: Sequence[Image.Image], peers: Peers) -> list[Image.Image]:
    """Return the images of all processes on every process, in the order of the processes."""
    sizes = peers.gather_json([image.size for image in own])
    parts = peers.gather_bytes(b"".join(image.tobytes() for image in own))
    images = []
    for process_sizes, data in zip(sizes, parts, strict=True):
        start = 0
        for width, height in process_sizes:
            end = start + 3 * width * height
            images.append(Image.frombytes("RGB", (width, height), data[start:end]))
            start = end
    return images


def image_metadata(
    image_spec: ImageSpec, settings: GenerationSettings, **more: str
) -> dict[str, str]:
    """Return the metadata of an image file. "parameters" is the line that other programs read.

    more: values of this image only, such as its step.
    """
    prompt = image_spec.prompt
    width, height = image_spec.size_px
    negative = prompt.negative if settings.guidance > 1 else ""
    parameters = prompt.text + (f"\nNegative prompt: {negative}" if negative else "")
    parameters += (
        f"\nSteps: {settings.steps}, Sampler: Euler, CFG scale: {settings.guidance:g}, "
        f"Seed: {image_spec.seed}, Size: {width}x{height}, Model: {settings.model}, "
        f"Version: simpletuner {__version__}"
        + (f", Denoising strength: {image_spec.denoise:g}" if image_spec.start else "")
    )
    metadata = {
        "parameters": parameters,
        "prompt": prompt.text,
        "negative_prompt": negative,
        "seed": str(image_spec.seed),
        "steps": str(settings.steps),
        "guidance": f"{settings.guidance:g}",
        "size": f"{width}x{height}",
        "model": settings.model,
        "identity": settings.identity,
        "image": image_spec.start,
        "denoise": f"{image_spec.denoise:g}" if image_spec.start else "",
        "strength": f"{prompt.strength:g}" if prompt.strength != 1 else "",
        **more,
    }
    return {key: value for key, value in metadata.items() if value}


def read_image_metadata(path: Path) -> dict[str, str]:
    """Return the text chunks of a PNG; empty when the file is not a readable image."""
    try:
        with decoder_errors(), Image.open(path) as image:
            image.load()
            return {
                str(key): str(value) for key, value in image.info.items() if isinstance(value, str)
            }
    except UndecodableImage:
        return {}


def save_png(image: Image.Image, path: Path, description: Mapping[str, str] | None = None) -> None:
    """Write the image completely or not at all, whenever the process ends.

    Raises DiskFull when there is no space left.
    """
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
            raise DiskFull(f"no space left on the disk for the image {path}") from error
        raise


def image_path(run_dir: Path, image_spec: ImageSpec, step: int, weights: str) -> Path:
    """Return images/step-000500/<prompt id>-<number>-<W>x<H>.png.

    Images of the averaged weights end in -ema.png, those of a LoRA at another strength in, for
    example, -strength-0.5.png.
    """
    ending = "" if weights in ("base", "trained") else f"-{weights.replace(' ', '-')}"
    return run_dir / "images" / f"step-{step:06d}" / f"{image_spec.stem}{ending}.png"


def is_generated(
    run_dir: Path, image_spec: ImageSpec, settings: GenerationSettings, step: int, weights: str
) -> bool:
    """Return whether exactly this image is on disk, and complete."""
    path = image_path(run_dir, image_spec, step, weights)
    return read_image_metadata(path) == image_metadata(
        image_spec, settings, step=str(step), weights=weights
    )
