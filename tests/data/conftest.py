from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset import Dataset
from simpletuner.data.geometry import Framing


@pytest.fixture
def options() -> DataOptions:
    return DataOptions(resolution=128, caption_dropout_probability=0.0)


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., Dataset]:
    """A dataset over tmp_path/photos; keywords as in Dataset."""

    def make(name: str = "photos", **fields: object) -> Dataset:
        folder = tmp_path / "photos"
        folder.mkdir(exist_ok=True)
        settings = {"dataset_type": "image", "instance_data_dir": folder, "framing": Framing(resolution=128)}
        return Dataset(id=name, **(settings | fields))

    return make
