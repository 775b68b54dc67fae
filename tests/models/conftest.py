from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.config.schema import ModelOptions
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.family import ModelFiles
from tests.models.tiny_checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all tests; copy it before changing it."""
    return make_checkpoint(tmp_path_factory.mktemp("small"))


@pytest.fixture
def options(checkpoint: Path) -> ModelOptions:
    return ModelOptions(pretrained_model_name_or_path=str(checkpoint), mixed_precision="no")


@pytest.fixture
def source(options: ModelOptions) -> ModelFiles:
    return ChromaFamily().locate_files(options)
