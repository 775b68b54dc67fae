"""The planned bytes against those that the CPU's allocator handed out in a real run of the same step."""

from __future__ import annotations

from typing import Any

import pytest

from tests.training.memory_plan.tiny_family import allocator_peak, make_run_config, planned_peak

FULL = {"model_type": "full", "optimizer": "adamw_bf16"}
FP32 = {"mixed_precision": "no"}
MASTERS = {"base_model_default_dtype": "fp32"}
CASES: dict[str, dict[str, Any]] = {
    "LoRA bf16": {"gradient_checkpointing": False},
    "LoRA bf16 recomputed": {},
    "LoRA bf16, two blocks": {"gradient_checkpointing": 2, "gradient_checkpointing_interval": 2},
    **{f"LoRA {name}": {"base_model_precision": name} for name in ("int8", "int4", "nf4", "fp8")},
    **{
        f"{name} kept": {"base_model_precision": name, "gradient_checkpointing": False}
        for name in ("int8", "nf4")
    },
    "LoRA fp32": {**FP32, "gradient_checkpointing": False},
    "LoRA fp32 recomputed": FP32,
    "LoRA under autocast": MASTERS,
    "DoRA": {"use_dora": True},
    "full rank bf16": {**FULL, "gradient_checkpointing": False},
    "full rank bf16 recomputed": FULL,
    "full rank fp32": {**FP32, "model_type": "full", "gradient_checkpointing": False},
    "full rank fp32 recomputed": {**FP32, "model_type": "full"},
    "two micro-batches": {**FULL, "gradient_accumulation_steps": 2},
    "adafactor": {"model_type": "full", "optimizer": "adafactor"},
    "schedule-free": {"optimizer": "adamw_schedulefree"},
    "step in backward": {**FULL, "optimizer_release_gradients": True, "grad_clip_method": "value"},
    "lion": {"model_type": "full", "optimizer": "lion"},
}


SLOW = (
    "LoRA fp32", "DoRA", "LoRA fp8", "full rank fp32", "adafactor", "schedule-free", "lion",
    "step in backward",
)  # fmt: skip
RARE = [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]


@pytest.mark.parametrize("name", [*(name for name in CASES if name not in SLOW), *RARE])
def test_planned_is_allocated(name: str) -> None:
    run = make_run_config(**CASES[name])
    assert planned_peak(run) == pytest.approx(allocator_peak(run), rel=0.02)
