"""Suggest which option to change when there is too little memory, from the options alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from simpletuner.config.schema import RunConfig

LOWER_PRECISION = {"no_change": "int8", "int8": "nf4", "fp8": "nf4", "int4": "nf4"}
RESOLUTION_FACTOR = {"pixel": 0.75, "pixel_area": 0.75, "area": 0.5}  # by resolution_type


def suggest_next_setting(run: RunConfig) -> str:
    """Return a sentence with the next setting that needs less memory, the mildest first."""
    tiles = "" if run.model.vae_enable_tiling else "; if it was the VAE, vae_enable_tiling = true"
    setting = f"{format_options(next(memory_saving_options(run)))}{tiles}"
    return f"Next setting to try: {setting}. `simpletuner plan --fit` shows what would fit"


def format_options(options: dict[str, Any]) -> str:
    """Return "name = value with name = value"."""
    return " with ".join(
        f"{name} = {json.dumps(value).strip(chr(34))}" for name, value in options.items()
    )


def memory_saving_options(run: RunConfig) -> Iterator[dict[str, Any]]:
    """Yield options to set together, the mildest first; the last is a smaller resolution."""
    model, training, optimizer = run.model, run.training, run.optimizer
    lora = model.model_type == "lora"
    if model.gradient_checkpointing is not True or (model.gradient_checkpointing_interval or 1) > 1:
        yield {"gradient_checkpointing": True, "gradient_checkpointing_interval": 1}
    world = run.distributed
    replicated = not world.fsdp_enable and world.deepspeed_config is None
    if world.num_processes != 1 and replicated and model.musubi_blocks_to_swap == 0:
        yield {"fsdp_enable": True}
    if training.train_batch_size > 1:
        samples = training.train_batch_size * training.gradient_accumulation_steps
        yield {"train_batch_size": 1, "gradient_accumulation_steps": samples}
    if lora and model.base_model_precision in LOWER_PRECISION:
        yield {"base_model_precision": LOWER_PRECISION[model.base_model_precision]}
    if lora and model.musubi_blocks_to_swap == 0 and model.device not in ("cpu", "mps"):
        yield {"musubi_blocks_to_swap": 0.5}
    if optimizer.optimizer == "adamw":
        yield {"optimizer": "adamw_8bit" if lora else "adamw_bf16"}
    if not lora:
        yield {
            "optimizer_cpu_offload_method": "states",
            "optimizer_release_gradients": True,
            "grad_clip_method": "value",
        }
        yield {"model_type": "lora"}
    if lora and run.adapter.lora_rank > 4:
        yield {"lora_rank": run.adapter.lora_rank // 2}
    yield {
        "resolution": round(run.data.resolution * RESOLUTION_FACTOR[run.data.resolution_type], 2)
    }
