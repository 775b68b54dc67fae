"""Merge LoRAs into Chroma's transformer."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

from simpletuner.models.chroma import native_names, weights
from simpletuner.models.chroma.model_format import WEIGHTS_STEM
from simpletuner.models.chroma.transformer_config import CLASS_NAME
from simpletuner.models.weights.merge_loras import MergeFormat
from simpletuner.models.weights.merge_loras import merge_loras as merge_loras_of


def _read_config(path: Path) -> dict[str, object]:
    return {"_class_name": CLASS_NAME, **asdict(weights.read_transformer_config(path))}


def _native_metadata(path: Path) -> dict[str, str]:
    return native_names.config_metadata(weights.read_transformer_config(path))


CHROMA_MERGE = MergeFormat(
    read_tensors=weights.transformer_tensors,
    read_config=_read_config,
    native_metadata=_native_metadata,
    group_by_native_name=native_names.group_by_native_name,
    weights_stem=WEIGHTS_STEM,
)
merge_loras = partial(merge_loras_of, CHROMA_MERGE)
