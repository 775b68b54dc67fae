"""Scan, order and micro-batches of a table of 10,000, 100,000 and 1,000,000 rows.

    python -m benchmarks.growth [--rows 10000 100000 1000000]

The table is a parquet file of URLs, captions, widths and heights; nothing is downloaded. Each size
runs in a process of its own. Times are CPU seconds of that process, so that other load on the
machine counts little; peak_mib is its largest resident size, and bytes_per_row the growth of that
size per row. step_us is the time to plan one micro-batch within an epoch, and epoch_s that of the
first one of an epoch, which shuffles all rows; kept_bytes is what 500 further micro-batches leave
in memory. One line of JSON per size.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

from benchmarks.paired import environment

COLUMNS = {"width_column": "width", "height_column": "height"}
ROWS_PER_WRITE = 100_000
STEPS = 2_000
SIZES_PX = ((1024, 1024), (1152, 896), (896, 1152), (1344, 768), (768, 1344), (1024, 768))


def write_table(path: Path, rows: int) -> None:
    import pyarrow
    from pyarrow import parquet

    writer = None
    for start in range(0, rows, ROWS_PER_WRITE):
        numbers = range(start, min(start + ROWS_PER_WRITE, rows))
        table = pyarrow.table(
            {
                "url": [f"https://images.example.com/set/{n:08d}.jpg" for n in numbers],
                "caption": [
                    f"a photograph of object {n % 9973} on table {n % 31}" for n in numbers
                ],
                "width": [SIZES_PX[n % len(SIZES_PX)][0] for n in numbers],
                "height": [SIZES_PX[n % len(SIZES_PX)][1] for n in numbers],
            }
        )
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def peak_mib() -> float:
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(path: Path, rows: int) -> dict[str, float]:
    from simpletuner.config.schema import DataOptions
    from simpletuner.data.dataset_file import try_read_datasets
    from simpletuner.data.remote_store import RemoteStore
    from simpletuner.data.sample_order import SampleOrder
    from simpletuner.data.scan import scan_datasets

    options = DataOptions()
    entry = {"id": "rows", "type": "parquet", "table": str(path), **COLUMNS}
    read, problems = try_read_datasets([entry], path.parent, options)
    assert not problems, problems
    before_mib = peak_mib()
    start = time.process_time()
    with RemoteStore(path.parent / f"cache-{rows}", lambda event: None) as store:
        scanned = scan_datasets(read.train, options, 1, lambda event: None, store=store)
    scan_s = time.process_time() - start
    scan_mib = peak_mib()
    assert len(scanned.samples) == rows
    start = time.process_time()
    order = SampleOrder(scanned.samples, read.train, 1, 4, options)
    order_s = time.process_time() - start
    start = time.process_time()
    order.micro_batch(0)
    epoch_s = time.process_time() - start
    start = time.process_time()
    for number in range(1, STEPS + 1):
        order.micro_batch(number % order.batches_per_epoch)
    step_us = (time.process_time() - start) / STEPS * 1e6
    tracemalloc.start()
    kept_bytes = -tracemalloc.get_traced_memory()[0]
    for number in range(500):
        order.micro_batch(1 + number % (order.batches_per_epoch - 1))
    kept_bytes += tracemalloc.get_traced_memory()[0]
    return {
        "rows": rows,
        "scan_s": round(scan_s, 2),
        "order_s": round(order_s, 2),
        "epoch_s": round(epoch_s, 3),
        "step_us": round(step_us, 1),
        "kept_bytes": kept_bytes,
        "peak_mib": round(peak_mib()),
        "bytes_per_row": round((scan_mib - before_mib) * (1 << 20) / rows),
    }


def run(path: str, rows: int) -> None:
    write_table(Path(path), rows)
    print(json.dumps({"benchmark": "growth", **measure_apart(path, rows), **environment()}))


def measure_apart(path: str, rows: int) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (Path(path), rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for rows in arguments.rows:
            run(f"{folder}/rows-{rows}.parquet", rows)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
