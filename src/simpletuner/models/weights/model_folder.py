"""Model folders in diffusers' layout: config files and weight files, sharded or single."""

from __future__ import annotations

import json
from pathlib import Path

from simpletuner.bounded_files import read_bounded_text
from simpletuner.errors import ModelError


def read_json(path: Path) -> dict[str, object]:
    """Return a JSON object. Raises ModelError with the file's path."""
    try:
        value = json.loads(read_bounded_text(path))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return value


def weight_files(folder: Path, stem: str, variant: str = "") -> list[Path]:
    """Return the existing safetensors files of one component, sharded or single.

    variant: "fp16" in stem.fp16.safetensors.
    """
    name = f"{stem}.{variant}" if variant else stem
    index = folder / f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index} has no weight_map.")
        files = [
            folder / Path(str(file)).name for file in sorted(set(map(str, weight_map.values())))
        ]
    else:
        files = [folder / f"{name}.safetensors"]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"Weight files are missing: {', '.join(missing)}. Download or copy the whole folder"
            " again."
        )
    return files
