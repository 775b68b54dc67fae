"""Names for everything that changes a cached result, read in milliseconds and without loading a library."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import torch

from simpletuner.config.schema import ModelOptions
from simpletuner.models.chroma.weights import part_files
from simpletuner.models.family import Source
from simpletuner.quantization.schemes import named

MAX_TOKENS = 512
TOKENIZER_SUFFIXES = (".json", ".model", ".txt")
SAMPLED_BYTES = 64 * 1024
SAMPLES = 32


def text_dtype(options: ModelOptions) -> torch.dtype:
    """T5 overflows in float16, so bfloat16 serves both half precisions."""
    return torch.float32 if options.mixed_precision == "no" else torch.bfloat16


def max_tokens(options: ModelOptions) -> int:
    return min(MAX_TOKENS, options.tokenizer_max_length or MAX_TOKENS)


def text_fingerprint(source: Source, options: ModelOptions) -> str:
    """Weights, their precision, tokenizer, dtype, padding, limit and the library's major version."""
    precision = options.text_encoder_1_precision
    quantized = [] if precision == "no_change" else [f"{precision} {named(precision).version}"]
    vocabulary = sorted(path for path in source.tokenizer.iterdir() if path.suffix in TOKENIZER_SUFFIXES)
    return fingerprint(
        "chroma text 1",
        _major("transformers"),
        str(text_dtype(options)),
        options.flux_t5_padding,
        str(max_tokens(options)),
        *quantized,
        *part_files(source.text_encoder, "text_encoder", source.variant),
        *vocabulary,
    )


def vae_fingerprint(source: Source, options: ModelOptions) -> str:
    """Weights, config, dtype as asked for, tiling, and the library's major version.

    "default" is one dtype here: latents encoded on a GPU serve a CPU as well.
    """
    return fingerprint(
        "chroma vae 1",
        _major("diffusers"),
        options.vae_dtype,
        f"tiling {options.vae_enable_tiling}",
        *part_files(source.vae, "vae", source.variant),
    )


def transformer_fingerprint(source: Source) -> str:
    """Weights and config, whatever dtype they are computed in."""
    return fingerprint("chroma transformer 1", *part_files(source.transformer, "transformer", source.variant))


def _major(package: str) -> str:
    return f"{package} {version(package).split('.')[0]}"


def fingerprint_file(path: Path) -> str:
    """Recognises a file in milliseconds: its size, its first 64 KiB, and 32 blocks of 64 KiB spread evenly.

    Small files are hashed whole. A large file changed only between the sampled blocks would pass for the old
    one; a retrained or requantised weight file changes everywhere.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name}:{size}".encode())
    with path.open("rb") as file:
        if size <= SAMPLED_BYTES * (SAMPLES + 1):
            digest.update(file.read())
        else:
            for block in range(SAMPLES + 1):
                file.seek(block * (size - SAMPLED_BYTES) // SAMPLES)
                digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


def fingerprint(*parts: str | Path) -> str:
    """One short name for everything that changes a result; paths stand for their contents, not place."""
    spelled = [fingerprint_file(part) if isinstance(part, Path) else part for part in parts]
    return hashlib.sha256("\x1f".join(spelled).encode()).hexdigest()[:32]
