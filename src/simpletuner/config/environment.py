"""Access to the process environment: {env:NAME} in files and SIMPLETUNER_<OPTION> variables."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simpletuner.errors import ConfigError

PLACEHOLDER_PATTERN = re.compile(r"\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
VARIABLE_PREFIX = "SIMPLETUNER_"
GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
# torch reads all of them; the first one is its present name.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
SERVER_TOKEN_VARIABLE = (
    f"{VARIABLE_PREFIX}SERVER_TOKEN"  # the access token of `simpletuner server`; not an option
)
WORKSPACE_VARIABLE = f"{VARIABLE_PREFIX}WORKSPACE"  # the folder of `simpletuner server`
BACKEND_OPTION = "config_backend"
BACKEND_VARIABLES = ("SIMPLETUNER_CONFIG_BACKEND", "CONFIG_BACKEND")


def copy_process_environment() -> Mapping[str, str]:
    """Return a copy of the environment as it is now."""
    return dict(os.environ)


def set_missing_variables(variables: Mapping[str, str]) -> None:
    """Set variables that are not set yet, for this process and those that it starts."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def set_variables(variables: Mapping[str, str]) -> None:
    """Set variables for this process and those that it starts."""
    os.environ.update(variables)


def set_device_variables(deterministic: bool) -> None:
    """Choose how torch allocates GPU memory; must be called before torch is imported.

    A segment that can grow serves requests of any size. Otherwise memory that was freed in blocks
    of one size cannot serve another size, and a run of many sizes fails although enough is free. A
    user's own setting stays as it is. deterministic: give cuBLAS the fixed workspace without which
    torch refuses its products.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def restrict_visible_gpus(numbers: Sequence[int]) -> None:
    """Let torch see these GPUs only, in this order; must be called before torch is imported.

    Raises ConfigError where CUDA_VISIBLE_DEVICES is set to others already.
    """
    wanted = ",".join(map(str, numbers))
    current = os.environ.get(GPU_VARIABLE)
    if current is not None and current.replace(" ", "") != wanted:
        raise ConfigError(
            f"accelerate_visible_devices: {wanted} contradicts {GPU_VARIABLE}={current}; remove "
            "one of them"
        )
    os.environ[GPU_VARIABLE] = wanted


def user_cache_dir() -> Path:
    """Return the cache folder of all runs: simpletuner in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simpletuner"


def compiled_code_dir() -> Path:
    """Return the folder of torch's compiled kernels."""
    return user_cache_dir() / "compiled"


def set_compiled_code_dir() -> None:
    """Let torch keep compiled kernels in the cache; must be called before torch is imported.

    torch's own place is the system's folder for temporary files, where they are lost, and where it
    makes a folder even if nothing is compiled. A user's own setting stays as it is, and so does
    torch's place where the cache cannot be written.
    """
    with contextlib.suppress(RuntimeError):  # there is no home
        folder = compiled_code_dir()
        existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
        if os.access(existing, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.absolute()))


def expand_placeholders(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """Replace every {env:NAME} in a text, or in the texts of a list or object.

    Raises ConfigError with the first variable that is not set.
    """
    known = copy_process_environment() if environ is None else environ

    def replacement(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise ConfigError(f"{match[0]}: the environment variable {match[1]} is not set")
        return known[match[1]]

    if isinstance(value, str):
        return PLACEHOLDER_PATTERN.sub(replacement, value)
    if isinstance(value, list):
        return [expand_placeholders(item, known) for item in value]
    return (
        {key: expand_placeholders(item, known) for key, item in value.items()}
        if isinstance(value, dict)
        else value
    )
