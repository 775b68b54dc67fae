"""Cache measured steps on disk, under a key of everything that they depend on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

import simpletuner
from simpletuner.atomic_io import write_atomically
from simpletuner.config.constraints import value_reader
from simpletuner.config.environment import user_cache_dir
from simpletuner.config.option_catalog import all_options
from simpletuner.config.schema import RunConfig
from simpletuner.models.family import BlockMemoryPolicy, ModelSpec
from simpletuner.training.memory_plan.fake_step import BatchShape, StepMeasurement


def cache_key(
    run: RunConfig, spec: ModelSpec, memory: BlockMemoryPolicy, feed: BatchShape, granule: int
) -> str:
    """Return the key of a measured step: everything that the measurement depends on.

    These are the options that declare the effect "step", the shapes and dtypes of the network, the
    batch, the memory policy, the code of this package and the version of torch.
    """
    read = value_reader(run)
    options = {
        option.name: read(option.name)
        for option in all_options().values()
        if "step" in option.affects
    }
    shapes = [
        (name, tuple(tensor.shape), str(tensor.dtype))
        for name, tensor in spec.transformer.state_dict().items()
    ]
    policy = [memory.checkpointed, memory.interval, dataclasses.astuple(feed), granule]
    parts = [options, shapes, *policy, torch.__version__, package_digest()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


@cache
def package_digest() -> str:
    """Return a hash of all source files of this package; any of them may change a result."""
    digest = hashlib.sha256()
    for path in sorted(Path(simpletuner.__path__[0]).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def digest(*parts: str) -> str:
    """Return a name for something that depends on these parts and on the code."""
    return hashlib.sha256("\0".join([*parts, package_digest()]).encode()).hexdigest()[:24]


def get_or_count(name: str, count: Callable[[], int]) -> int:
    """Return the cached number, or count and cache it; an unwritable folder is ignored."""
    file = user_cache_dir() / "plan" / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return int(json.loads(file.read_text(encoding="utf-8"))["bytes"])
    size = count()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"bytes": size}))
    return size


def get_or_measure(
    name: str,
    measure: Callable[[], StepMeasurement],
    before_measuring: Callable[[], object] = lambda: None,
) -> StepMeasurement:
    """Return the cached measurement, or measure and cache it; an unwritable folder is ignored."""
    file = user_cache_dir() / "plan" / f"{name}.json"
    if (cached := read_cached_measurement(name)) is not None:
        return cached
    before_measuring()
    measured = measure()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(dataclasses.asdict(measured)))
    return measured


def read_cached_measurement(name: str) -> StepMeasurement | None:
    """Return the cached measurement; None if there is none or it cannot be read."""
    try:
        return StepMeasurement(
            **json.loads((user_cache_dir() / "plan" / f"{name}.json").read_text(encoding="utf-8"))
        )
    except (OSError, ValueError, TypeError):
        return None
