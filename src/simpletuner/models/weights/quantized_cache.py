"""Quantized weights, converted once into a cache folder that all runs share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from simpletuner.config.environment import user_cache_dir
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError, ModelError
from simpletuner.events.event_types import Emit, WarningIssued
from simpletuner.models.weights.tensor_loading import read_stored_tensors
from simpletuner.quantization.convert import quantize_to_file, quantized_file_path
from simpletuner.quantization.schemes import get_scheme
from simpletuner.quantization.stored_tensor import StoredTensor


def ensure_quantized_file(
    component: str,
    precision: str,
    stored: Mapping[str, StoredTensor],
    names: Collection[str],
    key: str,
    options: ModelOptions,
    device: torch.device,
    emit: Emit,
) -> Path:
    """Return the file in the cache, converting the weights when it is missing or damaged.

    component: first part of the file's name. names: tensors of `stored` to quantize. key:
    identifies the content of `stored`.
    """
    if precision == "fp8" and device.type == "mps":
        raise ConfigError(
            'Apple GPUs do not support fp8 weights. Use "int8", which has the same size and is more'
            " accurate."
        )
    folder = (
        Path(options.quantized_cache_dir)
        if options.quantized_cache_dir
        else user_cache_dir() / "quantized"
    )
    file = quantized_file_path(folder, component, precision, key)
    if file.exists():
        try:
            read_stored_tensors(file)
        except ModelError:
            emit(WarningIssued(f"{file} is damaged; the weights are converted again"))
            file.unlink(missing_ok=True)  # another process may have deleted it already
    compute_device = torch.device("cpu") if options.quantize_via == "cpu" else device
    quantize_to_file(stored, names, get_scheme(precision), file, compute_device, emit)
    return file
