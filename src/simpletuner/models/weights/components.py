"""Tensors and files of one component, in a folder or a single file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from simpletuner.models.weights.model_folder import weight_files
from simpletuner.models.weights.model_format import ModelFormat
from simpletuner.models.weights.scaled_fp8 import decode_fp8_tensors
from simpletuner.models.weights.single_file import read_component
from simpletuner.models.weights.tensor_loading import read_stored_tensors
from simpletuner.quantization.stored_tensor import StoredTensor


def component_tensors(
    path: Path,
    component: str,
    model: ModelFormat,
    variant: str = "",
    read_file: Callable[[Path], dict[str, StoredTensor]] | None = None,
) -> dict[str, StoredTensor]:
    """Return the tensors of a component's folder or single file.

    read_file: reads a single file, for components whose keys are renamed.
    """
    if path.is_file():
        return read_file(path) if read_file else read_component(path, component, model)[0]
    files = weight_files(path, model.components[component].weights_stem, variant)
    tensors = {name: stored for file in files for name, stored in read_stored_tensors(file).items()}
    return decode_fp8_tensors(tensors, path)


def component_files(
    path: Path, component: str, model: ModelFormat, variant: str = ""
) -> list[Path]:
    """Return the files that define a component: its config and weights, or the single file."""
    if path.is_file():
        return [path]
    stem = model.components[component].weights_stem
    return [path / "config.json", *weight_files(path, stem, variant)]
