"""Fewer bits per weight: converted once into a folder that all runs share."""

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
    """The transformer's weights in base_model_precision; the first call converts them."""
    stored = weights.transformer_tensors(source.transformer, source.variant)
    network = weights.empty_transformer(weights.read_transformer_config(source.transformer))
    chosen = {f"{name}.weight" for name in weights.block_linears(network)}
    key = fingerprints.transformer_fingerprint(source)
    if options.musubi_blocks_to_swap and torch.cuda.is_available():
        device = torch.device("cuda")  # the host is only where the result is loaded to
    return ensure_quantized_file(
        "chroma", options.base_model_precision, stored, chosen, key, options, device, emit
    )


def ensure_quantized_file(
    what: str,
    precision: str,
    stored: Mapping[str, StoredTensor],
    chosen: Collection[str],
    key: str,
    options: ModelOptions,
    device: torch.device,
    emit: Emit,
) -> Path:
    """The file in the cache, made when it is not there or damaged.

    what: the first word of its name. chosen: names in `stored` that are quantised. key: recognises `stored`.
    """
    if precision == "fp8" and device.type == "mps":
        raise ConfigError(
            'fp8 weights: Apple GPUs have no float8. Use "int8": as small, and it errs less.'
        )
    folder = (
        Path(options.quantized_cache_dir)
        if options.quantized_cache_dir
        else user_cache_dir() / "quantized"
    )
    file = quantized_file_path(folder, what, precision, key)
    if file.exists():
        try:
            weights.read_stored_tensors(file)
        except ModelError:
            emit(WarningIssued(f"{file} is damaged; the weights are converted again"))
            file.unlink(missing_ok=True)  # another process may have noticed as well
    place = torch.device("cpu") if options.quantize_via == "cpu" else device
    quantize_to_file(stored, chosen, get_scheme(precision), file, place, emit)
    return file
