"""T5's encoder half as transformers has it, from its own files or with fewer bits per weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from simpletuner.config.schema import ModelOptions
from simpletuner.events.types import Emit
from simpletuner.models.chroma.fingerprints import fingerprint, text_dtype
from simpletuner.models.chroma.precision import converted
from simpletuner.models.chroma.single import ALIAS, SHARED
from simpletuner.models.chroma.weights import check, fill, part_files, part_tensors, pour, t5_config
from simpletuner.models.family import Source
from simpletuner.quantization.convert import Stored
from simpletuner.quantization.linear import QuantizedLinear, quantize_modules

BLOCKS = "encoder.block."
ASKED_FOR_ITS_DTYPE = ".DenseReluDense.wo"


def load_t5(source: Source, options: ModelOptions, device: torch.device, emit: Emit) -> T5EncoderModel:
    """Headers first, then the weights one after the other, in the cache dtype; frozen."""
    quantized = options.text_encoder_1_precision != "no_change"
    t5 = _quantized(source, options, device, emit) if quantized else _plain(source, options, device)
    return t5.to(device).requires_grad_(False).eval()


def t5_file(source: Source, options: ModelOptions, device: torch.device, emit: Emit) -> Path:
    """The weights in text_encoder_1_precision; the first call converts them. A decoder is left behind."""
    t5 = _empty(source)
    stored = _stored(source, t5)
    chosen = {f"{name}.weight" for name in _linears(t5)}
    key = fingerprint("t5 1", *part_files(source.text_encoder, "text_encoder", source.variant))
    return converted("t5", options.text_encoder_1_precision, stored, chosen, key, options, device, emit)


def _stored(source: Source, t5: nn.Module) -> dict[str, Stored]:
    """What an encoder needs of the source, checked; a decoder is left behind."""
    found = part_tensors(source.text_encoder, "text_encoder", source.variant)
    if SHARED not in found and ALIAS in found:
        found[SHARED] = found[ALIAS]
    expected = {name: tensor for name, tensor in t5.state_dict().items() if name != ALIAS}
    stored = {name: found[name] for name in expected if name in found}
    check(expected, stored, source.text_encoder)
    return stored


def _plain(source: Source, options: ModelOptions, device: torch.device) -> Any:
    t5 = _empty(source)
    stored = _stored(source, t5)
    t5 = t5.to(text_dtype(options))
    pour(t5, stored, device)
    t5.set_input_embeddings(t5.shared)
    return t5


class _Unread(QuantizedLinear):
    """T5's feed-forward asks this weight twice for its dtype alone; restoring it would double the work."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return torch.empty(self.out_features, self.in_features, dtype=self.weight_dtype, device="meta")


def _quantized(source: Source, options: ModelOptions, device: torch.device, emit: Emit) -> Any:
    file = t5_file(source, options, device, emit)
    t5 = _empty(source).to(text_dtype(options))
    names = _linears(t5)
    unread = [name for name in names if name.endswith(ASKED_FOR_ITS_DTYPE)]
    quantize_modules(t5, unread, options.text_encoder_1_precision, _Unread)
    quantize_modules(t5, sorted({*names} - {*unread}), options.text_encoder_1_precision)
    fill(t5, file, device)
    t5.set_input_embeddings(t5.shared)
    return t5


def _empty(source: Source) -> Any:
    """On the meta device. Any, because transformers' modules are not typed."""
    config = T5Config.from_dict(t5_config(source.text_encoder))
    with torch.device("meta"):
        return T5EncoderModel(config)


def _linears(t5: nn.Module) -> list[str]:
    """Every linear in a block: attention and feed-forward."""
    modules = t5.named_modules()
    return [name for name, one in modules if isinstance(one, nn.Linear) and name.startswith(BLOCKS)]
