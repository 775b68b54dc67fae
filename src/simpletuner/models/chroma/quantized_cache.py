"""The transformer's quantized weights in the shared cache."""

from __future__ import annotations

from pathlib import Path

import torch

from simpletuner.config.schema import ModelOptions
from simpletuner.events.event_types import Emit
from simpletuner.models.chroma import fingerprints, weights
from simpletuner.models.family import ModelFiles
from simpletuner.models.weights.quantized_cache import ensure_quantized_file


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
