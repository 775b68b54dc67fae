"""What kind of file it is, by its first bytes: nothing else is read of a file that is not safetensors."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simpletuner.errors import ModelError

LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
# 418 modules with three keys each are 0.2 MB; the library itself would read 100 MB.
MAX_HEADER_BYTES = 8 << 20
# First bytes -> what such a file is.
FILE_KIND_BY_MAGIC: Mapping[bytes, str] = {
    b"PK\x03\x04": "a pickle in a zip (.pt, .ckpt, .pth)",
    b"\x80": "a pickle (.pt, .ckpt, .bin)",
    b"GGUF": "GGUF",
    b"{": "JSON",
    b"<": "a web page",
    b"version https://git-lfs": "a pointer to a file that git-lfs has not fetched",
}


def find_weights_file(path: Path) -> Path:
    """A file, or the weights inside a folder. ModelError when there is none."""
    file = path / LORA_WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise ModelError(
            f"{file} does not exist; expected a LoRA file (or a folder with {LORA_WEIGHTS_NAME})"
        )
    return file


def read_keys_and_metadata(path: Path) -> tuple[list[str], dict[str, str]]:
    """Names alone: a base model given by mistake is told from these. ModelError for any other file."""
    _check_is_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys()), dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Everything, in float32. ModelError for what cannot be read or is no number."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: _to_float32(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, RuntimeError, ValueError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error


def _to_float32(tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.is_complex():
        raise TypeError("a tensor in it is of a type that LoRA files do not have")
    return tensor.to(torch.float32)


def _check_is_safetensors(path: Path) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(24)
    except OSError as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
    # The length of a header may begin with any of these bytes; what follows it does not.
    honest = start[8:9] == b"{"
    kind = next(
        (
            name
            for magic, name in FILE_KIND_BY_MAGIC.items()
            if start.startswith(magic) and not honest
        ),
        None,
    )
    if kind is not None:
        unsafe = "; opening one can run code, so it is never opened" if "pickle" in kind else ""
        raise ModelError(f"{path} is {kind}, not a readable safetensors file{unsafe}")
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise ModelError(
            f"{path} is not a readable safetensors file: {size} bytes with a header of {length}; it is "
            "cut short or something else"
        )
