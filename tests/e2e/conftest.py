"""What the tests of whole commands share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.warm_commands import warm_path


@pytest.fixture(scope="session")
def warm_commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for PATH with a `simpletuner` whose libraries are imported already."""
    with warm_path(tmp_path_factory.mktemp("warm") / "bin") as folder:
        yield folder
