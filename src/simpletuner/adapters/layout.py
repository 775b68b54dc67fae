"""The one file layout that is written and read: `transformer.<module>.lora_A.weight` / `.lora_B.weight`.

Alpha is folded into B, so that a reader that knows of no alpha applies the delta at its right strength.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import safe_open
from torch import Tensor

from simpletuner.errors import ModelError

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
# PEFT's configuration in a file's header: diffusers takes scales from it, ComfyUI does not see it.
HEADER_CONFIG = "lora_adapter_metadata"
DOWN, UP, MAGNITUDE, ALPHA = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".alpha"

# A part of a key that gives another program's layout away -> what to call it in the refusal.
FOREIGN = {
    "lora_unet_": "kohya (lora_unet_*)",
    "lora_te": "kohya with text encoders (lora_te*)",
    "lora_transformer_": "OneTrainer (lora_transformer_*)",
    "lycoris_": "LyCORIS (lycoris_*)",
    ".lokr_": "LoKr (lokr_*)",
    ".hada_": "LoHa (hada_*)",
    "diffusion_model.": "ComfyUI (diffusion_model.*)",
    "base_model.model.": "a PEFT adapter folder (base_model.model.*)",
    ".lora_down.": "kohya factors (lora_down/lora_up)",
    ".dora_scale": "kohya DoRA (dora_scale)",
}


@dataclass(frozen=True)
class Factors:
    """delta W = up @ down, alpha already in `up`.

    down: (r, in). up: (out, r). magnitude: (out,), only with DoRA. All float32 on the CPU.
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class FileSummary:
    """What a LoRA file holds. ranks: each rank that occurs, ascending. parameters: numbers in the file."""

    modules: tuple[str, ...]
    ranks: tuple[int, ...]
    dora: bool
    parameters: int
    metadata: dict[str, str]


def find(path: Path) -> Path:
    """A file, or the weights inside a folder. ModelError when there is none."""
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{file} does not exist; expected a LoRA file (or a folder with {WEIGHTS_NAME})")
    return file


def tensors_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a safetensors file and its metadata. ModelError when it cannot be parsed."""
    try:
        with safe_open(find(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error


def read(path: Path) -> tuple[dict[str, Factors], FileSummary]:
    """Module name -> factors. Refuses any other layout, incomplete pairs and a mixture, with ModelError."""
    tensors, metadata = tensors_of(path)
    _refuse_foreign(path, tensors)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((end for end in (DOWN, UP, MAGNITUDE, ALPHA) if key.endswith(end)), None)
        if suffix is None or not key.startswith(PREFIX):
            raise ModelError(
                f"{path}: key {key!r} is not of the layout {PREFIX}<module>{DOWN} / {UP} "
                f"(with {MAGNITUDE} and {ALPHA} where used)"
            )
        parts.setdefault(key[len(PREFIX) : -len(suffix)], {})[suffix] = tensor
    config = _header_config(path, metadata)
    factors = {name: _factors(path, name, found, config) for name, found in sorted(parts.items())}
    doras = {one.magnitude is not None for one in factors.values()}
    if len(doras) != 1:
        raise ModelError(f"{path} " + ("mixes LoRA and DoRA modules" if doras else "holds no LoRA weights"))
    summary = FileSummary(
        modules=tuple(factors),
        ranks=tuple(sorted({one.rank for one in factors.values()})),
        dora=doras.pop(),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        metadata=metadata,
    )
    return factors, summary


def _refuse_foreign(path: Path, tensors: dict[str, Tensor]) -> None:
    for mark, layout in FOREIGN.items():
        count = sum(mark in key for key in tensors)
        if count:
            whole = "is of" if count == len(tensors) else f"has {count} of {len(tensors)} keys in"
            raise ModelError(
                f"{path} {whole} the layout {layout}; only {PREFIX}<module>{DOWN} / {UP} can be read"
            )


def _header_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        fields = json.loads(metadata.get(HEADER_CONFIG, "{}"))
        return {key[len(PREFIX) :]: value for key, value in fields.items() if key.startswith(PREFIX)}
    except (ValueError, AttributeError):
        raise ModelError(f"{path}: {HEADER_CONFIG} in its header is no JSON object") from None


def _factors(path: Path, name: str, parts: dict[str, Tensor], config: Mapping[str, Any]) -> Factors:
    """config: of the header, empty in most files; its alpha then stands for the alpha tensors."""
    for needed in (DOWN, UP):
        if needed not in parts:
            raise ModelError(f"{path}: {PREFIX}{name} has no {needed[1:]}")
    down, up = parts[DOWN].to(torch.float32), parts[UP].to(torch.float32)
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise ModelError(f"{path}: {name}: shapes {tuple(down.shape)} and {tuple(up.shape)} are no LoRA pair")
    if ALPHA in parts and config:
        raise ModelError(f"{path}: {name} has an alpha of its own and another in the header")
    rank = down.shape[0]
    if ALPHA in parts:
        up = up * (float(parts[ALPHA]) / rank)
    elif "lora_alpha" in config:
        patterns = (config.get("alpha_pattern") or {}).items()
        own = (alpha for pattern, alpha in patterns if re.fullmatch(rf"(.*\.)?({pattern})", name))
        alpha = float(next(own, config["lora_alpha"]))
        up = up * (alpha / (rank**0.5 if config.get("use_rslora") else rank))
    return Factors(down, up, parts[MAGNITUDE].to(torch.float32) if MAGNITUDE in parts else None)
