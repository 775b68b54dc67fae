"""Fingerprints of everything that changes a cached result, computed in milliseconds.

No model library is loaded for them.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import torch

from simpletuner.config.schema import ModelOptions
from simpletuner.models.chroma.weights import component_files
from simpletuner.models.family import ModelFiles
from simpletuner.quantization.schemes import get_scheme

MAX_TOKENS = 512
TOKENIZER_SUFFIXES = (".json", ".model", ".txt")
SAMPLE_BYTES = 64 * 1024
SAMPLE_COUNT = 32


def text_encoder_dtype(options: ModelOptions) -> torch.dtype:
    """Return T5's dtype. It overflows in float16, so fp16 uses bfloat16 as well."""
    return torch.float32 if options.mixed_precision == "no" else torch.bfloat16


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
        _major_version("transformers"),
        str(text_encoder_dtype(options)),
        options.flux_t5_padding,
        str(token_limit(options)),
        *quantized,
        *component_files(source.text_encoder, "text_encoder", source.variant),
        *vocabulary,
    )


def vae_fingerprint(source: ModelFiles, options: ModelOptions) -> str:
    """Fingerprint weights, config, the dtype option, tiling and diffusers' major version.

    "default" counts as one dtype, so latents encoded on a GPU are used on a CPU as well.
    """
    return combined_fingerprint(
        "chroma vae 1",
        _major_version("diffusers"),
        options.vae_dtype,
        f"tiling {options.vae_enable_tiling}",
        *component_files(source.vae, "vae", source.variant),
    )


def transformer_fingerprint(source: ModelFiles) -> str:
    """Fingerprint weights and config, independent of the compute dtype."""
    return combined_fingerprint(
        "chroma transformer 1", *component_files(source.transformer, "transformer", source.variant)
    )


def _major_version(package: str) -> str:
    return f"{package} {version(package).split('.')[0]}"


def fingerprint_file(path: Path) -> str:
    """Fingerprint a file in milliseconds by its size and 33 evenly spread blocks of 64 KiB.

    The first block is the start of the file. Small files are hashed completely. A large file that
    changed only between the sampled blocks would not be noticed; retrained or requantized weights
    change everywhere.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name}:{size}".encode())
    with path.open("rb") as file:
        if size <= SAMPLE_BYTES * (SAMPLE_COUNT + 1):
            digest.update(file.read())
        else:
            for block in range(SAMPLE_COUNT + 1):
                file.seek(block * (size - SAMPLE_BYTES) // SAMPLE_COUNT)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def combined_fingerprint(*parts: str | Path) -> str:
    """Combine strings and files into one short hash; a file counts by name and content."""
    texts = [fingerprint_file(part) if isinstance(part, Path) else part for part in parts]
    return hashlib.sha256("\x1f".join(texts).encode()).hexdigest()[:32]
