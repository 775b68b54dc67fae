from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.geometry import ResizeCropConfig


@pytest.fixture
def options() -> DataOptions:
    return DataOptions(resolution=128, caption_dropout_probability=0.0)


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., DatasetConfig]:
    """A dataset over tmp_path/photos; keywords as in Dataset."""

    def make(name: str = "photos", **fields: object) -> DatasetConfig:
        folder = tmp_path / "photos"
        folder.mkdir(exist_ok=True)
        settings = {
            "dataset_type": "image",
            "instance_data_dir": folder,
            "resize_crop": ResizeCropConfig(resolution=128),
        }
        return DatasetConfig(id=name, **(settings | fields))

    return make
