"""The runs that tests of several processes start from and compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.test_replicated import Trainings


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("trainings"))


@pytest.fixture(scope="module")
def whole(trainings: Trainings) -> Path:
    """The run on one process."""
    return trainings.train("whole", 1, gradient_accumulation_steps=2)
