"""Fingerprints of everything that changes a cached result, computed in milliseconds.

No model library is loaded for them.
"""

from __future__ import annotations

import torch

from simpletuner.config.schema import ModelOptions
from simpletuner.models.chroma.model_format import CHROMA_FORMAT
from simpletuner.models.family import ModelFiles
from simpletuner.models.weights.components import component_files
from simpletuner.models.weights.file_fingerprint import combined_fingerprint, major_version
from simpletuner.quantization.schemes import get_scheme

MAX_TOKENS = 512
T5_TENSOR = "rows"  # name of T5's embedding (L, 4096) in every text cache; must not change
TOKENIZER_SUFFIXES = (".json", ".model", ".txt")
VAE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def text_encoder_dtype(options: ModelOptions) -> torch.dtype:
    """Return T5's dtype. It overflows in float16, so fp16 uses bfloat16 as well."""
    return torch.float32 if options.mixed_precision == "no" else torch.bfloat16


def vae_dtype(options: ModelOptions, device: torch.device) -> torch.dtype:
    """Return the dtype; "default" is bfloat16 on accelerators and float32 on the CPU."""
    if options.vae_dtype == "default":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return VAE_DTYPES[options.vae_dtype]


def token_limit(options: ModelOptions) -> int:
    """Return the maximum number of tokens of a caption."""
    return min(MAX_TOKENS, options.tokenizer_max_length or MAX_TOKENS)


def text_fingerprint(source: ModelFiles, options: ModelOptions) -> str:
    """Fingerprint weights, precision, tokenizer, dtype, padding, limit and library version."""
    precision = options.text_encoder_1_precision
    quantized = [] if precision == "no_change" else [f"{precision} {get_scheme(precision).version}"]
    vocabulary = sorted(
        path for path in source.tokenizer.iterdir() if path.suffix in TOKENIZER_SUFFIXES
    )
    return combined_fingerprint(
        "chroma text 1",
        major_version("transformers"),
        str(text_encoder_dtype(options)),
        options.flux_t5_padding,
        str(token_limit(options)),
        *quantized,
        *component_files(source.text_encoder, "text_encoder", CHROMA_FORMAT, source.variant),
        *vocabulary,
    )


def vae_fingerprint(source: ModelFiles, options: ModelOptions) -> str:
    """Fingerprint weights, config, the dtype option, tiling and diffusers' major version.

    "default" counts as one dtype, so latents encoded on a GPU are used on a CPU as well.
    """
    return combined_fingerprint(
        "chroma vae 1",
        major_version("diffusers"),
        options.vae_dtype,
        f"tiling {options.vae_enable_tiling}",
        *component_files(source.vae, "vae", CHROMA_FORMAT, source.variant),
    )


def transformer_fingerprint(source: ModelFiles) -> str:
    """Fingerprint weights and config, independent of the compute dtype."""
    return combined_fingerprint(
        "chroma transformer 1",
        *component_files(source.transformer, "transformer", CHROMA_FORMAT, source.variant),
    )
