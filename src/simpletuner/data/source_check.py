"""A first look at remote datasets and tables, before a training loads anything."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.listing import RemoteFolder
from simpletuner.data.remote_store import RemoteStore
from simpletuner.data.source_types import dataset_source
from simpletuner.data.table_source import TableSource
from simpletuner.data.tar_source import TarFiles
from simpletuner.data.transports import TransferError
from simpletuner.errors import DataError
from simpletuner.events.sinks import null_emit


def check_sources(datasets: Sequence[DatasetConfig]) -> None:
    """Ask each server for the first part of its dataset, and each table for its columns.

    Raises DataError for missing credentials, buckets, datasets and columns. A server that does not
    answer is accepted here: the scan waits for it, and may find all that it needs in the cache.
    """
    sources = [*datasets, *(dataset.masks for dataset in datasets if dataset.masks is not None)]
    remote = [source for source in sources if not source.has_folder]
    if not remote:
        return
    with (
        tempfile.TemporaryDirectory(prefix="simpletuner-") as folder,
        RemoteStore(Path(folder), null_emit, pause=lambda seconds: None) as store,
    ):
        for dataset in remote:
            try:
                _check(dataset, store)
            except (DataError, TransferError) as error:
                cause = error if isinstance(error, TransferError) else error.__cause__
                if isinstance(cause, TransferError) and not cause.permanent:
                    continue
                if isinstance(error, TransferError):
                    text = f"{dataset.id}: {dataset.address}: {error.strerror}"
                    raise DataError(text) from error
                raise


def _check(dataset: DatasetConfig, store: RemoteStore) -> None:
    source: object = dataset_source(dataset, store, null_emit)
    if isinstance(source, TableSource):
        source.check()
    if isinstance(source, TarFiles):
        source = source.archives
    if isinstance(source, RemoteFolder) and source.listed is None:
        source.lister().next_page()
