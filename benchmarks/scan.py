"""How fast a folder is scanned: headers only, against decoding every picture.

python benchmarks/scan.py [--images 10000]   one JSON line; ratios are of this run, warm file cache
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.data.scan import scan_datasets


def draw(folder: Path, images: int, side_px: int) -> None:
    """Half PNG, half JPEG, in varied sizes, each with a caption."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    for number in range(images):
        size = (side_px + number % 128, side_px + number // 128 % 128)
        suffix = ("png", "jpg")[number % 2]
        noise.resize(size, Image.Resampling.NEAREST).save(folder / f"{number:06}.{suffix}")
        (folder / f"{number:06}.txt").write_text(f"picture number {number}\n")


def decode_all(folder: Path) -> float:
    started = time.perf_counter()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".txt":
            path.read_text("utf-8")
            continue
        with Image.open(path) as image:
            image.convert("RGB").load()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--side-px", type=int, default=256)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder, arguments.images, arguments.side_px)
        dataset = DatasetConfig("benchmark", "image", folder, ResizeCropConfig(resolution=256))
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            found = scan_datasets([dataset], DataOptions(), 1, lambda event: None)
            seconds.append(time.perf_counter() - started)
        decoded = decode_all(folder)
    best = min(seconds)
    print(
        json.dumps(
            {
                "benchmark": "scan",
                "images": len(found.samples),
                "side_px": arguments.side_px,
                "seconds": round(best, 3),
                "images_per_s": round(len(found.samples) / best),
                "decode_all_seconds": round(decoded, 3),
                "ratio_to_decoding": round(best / decoded, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
