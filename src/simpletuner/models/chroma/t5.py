"""T5's encoder (transformers' class), one layer after the other, from its own files or quantized.

The encoder has 24 layers of 0.39 GB in bf16. It is never loaded as a whole: a layer's weights are
read, applied to many batches, and dropped before those of the next. Between two layers the hidden
states of these batches are in host memory.

A layer is run by transformers' own encoder class, built with one layer. The first layer computes
the position biases that all others use; here each layer computes the same ones again, from the same
table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    load_stored_tensors,
    read_stored_tensors,
)
from simpletuner.quantization.quantized_linear import QuantizedLinear, quantize_modules
from simpletuner.quantization.stored_tensor import StoredTensor

BLOCK_PREFIX = "encoder.block."
FIRST_BLOCK_PREFIX = f"{BLOCK_PREFIX}0."
POSITION_TABLE = f"{FIRST_BLOCK_PREFIX}layer.0.SelfAttention.relative_attention_bias.weight"
FINAL_NORM = "encoder.final_layer_norm.weight"
DTYPE_QUERIED_SUFFIX = ".DenseReluDense.wo"

LayerDone = Callable[[int, int], None]  # number of layers that are done, of how many


class LayeredT5:
    """T5's encoder, of which one layer at a time is on the device.

    stored: the tensors of the encoder by name, as T5EncoderModel names them; quantized linears have
    several.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        stored: Mapping[str, StoredTensor],
        precision: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        whole = T5Config.from_dict(dict(config))
        self.device = device
        self.dtype = dtype
        self.width: int = whole.d_model
        self._stored = stored
        self._layers: int = whole.num_layers
        self._encoder = one_layer_encoder(config, precision, dtype)
        self._final_norm = self._encoder.final_layer_norm
        self._empty_state = dict(self._encoder.state_dict())
        self._embedding = stored[T5_EMBEDDING].load().to(dtype)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings of token ids (B, L) on the CPU, (B, L, width)."""
        return nn.functional.embedding(ids, self._embedding)

    @torch.no_grad()
    def encode(
        self, hidden: list[Tensor], masks: Sequence[Tensor], layer_done: LayerDone
    ) -> list[Tensor]:
        """Return the last hidden states of each batch, (B, L, width) on the CPU.

        hidden: the embeddings of each batch; the list is used up. masks: (B, L), 0 for padding.
        """
        for number in range(self._layers):
            self._load_layer(number)
            for place, mask in enumerate(masks):
                result = self._encoder(
                    inputs_embeds=hidden[place].to(self.device),
                    attention_mask=mask.to(self.device),
                ).last_hidden_state
                hidden[place] = result.cpu()
            layer_done(number + 1, self._layers)
        self._unload_layer()
        return hidden

    def _load_layer(self, number: int) -> None:
        """Put the weights of a layer on the device, after those of the former one are dropped."""
        self._unload_layer()
        is_last = number == self._layers - 1
        self._encoder.final_layer_norm = self._final_norm if is_last else nn.Identity()
        prefix = f"{BLOCK_PREFIX}{number}."
        tensors = {
            name.removeprefix("encoder.").replace(f"block.{number}.", "block.0.", 1): stored
            for name, stored in self._stored.items()
            if name.startswith(prefix)
        }
        tensors[POSITION_TABLE.removeprefix("encoder.")] = self._stored[POSITION_TABLE]
        if is_last:
            tensors[FINAL_NORM.removeprefix("encoder.")] = self._stored[FINAL_NORM]
        load_stored_tensors(self._encoder, tensors, self.device)

    def _unload_layer(self) -> None:
        self._encoder.load_state_dict(self._empty_state, strict=False, assign=True)


def load_t5(
    source: ModelFiles, options: ModelOptions, device: torch.device, emit: Emit
) -> LayeredT5:
    """Return the encoder in the dtype of the cache; headers are checked before any weight is read.

    With text_encoder_1_precision its weights are converted first, if needed.
    """
    precision = options.text_encoder_1_precision
    if precision == "no_change":
        stored = _encoder_tensors(source)
    else:
        stored = read_stored_tensors(quantized_t5_file(source, options, device, emit))
    config = read_t5_config(source.text_encoder)
    return LayeredT5(config, stored, precision, text_encoder_dtype(options), device)


def quantized_t5_file(
    source: ModelFiles, options: ModelOptions, device: torch.device, emit: Emit
) -> Path:
    """Return the weights in text_encoder_1_precision, converting them if needed."""
    stored = _encoder_tensors(source)
    names = {
        f"{name}.weight" for name in _block_linears(_empty_t5(read_t5_config(source.text_encoder)))
    }
    key = combined_fingerprint(
        "t5 1", *component_files(source.text_encoder, "text_encoder", CHROMA_FORMAT, source.variant)
    )
    return ensure_quantized_file(
        "t5", options.text_encoder_1_precision, stored, names, key, options, device, emit
    )


def _encoder_tensors(source: ModelFiles) -> dict[str, StoredTensor]:
    """Return the encoder's tensors, checked; a decoder in the files is ignored."""
    t5 = _empty_t5(read_t5_config(source.text_encoder))
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


class _DtypeQueriedLinear(QuantizedLinear):
    """T5's feed-forward reads this weight only for its dtype; dequantizing it would be wasted."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return torch.empty(
            self.out_features, self.in_features, dtype=self.weight_dtype, device="meta"
        )


def one_layer_encoder(config: Mapping[str, object], precision: str, dtype: torch.dtype) -> Any:
    """Build the encoder with one layer on the meta device, in `dtype`, frozen and in eval mode."""
    t5 = _empty_t5({**config, "num_layers": 1}).to(dtype)
    if precision != "no_change":
        names = _block_linears(t5)
        dtype_queried = [name for name in names if name.endswith(DTYPE_QUERIED_SUFFIX)]
        quantize_modules(t5, dtype_queried, precision, _DtypeQueriedLinear)
        quantize_modules(t5, sorted({*names} - {*dtype_queried}), precision)
    return t5.encoder.requires_grad_(False).eval()


def _empty_t5(config: Mapping[str, object]) -> Any:
    """Build the encoder on the meta device. Any, because transformers' modules are not typed."""
    with torch.device("meta"):
        return T5EncoderModel(T5Config.from_dict(dict(config)))


def _block_linears(t5: nn.Module) -> list[str]:
    """Return the names of the linears in the blocks: attention and feed-forward."""
    modules = t5.named_modules()
    return [
        name
        for name, module in modules
        if isinstance(module, nn.Linear) and name.startswith(BLOCK_PREFIX)
    ]
