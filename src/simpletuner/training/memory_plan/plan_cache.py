"""Measured steps, kept on disk by everything that they depend on: the second answer is instant."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

import simpletuner
from simpletuner.atomic_io import write_atomically
from simpletuner.config.environment import user_cache_dir
from simpletuner.config.schema import RunConfig
from simpletuner.models.family import BlockMemoryPolicy, ModelSpec
from simpletuner.training.memory_plan.fake_step import BatchShape, StepMeasurement

# Of the three sections that are part of the key: what moves no byte of the measured step. Numbers that scale
# an update, where files lie, other parts of the model, and what prediction.py adds or takes away itself.
MEMORY_NEUTRAL_OPTIONS = (
    "learning_rate adam_beta1 adam_beta2 adam_weight_decay adam_epsilon lr_scheduler lr_warmup_steps lr_end "
    "lr_power lr_scale lr_scale_sqrt lora_alpha init_lora lora_format device torch_num_threads variant "
    "revision model_flavour pretrained_model_name_or_path pretrained_transformer_model_name_or_path "
    "pretrained_vae_model_name_or_path pretrained_t5_model_name_or_path quantized_cache_dir quantize_via "
    "text_encoder_1_precision vae_dtype vae_enable_tiling vae_enable_slicing flux_t5_padding "
    "caption_overlong tokenizer_max_length gradient_checkpointing gradient_checkpointing_interval "
    "gradient_checkpointing_backend musubi_blocks_to_swap chroma_approximator_device dynamo_backend "
    "dynamo_mode optimizer_cpu_offload_method use_ema ema_decay ema_update_interval ema_device "
    "ema_validation"
)


def cache_key(
    run: RunConfig, sketch: ModelSpec, memory: BlockMemoryPolicy, feed: BatchShape, granule: int
) -> str:
    """Options, shapes and dtypes of the network, what it is fed, this program and its torch."""
    options = {
        **run.model.model_dump(mode="json"),
        **run.adapter.model_dump(mode="json"),
        **run.optimizer.model_dump(mode="json"),
        "micro": run.training.gradient_accumulation_steps,
        "perturbed": run.flow.input_perturbation > 0,
    }
    idle = MEMORY_NEUTRAL_OPTIONS.split()
    shapes = [
        (name, tuple(t.shape), str(t.dtype)) for name, t in sketch.transformer.state_dict().items()
    ]
    told: list[object] = [
        {name: value for name, value in options.items() if name not in idle},
        shapes,
    ]
    told += [memory.checkpointed, memory.interval, dataclasses.astuple(feed), granule]
    text = json.dumps([*told, torch.__version__, package_digest()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@cache
def package_digest() -> str:
    """Changes with any line of this package: some line of it decides each byte."""
    digest = hashlib.sha256()
    for path in sorted(Path(simpletuner.__path__[0]).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def get_or_measure(name: str, measure: Callable[[], StepMeasurement]) -> StepMeasurement:
    """From the disk, or measured and written there; a folder that cannot be written is passed over."""
    file = user_cache_dir() / "plan" / f"{name}.json"
    if (known := read_cached_measurement(name)) is not None:
        return known
    measured = measure()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(dataclasses.asdict(measured)))
    return measured


def read_cached_measurement(name: str) -> StepMeasurement | None:
    try:
        return StepMeasurement(
            **json.loads((user_cache_dir() / "plan" / f"{name}.json").read_text(encoding="utf-8"))
        )
    except (OSError, ValueError, TypeError):
        return None
