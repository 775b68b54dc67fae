"""The functions of `adapters` with Chroma's name table, for tests that use no other architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from simpletuner.adapters import attachment, compatibility_check, lora_file, lora_io, merge_deltas
from simpletuner.adapters.attachment import AttachedAdapter
from simpletuner.adapters.compatibility_check import ProgramCompatibility
from simpletuner.adapters.deltas import Delta, LowRankDelta
from simpletuner.adapters.fused_modules import fuse_modules as _fuse_modules
from simpletuner.adapters.lora_file import LoraFile, LoraFileSummary
from simpletuner.config.schema import AdapterOptions
from simpletuner.models.chroma.lora_programs import CHROMA_LORA

NAMES = CHROMA_LORA.names
CONSUMER_PROGRAMS = CHROMA_LORA.programs


def attach_adapter(
    transformer: nn.Module,
    options: AdapterOptions,
    target_names: Sequence[str],
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> AttachedAdapter:
    return attachment.attach_adapter(transformer, options, target_names, seed, NAMES, dtype)


def read_lora_file(path: Path) -> LoraFile:
    return lora_file.read_lora_file(path, NAMES)


def read_summary(path: Path) -> LoraFileSummary:
    return lora_io.read_summary(path, NAMES)


def load_adapter(transformer: nn.Module, path: Path, strength: float = 1.0) -> LoraFileSummary:
    return lora_io.load_adapter(transformer, path, NAMES, strength)


def save_adapter(
    transformer: nn.Module,
    path: Path,
    metadata: Mapping[str, str] | None = None,
    layout: str | None = None,
) -> LoraFileSummary:
    return lora_io.save_adapter(transformer, path, CHROMA_LORA, metadata, layout)


def save_deltas(
    deltas: Mapping[str, Delta],
    path: Path,
    layout: str,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> LoraFileSummary:
    return lora_io.save_deltas(deltas, path, CHROMA_LORA, layout, dtype, metadata)


def check_compatibility(path: Path) -> tuple[LoraFile, tuple[ProgramCompatibility, ...]]:
    return compatibility_check.check_compatibility(path, CHROMA_LORA)


def fuse_modules(deltas: Mapping[str, Delta]) -> dict[str, LowRankDelta]:
    return _fuse_modules(deltas, NAMES)


def truncate_rank(
    deltas: Mapping[str, Delta], rank: int, native: bool
) -> tuple[dict[str, Delta], float]:
    return merge_deltas.truncate_rank(deltas, rank, NAMES if native else None)
