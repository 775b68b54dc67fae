"""Presets: for the bundled model, for full-rank training, and for the memory of a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The bundled model learns sixteen images in minutes on a CPU: the settings of the packaged
# example.
NANO_PRESET: Mapping[str, Any] = {
    "model_flavour": "nano",
    "resolution": 128,
    "resolution_type": "pixel",
    "caption_dropout_probability": 0.0,
    "gradient_checkpointing": False,
    "learning_rate": 3e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "train_batch_size": 8,
    "max_train_steps": 500,
    "checkpoint_step_interval": 250,
    "validation_step_interval": 250,
}
FULL_RANK_PRESET: Mapping[str, Any] = {"optimizer": "adamw_bf16", "learning_rate": 1e-5}

# Rank 16, 1024 px, batch 1, all blocks checkpointed except in the first row: options and planned
# GB, the most accurate first. Computed by `python benchmarks/memory_table.py`, the first row by
# `python benchmarks/plan.py`. The text encoder needs 1 GB, layer by layer, before the training.
OFFLOAD_OPTIONS: Mapping[str, Any] = {"gradient_checkpointing_backend": "offload"}
NF4_OPTIONS: Mapping[str, Any] = {"base_model_precision": "nf4"}
MEMORY_PRESETS: tuple[tuple[Mapping[str, Any], float], ...] = (
    ({"base_model_precision": "no_change", "gradient_checkpointing": False}, 52.2),
    ({"base_model_precision": "no_change"}, 20.6),
    ({"base_model_precision": "no_change", **OFFLOAD_OPTIONS}, 19.94),
    ({"base_model_precision": "int8"}, 12.0),
    ({"base_model_precision": "int8", **OFFLOAD_OPTIONS}, 11.33),
    (NF4_OPTIONS, 7.96),
    ({**NF4_OPTIONS, **OFFLOAD_OPTIONS}, 7.3),
)


def preset_for_memory(total_bytes: int | None) -> tuple[Mapping[str, Any], float]:
    """Return the most accurate preset that fits a device of this size, and its planned GB.

    The last row where none fits or the size is unknown.
    """
    gb = (total_bytes or 0) / 1e9
    return next((row for row in MEMORY_PRESETS if row[1] < gb), MEMORY_PRESETS[-1])
