"""The options in deepspeed_config by DeepSpeed's names, compared with our own.

A value that an option of ours has too must be the same in both, or "auto". A key that our training
loop replaces, or that would change what is computed, is refused with a reason. The rest is passed
to DeepSpeed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.config import deepspeed_keys
from simpletuner.config.deepspeed_comparison import (
    AUTO,
    compare_options,
    difference,
    is_off,
    section_of,
)
from simpletuner.config.documents import read_document
from simpletuner.config.option_values import did_you_mean
from simpletuner.config.schema import RunConfig
from simpletuner.errors import ConfigError

# Optimizers that compute each number by itself, so that a flat part of all weights is enough.
ELEMENTWISE_OPTIMIZERS = ("adamw", "lion")
FLOAT32_SUMS: Mapping[str, Any] = {
    "communication_data_type": "fp32",
    "data_types": {deepspeed_keys.GRAD_ACCUM_DTYPE: "fp32"},
}


@dataclass(frozen=True)
class ZeroConfig:
    """The settings that are passed to DeepSpeed.

    stage: 1 shards the optimizer states, 2 also the gradients, 3 also the weights. section:
    zero_optimization without what has no effect. other: keys outside of it. widens_gradients:
    whether gradients of bf16 weights are sent and added in float32.
    """

    stage: int
    section: Mapping[str, Any]
    other: Mapping[str, Any]
    widens_gradients: bool

    @property
    def nvme_paths(self) -> list[Path]:
        """The folders that NVMe offloading writes to."""
        offloads = [self.section.get(name, {}) for name in deepspeed_keys.OFFLOAD_KEYS]
        return [Path(part["nvme_path"]) for part in offloads if part.get("device") == "nvme"]


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """Return the object in a JSON file, unchecked; see `find_deepspeed_errors`."""
    value = read_document(Path(path), Path(path).name).value
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold one object, {{...}}")
    return value


def uses_deepspeed(run: RunConfig) -> bool:
    """Return whether the engine trains; stage 0 shards nothing, which the replicated mode does."""
    config = run.distributed.deepspeed_config
    return isinstance(config, dict) and _stage_of(config) != 0


def zero_stage(run: RunConfig) -> int | None:
    """Return ZeRO's stage; None without DeepSpeed, and for one that is not valid."""
    config = run.distributed.deepspeed_config
    return _stage_of(config) if isinstance(config, dict) else None


def parse_zero_config(run: RunConfig) -> ZeroConfig:
    """Return the settings of a run that `find_deepspeed_errors` finds nothing wrong with."""
    config = run.distributed.deepspeed_config
    assert isinstance(config, dict)
    stage = _stage_of(config)
    assert stage is not None
    section = {
        key: value
        for key, value in section_of(config, "zero_optimization").items()
        if key in deepspeed_keys.ZERO_KEYS and key != "stage" and value not in (AUTO, None)
    }
    offloads = deepspeed_keys.OFFLOAD_KEYS if stage == 3 else deepspeed_keys.OFFLOAD_KEYS[:1]
    for name in deepspeed_keys.OFFLOAD_KEYS:
        part = _drop_auto(section.pop(name, {}))
        if name in offloads and part.get("device", "none") != "none":
            section[name] = part
    other = {
        key: value
        for key, value in config.items()
        if key in deepspeed_keys.PASSED_KEYS and value not in (AUTO, None)
    }
    if run.model.trains_bf16_weights and stage > 1:
        # The sum of a few bf16 numbers is exact in float32, or nearly, so it does not depend on
        # their order, which the number of processes decides. Stage 1 holds whole gradients, which
        # would need 4 bytes more for each weight.
        other = {**FLOAT32_SUMS, **other}
    return ZeroConfig(
        stage, section, other, run.model.trains_bf16_weights and _adds_in_float32(other)
    )


def _adds_in_float32(config: Mapping[str, Any]) -> bool:
    return section_of(config, "data_types").get(deepspeed_keys.GRAD_ACCUM_DTYPE) == "fp32"


