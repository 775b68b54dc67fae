"""T5's encoder (transformers' class), from its own files or quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from simpletuner.config.schema import ModelOptions
from simpletuner.events.event_types import Emit
from simpletuner.models.chroma.fingerprints import text_encoder_dtype
from simpletuner.models.chroma.model_format import CHROMA_FORMAT
from simpletuner.models.chroma.single_file import T5_EMBEDDING, T5_EMBEDDING_ALIAS
from simpletuner.models.chroma.weights import read_t5_config
from simpletuner.models.family import ModelFiles
from simpletuner.models.weights.components import component_files, component_tensors
from simpletuner.models.weights.file_fingerprint import combined_fingerprint
from simpletuner.models.weights.quantized_cache import ensure_quantized_file
from simpletuner.models.weights.tensor_loading import (
    check_tensors,
    load_from_file,
    load_stored_tensors,
)
from simpletuner.quantization.quantized_linear import QuantizedLinear, quantize_modules
from simpletuner.quantization.stored_tensor import StoredTensor

BLOCK_PREFIX = "encoder.block."
DTYPE_QUERIED_SUFFIX = ".DenseReluDense.wo"


def load_t5(
    source: ModelFiles, options: ModelOptions, device: torch.device, emit: Emit
) -> T5EncoderModel:
    """Load the encoder in the dtype of the cache, frozen; headers are checked before weights."""
    quantized = options.text_encoder_1_precision != "no_change"
    t5: Any = (
        _load_quantized(source, options, device, emit)
        if quantized
        else _load_unquantized(source, options, device)
    )
    loaded: T5EncoderModel = t5.to(device).requires_grad_(False).eval()
    return loaded


def quantized_t5_file(
    source: ModelFiles, options: ModelOptions, device: torch.device, emit: Emit
) -> Path:
    """Return the weights in text_encoder_1_precision, converting them if needed."""
    t5 = _empty_t5(source)
    stored = _encoder_tensors(source, t5)
    names = {f"{name}.weight" for name in _block_linears(t5)}
    key = combined_fingerprint(
        "t5 1", *component_files(source.text_encoder, "text_encoder", CHROMA_FORMAT, source.variant)
    )
    return ensure_quantized_file(
        "t5", options.text_encoder_1_precision, stored, names, key, options, device, emit
    )


def _encoder_tensors(source: ModelFiles, t5: nn.Module) -> dict[str, StoredTensor]:
    """Return the encoder's tensors, checked; a decoder in the files is ignored."""
    available = component_tensors(
        source.text_encoder, "text_encoder", CHROMA_FORMAT, source.variant
    )
    if T5_EMBEDDING not in available and T5_EMBEDDING_ALIAS in available:
        available[T5_EMBEDDING] = available[T5_EMBEDDING_ALIAS]
    expected = {
        name: tensor for name, tensor in t5.state_dict().items() if name != T5_EMBEDDING_ALIAS
    }
    stored = {name: available[name] for name in expected if name in available}
    check_tensors(expected, stored, source.text_encoder)
    return stored


def _load_unquantized(source: ModelFiles, options: ModelOptions, device: torch.device) -> Any:
    t5 = _empty_t5(source)
    stored = _encoder_tensors(source, t5)
    t5 = t5.to(text_encoder_dtype(options))
    load_stored_tensors(t5, stored, device)
    t5.set_input_embeddings(t5.shared)
    return t5


class _DtypeQueriedLinear(QuantizedLinear):
    """T5's feed-forward reads this weight only for its dtype; dequantizing it would be wasted."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return torch.empty(
            self.out_features, self.in_features, dtype=self.weight_dtype, device="meta"
        )


def _load_quantized(
    source: ModelFiles, options: ModelOptions, device: torch.device, emit: Emit
) -> Any:
    file = quantized_t5_file(source, options, device, emit)
    t5 = _empty_t5(source).to(text_encoder_dtype(options))
    names = _block_linears(t5)
    dtype_queried = [name for name in names if name.endswith(DTYPE_QUERIED_SUFFIX)]
    quantize_modules(t5, dtype_queried, options.text_encoder_1_precision, _DtypeQueriedLinear)
    quantize_modules(t5, sorted({*names} - {*dtype_queried}), options.text_encoder_1_precision)
    load_from_file(t5, file, device)
    t5.set_input_embeddings(t5.shared)
    return t5


def _empty_t5(source: ModelFiles) -> Any:
    """Build the encoder on the meta device. Any, because transformers' modules are not typed."""
    config = T5Config.from_dict(read_t5_config(source.text_encoder))
    with torch.device("meta"):
        return T5EncoderModel(config)


def _block_linears(t5: nn.Module) -> list[str]:
    """Return the names of the linears in the blocks: attention and feed-forward."""
    modules = t5.named_modules()
    return [
        name
        for name, module in modules
        if isinstance(module, nn.Linear) and name.startswith(BLOCK_PREFIX)
    ]
