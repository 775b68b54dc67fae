"""How fast a folder is scanned: headers only, against decoding every image.

    python -m benchmarks.scan [--images 10000] [--pairs 7]

One JSON line, with a warm file cache. CPU and wall seconds; ratio is scanning / decoding, the
median of the pairs with its quartiles (benchmarks/paired.py).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from benchmarks.paired import add_pairs, compare, environment
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


def decode_all(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix == ".txt":
            path.read_text("utf-8")
            continue
        with Image.open(path) as image:
            image.convert("RGB").load()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--side-px", type=int, default=256)
    add_pairs(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder, arguments.images, arguments.side_px)
        dataset = DatasetConfig("benchmark", "image", folder, ResizeCropConfig(resolution=256))

        def scan() -> int:
            return len(scan_datasets([dataset], DataOptions(), 1, lambda event: None).samples)

        found = compare(scan, lambda: decode_all(folder), arguments.pairs).both()
        samples = scan()
    result = {
        "benchmark": "scan",
        "images": samples,
        "side_px": arguments.side_px,
        **found,
        "images_per_s": round(samples / found["wall"]["ours_s"]),
        **environment(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
