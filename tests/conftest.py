"""No test touches the files of the user of this machine or depends on the number of its cores."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

# One thread for each worker and each process that a test starts: the networks are tiny, and torch
# reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Exclude imported modules from garbage collection: each one would traverse all of torch."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _exclude_objects_of_earlier_files() -> None:
    """Exclude what earlier files have imported as well, in the end half of all objects."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _isolate_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user_cache")))
        yield
