"""The scan of the datasets in a run of one or several processes."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path

from simpletuner.config.schema import RunConfig
from simpletuner.data.dataset_config import DatasetFile
from simpletuner.data.rejections import format_rejected
from simpletuner.data.remote_store import RemoteStore
from simpletuner.data.scan import ScanResult, scan_datasets
from simpletuner.errors import DataError
from simpletuner.events.event_types import Emit, WarningIssued
from simpletuner.training.world import World


def scan_everywhere(
    run: RunConfig,
    backends: DatasetFile,
    alignment_px: int,
    rejected_path: Path | None,
    store: RemoteStore | None,
    world: World,
    emit: Emit,
) -> ScanResult:
    """Scan the datasets in every process. Raises DataError where they do not see the same.

    store: of copies of remote files; None where every image is a local file. With it, rank 0 goes
    first, and the others find the copies.
    """
    with ExitStack() as turns:
        if store is not None:
            turns.enter_context(world.main_first("datasets"))
        scanned = scan_datasets(
            [*backends.train, *backends.eval],
            run.data,
            run.training.seed,
            emit,
            alignment_px=alignment_px,
            rejected_path=rejected_path,
            store=store,
        )
    require_same_scan(scanned, world)
    if scanned.rejected and rejected_path is not None:
        listed = format_rejected(scanned.rejected, rejected_path)
        emit(WarningIssued(f"not trained on ({len(scanned.rejected)}):\n{listed}"))
    return scanned


def require_same_scan(scanned: ScanResult, world: World) -> None:
    """Raise DataError unless all processes have found the same samples."""
    lines = [f"{item.sample.id}|{item.bucket_px}|{item.crop_px}" for item in scanned.samples]
    digest = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    scans = world.gather_json([len(lines), digest])
    for rank, other in enumerate(scans):
        if other != scans[0]:
            raise DataError(
                f"process {rank} finds other images than process 0 ({other[0]} and {scans[0][0]} "
                "samples): every machine must see the same datasets, unchanged while the run starts"
            )
