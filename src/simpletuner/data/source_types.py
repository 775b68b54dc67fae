"""The source of a dataset by its field type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.sources import DatasetSource, LocalFolder
from simpletuner.data.tar_source import TarFolder

SOURCE_TYPES: Mapping[str, Callable[[Path], DatasetSource]] = {
    "local": LocalFolder,
    "webdataset": TarFolder,
}


def dataset_source(dataset: DatasetConfig) -> DatasetSource:
    """Return the source of a dataset's files."""
    return SOURCE_TYPES[dataset.type](dataset.instance_data_dir)
