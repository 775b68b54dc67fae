"""Quantized weights, converted once into a cache folder that all runs share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from simpletuner.config.environment import user_cache_dir
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError, ModelError
from simpletuner.events.event_types import Emit, WarningIssued
from simpletuner.models.chroma import fingerprints, weights
from simpletuner.models.family import ModelFiles
from simpletuner.quantization.convert import StoredTensor, quantize_to_file, quantized_file_path
from simpletuner.quantization.schemes import get_scheme


def quantized_transformer_file(
    source: ModelFiles, options: ModelOptions, device: torch.device, emit: Emit
) -> Path:
    """Return the transformer's weights in base_model_precision, converting them if needed."""
    stored = weights.transformer_tensors(source.transformer, source.variant)
    network = weights.empty_transformer(weights.read_transformer_config(source.transformer))
    names = {f"{name}.weight" for name in weights.block_linears(network)}
    key = fingerprints.transformer_fingerprint(source)
    if options.musubi_blocks_to_swap and torch.cuda.is_available():
        device = torch.device("cuda")  # `device` is only where the weights are loaded afterwards
    return ensure_quantized_file(
        "chroma", options.base_model_precision, stored, names, key, options, device, emit
    )


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
            weights.read_stored_tensors(file)
        except ModelError:
            emit(WarningIssued(f"{file} is damaged; the weights are converted again"))
            file.unlink(missing_ok=True)  # another process may have deleted it already
    compute_device = torch.device("cpu") if options.quantize_via == "cpu" else device
    quantize_to_file(stored, names, get_scheme(precision), file, compute_device, emit)
    return file
