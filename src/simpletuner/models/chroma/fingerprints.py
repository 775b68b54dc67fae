"""Names for everything that changes a cached result, read in milliseconds and without loading a library."""

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
    """T5 overflows in float16, so bfloat16 serves both half precisions."""
    return torch.float32 if options.mixed_precision == "no" else torch.bfloat16


def token_limit(options: ModelOptions) -> int:
    return min(MAX_TOKENS, options.tokenizer_max_length or MAX_TOKENS)


def text_fingerprint(source: ModelFiles, options: ModelOptions) -> str:
    """Weights, their precision, tokenizer, dtype, padding, limit and the library's major version."""
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
    """Weights, config, dtype as asked for, tiling, and the library's major version.

    "default" is one dtype here: latents encoded on a GPU serve a CPU as well.
    """
    return combined_fingerprint(
        "chroma vae 1",
        _major_version("diffusers"),
        options.vae_dtype,
        f"tiling {options.vae_enable_tiling}",
        *component_files(source.vae, "vae", source.variant),
    )


def transformer_fingerprint(source: ModelFiles) -> str:
    """Weights and config, whatever dtype they are computed in."""
    return combined_fingerprint(
        "chroma transformer 1", *component_files(source.transformer, "transformer", source.variant)
    )


def _major_version(package: str) -> str:
    return f"{package} {version(package).split('.')[0]}"


def fingerprint_file(path: Path) -> str:
    """Recognises a file in milliseconds: its size, its first 64 KiB, and 32 blocks of 64 KiB spread evenly.

    Small files are hashed whole. A large file changed only between the sampled blocks would pass for the old
    one; a retrained or requantised weight file changes everywhere.
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
    """One short name for everything that changes a result; paths stand for their contents, not place."""
    spelled = [fingerprint_file(part) if isinstance(part, Path) else part for part in parts]
    return hashlib.sha256("\x1f".join(spelled).encode()).hexdigest()[:32]
