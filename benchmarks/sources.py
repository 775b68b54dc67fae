"""Scan and first batch of the same images in a folder, in tar files and in a parquet file.

    python -m benchmarks.sources [--images 10000] [--side-px 96]

One JSON line per source: CPU seconds of the first scan, of a second one with the index of the first
in the cache folder, of hashing all images as the latent cache does, and of the pixels of the first
16 samples in the order of the training. No model takes part: after its pixels, a first step costs
the same for every source. The files are in the memory of the system.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.paired import environment
from benchmarks.scan import draw

from simpletuner.cache.content_hashes import ContentHashes
from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_file import try_read_datasets
from simpletuner.data.pixels import load_pixels
from simpletuner.data.remote_store import RemoteStore
from simpletuner.data.sample_order import SampleOrder
from simpletuner.data.scan import scan_datasets

TARS = 10
BATCH = 16
OPTIONS = DataOptions(resolution=64, max_bad_sample_fraction=0)


def pack(folder: Path, tars: Path) -> None:
    tars.mkdir()
    files = sorted(folder.iterdir())
    size = -(-len(files) // TARS) // 2 * 2  # an image and its caption stay together
    for number in range(-(-len(files) // size)):
        with tarfile.open(tars / f"{number:03}.tar", "w") as archive:
            for path in files[number * size : (number + 1) * size]:
                archive.add(path, path.name)


def write_parquet(folder: Path, target: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    images = sorted(path for path in folder.iterdir() if path.suffix != ".txt")
    table = pyarrow.table(
        {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in images],
            "text": [path.with_suffix(".txt").read_text() for path in images],
        }
    )
    parquet.write_table(table, target, row_group_size=100)  # as the hub's datasets have it


def cpu_s(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = action()
    return round(time.process_time() - start, 2), result


def measure(name: str, entry: dict[str, str], root: Path) -> dict[str, Any]:
    read, problems = try_read_datasets([{"id": "photos", **entry}], root, OPTIONS)
    assert not problems, problems

    with RemoteStore(root / f"cache-{name}", lambda event: None) as store:

        def scan() -> Any:
            return scan_datasets(read.train, OPTIONS, 1, lambda event: None, store=store).samples

        first_s, samples = cpu_s(scan)
        second_s, again = cpu_s(scan)
        assert again == samples
        hashes = ContentHashes(root / f"hashes-{name}")
        hash_s, _ = cpu_s(lambda: [hashes.hash_file(item.sample.file) for item in samples])
        hashes.close()
        order = SampleOrder(samples, read.train, 1, BATCH, OPTIONS)
        visits = order.micro_batch(0).visits
        batch_s, _ = cpu_s(
            lambda: [load_pixels(samples[visit.sample_index], OPTIONS) for visit in visits]
        )
    figures = {"scan_s": first_s, "again_s": second_s, "hash_s": hash_s, "batch_s": batch_s}
    return {"benchmark": "sources", "source": name, "images": len(samples), **figures}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--side-px", type=int, default=96)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = root / "pictures"
        folder.mkdir()
        draw(folder, arguments.images, arguments.side_px)
        pack(folder, root / "tars")
        write_parquet(folder, root / "list.parquet")
        entries = {
            "local": {"instance_data_dir": "pictures"},
            "tar": {"type": "webdataset", "instance_data_dir": "tars"},
            "parquet": {"type": "parquet", "table": "list.parquet"},
        }
        for kind, entry in entries.items():
            print(json.dumps({**measure(kind, entry, root), **environment()}), flush=True)


if __name__ == "__main__":
    main()