def find_deepspeed_notices(run: RunConfig) -> Iterator[str]:
    """Yield what of deepspeed_config has no effect, or another one than its name suggests."""
    config = run.distributed.deepspeed_config
    if not isinstance(config, dict):
        return
    stage = _stage_of(config)
    if stage == 0:
        yield (
            "deepspeed_config: zero_optimization.stage 0 shards nothing; the processes are "
            "replicated and DeepSpeed is not started"
        )
        return
    offload = section_of(config, "zero_optimization").get("offload_param")
    if stage != 3 and isinstance(offload, dict) and offload.get("device", "none") != "none":
        yield (
            f"deepspeed_config: zero_optimization.offload_param has no effect with stage {stage}: "
            "weights are sharded and offloaded with stage 3"
        )
    if "scheduler" in config:
        yield (
            "deepspeed_config: scheduler is not started; lr_scheduler sets the same learning rates"
        )
    if "activation_checkpointing" in config:
        yield (
            "deepspeed_config: activation_checkpointing has no effect; gradient_checkpointing "
            "decides"
        )


def find_deepspeed_errors(run: RunConfig) -> Iterator[str]:
    """Yield every reason why deepspeed_config cannot be used with the other options."""
    config = run.distributed.deepspeed_config
    if not isinstance(config, dict):
        return
    stage = _stage_of(config)
    if stage is None:
        written = section_of(config, "zero_optimization").get("stage")
        yield (
            f"zero_optimization.stage = {json.dumps(written)}: must be 1, 2 or 3 (or 0, which is "
            'the replicated mode), as in {"zero_optimization": {"stage": 2}}'
        )
        return
    yield from _check_keys(config)
    if stage == 0:
        return
    yield from compare_options(config, run)
    yield from _check_zero_section(section_of(config, "zero_optimization"), stage)
    if stage == 1 and run.model.trains_bf16_weights and _adds_in_float32(config):
        yield (
            'data_types.grad_accum_dtype = "fp32": with stage 1 DeepSpeed takes another optimizer, '
            "whose state is not read here; use stage 2, which adds in float32 by itself"
        )
    yield from _check_other_options(run, stage)


def _stage_of(config: Mapping[str, Any]) -> int | None:
    """Return the stage, 0 unless one is given; None for anything but a stage."""
    stage = section_of(config, "zero_optimization").get("stage", 0)
    is_stage = isinstance(stage, int) and not isinstance(stage, bool) and 0 <= stage <= 3
    return stage if is_stage else None


def _drop_auto(section: Any) -> dict[str, Any]:
    given = section if isinstance(section, dict) else {}
    return {key: value for key, value in given.items() if value not in (AUTO, None)}


def _check_keys(config: Mapping[str, Any]) -> Iterator[str]:
    keys = deepspeed_keys
    known = {*keys.COMPARED_KEYS, *keys.REFUSED_KEYS, *keys.PASSED_KEYS, *keys.SECTION_KEYS}
    for key, value in config.items():
        if key in keys.REFUSED_KEYS:
            if not is_off(value):
                yield f"{key}: is not supported: {keys.REFUSED_KEYS[key]}"
        elif key not in known:
            yield f"{key}: is not a key of DeepSpeed that is read here{did_you_mean(key, known)}"
        elif key in keys.SECTION_KEYS and not isinstance(value, dict):
            yield f"{key} = {json.dumps(value)}: must be an object, {{...}}"
        elif key in keys.PASSED_KEYS and value != AUTO and not keys.PASSED_KEYS[key].accepts(value):
            yield f"{key} = {json.dumps(value)}: must be {keys.PASSED_KEYS[key].described}"


