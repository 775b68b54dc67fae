"""T5's encoder half as transformers has it, from its own files or with fewer bits per weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel
from transformers.utils import logging as transformers_logging

from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ModelError
from simpletuner.events.types import Emit
from simpletuner.models.chroma.fingerprints import fingerprint, text_dtype
from simpletuner.models.chroma.precision import converted
from simpletuner.models.chroma.weights import check, fill, read_header, weight_files
from simpletuner.models.family import Source
from simpletuner.quantization.linear import QuantizedLinear, quantize_modules

BLOCKS = "encoder.block."
ASKED_FOR_ITS_DTYPE = ".DenseReluDense.wo"
EMBEDDING, ALIAS = "shared.weight", "encoder.embed_tokens.weight"


def load_t5(source: Source, options: ModelOptions, device: torch.device, emit: Emit) -> T5EncoderModel:
    """Headers first, then the weights one after the other, in the cache dtype; frozen."""
    for file in weight_files(source.text_encoder, "model", source.variant):
        read_header(file)
    quantized = options.text_encoder_1_precision != "no_change"
    t5 = _quantized(source, options, device, emit) if quantized else _plain(source, options)
    return t5.to(device).requires_grad_(False).eval()


def t5_file(source: Source, options: ModelOptions, device: torch.device, emit: Emit) -> Path:
    """The weights in text_encoder_1_precision; the first call converts them. A decoder is left behind."""
    files = weight_files(source.text_encoder, "model", source.variant)
    found = {name: stored for file in files for name, stored in read_header(file).items()}
    if EMBEDDING not in found and ALIAS in found:
        found[EMBEDDING] = found[ALIAS]
    t5 = _empty(source)
    expected = {name: tensor.shape for name, tensor in t5.state_dict().items() if name != ALIAS}
    stored = {name: found[name] for name in expected if name in found}
    check(expected, stored, source.text_encoder)
    chosen = {f"{name}.weight" for name in _linears(t5)}
    key = fingerprint("t5 1", source.text_encoder / "config.json", *files)
    return converted("t5", options.text_encoder_1_precision, stored, chosen, key, options, device, emit)


def _plain(source: Source, options: ModelOptions) -> Any:
    """By transformers' own streaming load."""
    transformers_logging.disable_progress_bar()
    loaded: Any = T5EncoderModel.from_pretrained(
        source.text_encoder,
        dtype=text_dtype(options),
        variant=source.variant or None,
        local_files_only=True,
        output_loading_info=True,
    )
    t5, report = loaded
    missing = [name for name in report["missing_keys"] if not name.endswith("embed_tokens.weight")]
    if missing:
        raise ModelError(
            f"{source.text_encoder} is no whole T5 encoder; missing: {', '.join(sorted(missing)[:8])}."
        )
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
    with torch.device("meta"):
        return T5EncoderModel(T5Config.from_pretrained(source.text_encoder, local_files_only=True))


def _linears(t5: nn.Module) -> list[str]:
    """Every linear in a block: attention and feed-forward."""
    modules = t5.named_modules()
    return [name for name, one in modules if isinstance(one, nn.Linear) and name.startswith(BLOCKS)]
