"""Values that DeepSpeed's configuration and our options both have, compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from simpletuner.config import deepspeed_keys
from simpletuner.config.schema import RunConfig

AUTO = "auto"  # "take it from the options", in the files of Hugging Face's trainers


def section_of(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the object at a key; an empty one where there is none, or something else."""
    section = config.get(key)
    return section if isinstance(section, dict) else {}


def is_off(value: Any) -> bool:
    """Return whether the value switches a feature off: false, null, 0, {} or enabled false."""
    if isinstance(value, dict) and "enabled" in value:
        return value["enabled"] in (False, None, AUTO)
    return not value or value == AUTO


def compare_options(config: Mapping[str, Any], run: RunConfig) -> Iterator[str]:
    """Yield each value that an option of ours contradicts, with both values."""
    optimizer, training = run.optimizer, run.training
    differs = partial(difference, config)
    yield from differs(
        "train_micro_batch_size_per_gpu", "train_batch_size", training.train_batch_size
    )
    accumulation = training.gradient_accumulation_steps
    yield from differs("gradient_accumulation_steps", "gradient_accumulation_steps", accumulation)
    yield from _compare_batch_size(config, run)
    yield from differs("gradient_clipping", "max_grad_norm", optimizer.max_grad_norm)
    is_bf16 = run.model.mixed_precision == "bf16"
    yield from differs("bf16.enabled", "mixed_precision bf16", is_bf16)
    for key, value in section_of(config, "bf16").items():
        if key in deepspeed_keys.REFUSED_BF16_KEYS:
            neutral, reason = deepspeed_keys.REFUSED_BF16_KEYS[key]
            if value not in (AUTO, None, neutral):
                yield f"bf16.{key} = {json.dumps(value)}: is not supported: {reason}"
        elif key != "enabled":
            yield f"bf16.{key}: is not a key of DeepSpeed that is read here"
    yield from _compare_optimizer(config, run)
    yield from _compare_scheduler(config, run)


def _compare_batch_size(config: Mapping[str, Any], run: RunConfig) -> Iterator[str]:
    """Compare train_batch_size as far as the number of processes is known before they start."""
    training, processes = run.training, run.distributed.num_processes
    own = training.train_batch_size * training.gradient_accumulation_steps
    written = config.get("train_batch_size", AUTO)
    if written == AUTO:
        return
    is_number = isinstance(written, int) and not isinstance(written, bool)
    if isinstance(processes, int) and processes > 1:
        yield from difference(
            config,
            "train_batch_size",
            "train_batch_size * gradient_accumulation_steps * num_processes",
            own * processes,
        )
    elif not is_number or written <= 0 or written % own:
        yield (
            f"train_batch_size = {json.dumps(written)}, but train_batch_size * "
            f"gradient_accumulation_steps is {own} for each process; make them agree, or write "
            '"auto"'
        )


def difference(
    config: Mapping[str, Any], path: str, option: str, value: Any, absent: Any = AUTO
) -> Iterator[str]:
    """Yield both values where the one at the dotted path is not `value`. absent: if not given."""
    written: Any = config
    for key in path.split("."):
        written = written.get(key, absent) if isinstance(written, dict) else absent
    if written in (AUTO, None) or _equal(written, value):
        return
    yield (
        f"{path} = {json.dumps(written)}, but {option} is {json.dumps(value)}; make them agree, "
        f'or write "auto" for {path}'
    )


def _equal(written: Any, value: Any) -> bool:
    if isinstance(written, bool) or isinstance(value, bool):
        return written is value
    if isinstance(value, (list, tuple)):
        return (
            isinstance(written, list)
            and len(written) == len(value)
            and all(map(_equal, written, value))
        )
    if isinstance(written, (int, float)) and isinstance(value, (int, float)):
        return abs(written - value) <= 1e-12 * max(abs(written), abs(value))
    return bool(written == value)


def _compare_optimizer(config: Mapping[str, Any], run: RunConfig) -> Iterator[str]:
    section, options = section_of(config, "optimizer"), run.optimizer
    if not section:
        return
    kind = str(section.get("type", AUTO)).lower()
    if kind != AUTO and deepspeed_keys.OPTIMIZER_TYPES.get(kind) != options.optimizer:
        yield (
            f"optimizer.type = {json.dumps(section['type'])}, but optimizer is "
            f'{options.optimizer}; allowed: AdamW for adamw, Lion for lion, or "auto"'
        )
    own: Mapping[str, tuple[str, Any]] = {
        "lr": ("learning_rate", options.learning_rate),
        "eps": ("adam_epsilon", options.adam_epsilon),
        "weight_decay": ("adam_weight_decay", options.adam_weight_decay),
        "betas": ("adam_beta1, adam_beta2", [options.adam_beta1, options.adam_beta2]),
        "adam_w_mode": ("optimizer adamw", True),
        "torch_adam": ("optimizer adamw", True),
        "bias_correction": ("optimizer adamw", True),
    }
    yield from _compare_table(config, "optimizer.params", own)


def _compare_scheduler(config: Mapping[str, Any], run: RunConfig) -> Iterator[str]:
    section, options = section_of(config, "scheduler"), run.optimizer
    if not section:
        return
    kind = section.get("type", AUTO)
    if kind != AUTO and deepspeed_keys.SCHEDULER_TYPES.get(kind) != options.lr_scheduler:
        pairs = ", ".join(f"{k} for {v}" for k, v in deepspeed_keys.SCHEDULER_TYPES.items())
        yield (
            f"scheduler.type = {json.dumps(kind)}, but lr_scheduler is {options.lr_scheduler}; "
            f'allowed: {pairs}, or "auto"'
        )
    own: Mapping[str, tuple[str, Any]] = {
        "warmup_min_lr": ("the rate that the warmup rises from", 0),
        "warmup_max_lr": ("learning_rate", options.learning_rate),
        "warmup_num_steps": ("lr_warmup_steps", options.lr_warmup_steps),
        "warmup_type": ("the warmup", "linear"),
        "total_num_steps": ("max_train_steps", run.training.max_train_steps),
    }
    yield from _compare_table(config, "scheduler.params", own)


def _compare_table(
    config: Mapping[str, Any], path: str, own: Mapping[str, tuple[str, Any]]
) -> Iterator[str]:
    """Compare each parameter of a section with the option that stands for it."""
    outer, inner = path.split(".")
    for key in section_of(section_of(config, outer), inner):
        if key not in own:
            yield f"{path}.{key}: is not supported; it takes {', '.join(own)}"
        else:
            yield from difference(config, f"{path}.{key}", *own[key])
