"""Read LoRA files; a file that is not safetensors is recognized by its first bytes only."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simpletuner.bounded_files import open_regular_file
from simpletuner.errors import ModelError

LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
# 418 modules with three keys each make 0.2 MB; the library itself accepts headers of 100 MB.
MAX_HEADER_BYTES = 8 << 20
# First bytes -> kind of file.
FILE_KIND_BY_MAGIC: Mapping[bytes, str] = {
    b"PK\x03\x04": "a pickle in a zip (.pt, .ckpt, .pth)",
    b"\x80": "a pickle (.pt, .ckpt, .bin)",
    b"GGUF": "GGUF",
    b"{": "JSON",
    b"<": "a web page",
    b"version https://git-lfs": "a Git LFS pointer whose file was not downloaded",
}


def find_weights_file(path: Path) -> Path:
    """Return the file, or the LoRA inside a folder. Raises ModelError when there is none."""
    file = path / LORA_WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise ModelError(
            f"{file} does not exist; expected a LoRA file (or a folder with {LORA_WEIGHTS_NAME})"
        )
    return file


def read_keys_and_metadata(path: Path) -> tuple[list[str], dict[str, str]]:
    """Return the keys and the metadata, without any tensor.

    The keys are enough to recognize a base model that was given by mistake. Raises ModelError for a
    file that is not safetensors.
    """
    _check_is_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys()), dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors in float32.

    Raises ModelError for what cannot be read, for factors that are not floating-point numbers, and
    for NaN and infinities.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {
                key: _to_float32(key, file.get_tensor(key))
                for key in file.keys()  # noqa: SIM118
            }
    except (SafetensorError, OSError, TypeError, RuntimeError, ValueError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise ModelError(
                f"{path}: {count} of {tensor.numel()} values of {key} are NaN or infinite; the"
                " training that wrote it diverged, or the file is damaged"
            )
    return tensors


def _to_float32(key: str, tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{key} has a dtype that LoRA files do not use")
    # Some programs write alpha, a single number, as an integer.
    if not tensor.is_floating_point() and not (key.endswith(".alpha") and tensor.numel() == 1):
        raise TypeError(f"{key} has dtype {tensor.dtype}; LoRA weights are floating-point numbers")
    return tensor.to(torch.float32)


def _check_is_safetensors(path: Path) -> None:
    try:
        size = path.stat().st_size
        with open_regular_file(path) as file:
            start = file.read(24)
    except OSError as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
    # The first eight bytes are the header's length and may equal any of these; the ninth may not.
    is_json = start[8:9] == b"{"
    file_kind = next(
        (
            name
            for magic, name in FILE_KIND_BY_MAGIC.items()
            if start.startswith(magic) and not is_json
        ),
        None,
    )
    if file_kind is not None:
        warning = "; a pickle can run code when it is opened" if "pickle" in file_kind else ""
        raise ModelError(f"{path} is {file_kind}, not a readable safetensors file{warning}")
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise ModelError(
            f"{path} is not a readable safetensors file: it has {size} bytes and a header of"
            f" {length} bytes; it is incomplete or of another format"
        )