def _check_zero_section(section: Mapping[str, Any], stage: int) -> Iterator[str]:
    keys, path = deepspeed_keys, "zero_optimization."
    known = {*keys.ZERO_KEYS, *keys.REFUSED_ZERO_KEYS}
    for key, value in section.items():
        if key in keys.REFUSED_ZERO_KEYS:
            neutral, reason = keys.REFUSED_ZERO_KEYS[key]
            if value not in (AUTO, None, *neutral):
                yield f"{path}{key} = {json.dumps(value)}: is not supported: {reason}"
        elif key not in known:
            hint = did_you_mean(key, known)
            yield f"{path}{key}: is not a key of DeepSpeed that is read here{hint}"
        elif value not in (AUTO, None) and not keys.ZERO_KEYS[key].accepts(value):
            yield f"{path}{key} = {json.dumps(value)}: must be {keys.ZERO_KEYS[key].described}"
    if stage == 1 and section.get("overlap_comm") is True:
        yield f"{path}overlap_comm = true: needs stage 2 or 3; with stage 1 leave it out"
    for name in keys.OFFLOAD_KEYS:
        if isinstance(section.get(name), dict):
            yield from _check_offload(f"{path}{name}", section[name])


def _check_offload(path: str, section: Mapping[str, Any]) -> Iterator[str]:
    known = deepspeed_keys.OFFLOAD_VALUES
    for key, value in section.items():
        if key not in known:
            hint = did_you_mean(key, known)
            yield f"{path}.{key}: is not a key of DeepSpeed that is read here{hint}"
        elif value not in (AUTO, None) and not known[key].accepts(value):
            yield f"{path}.{key} = {json.dumps(value)}: must be {known[key].described}"
    if section.get("device") == "nvme" and not section.get("nvme_path"):
        yield f'{path}.device = "nvme" needs nvme_path, a folder on the NVMe drive'


def find_batch_size_error(run: RunConfig, processes: int) -> Iterator[str]:
    """Yield both values where train_batch_size is another than that of so many processes."""
    config = run.distributed.deepspeed_config
    if isinstance(config, dict) and uses_deepspeed(run):
        own = run.training.train_batch_size * run.training.gradient_accumulation_steps * processes
        count = "1 process" if processes == 1 else f"{processes} processes"
        name = f"train_batch_size * gradient_accumulation_steps * {count}"
        yield from difference(config, "train_batch_size", name, own)


def _check_other_options(run: RunConfig, stage: int) -> Iterator[str]:
    """Yield each option of ours that the engine cannot train with."""
    optimizer, model = run.optimizer, run.model
    if optimizer.optimizer not in ELEMENTWISE_OPTIMIZERS:
        yield (
            f"ZeRO shards the weights as flat parts, and optimizer {optimizer.optimizer} "
            f"{deepspeed_keys.UNSUITABLE_OPTIMIZERS[optimizer.optimizer]}; use "
            f"{' or '.join(ELEMENTWISE_OPTIMIZERS)}, or fsdp_enable instead of deepspeed_config"
        )
    if optimizer.max_grad_norm > 0 and optimizer.grad_clip_method != "norm":
        yield 'DeepSpeed clips by the norm; use grad_clip_method "norm" or max_grad_norm 0'
    is_used: Mapping[str, tuple[Callable[[], bool], str]] = {
        "optimizer_release_gradients": (
            lambda: optimizer.optimizer_release_gradients,
            "the engine owns the gradients; use zero_optimization.stage 2",
        ),
        "optimizer_cpu_offload_method": (
            lambda: optimizer.optimizer_cpu_offload_method != "none",
            'use zero_optimization.offload_optimizer {"device": "cpu"}',
        ),
        "musubi_blocks_to_swap": (
            lambda: model.musubi_blocks_to_swap != 0,
            'use stage 3 with zero_optimization.offload_param {"device": "cpu"}',
        ),
        "dynamo_backend": (
            lambda: stage == 3 and model.compiles_blocks,
            "compiled blocks do not run the hooks with which stage 3 gathers weights; use no, or "
            "stage 2",
        ),
        "base_model_precision fp8": (
            lambda: stage == 3 and model.base_model_precision == "fp8",
            "stage 3 cannot gather fp8 weights from all processes; use int8, or stage 2",
        ),
        "device": (lambda: model.device == "mps", "DeepSpeed needs CUDA or the CPU"),
    }
    for name, (used, advice) in is_used.items():
        if used():
            yield f"cannot be combined with {name}: {advice}"
