"""The planned bytes against those that the CPU's allocator hands out in a real step."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.training.memory_plan import fake_step
from simpletuner.training.memory_plan.memory_tracker import MemoryTrackerMode
from tests.training.memory_plan.allocator import allocated
from tests.training.memory_plan.tiny_family import make_run_config, planned_peak, really_allocated

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)

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
    "rollouts": {"scheduled_sampling_probability": 1.0, "gradient_checkpointing": False},
}


SLOW = (
    "LoRA fp32", "DoRA", "LoRA fp8", "full rank fp32", "adafactor", "schedule-free", "lion",
    "step in backward",
)  # fmt: skip
RARE = [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]


# Of the peak. The states of the random generator that gradient checkpointing saves, which the plan
# leaves out, are 0.1 % of it; the narrowest activation of a whole block is 0.8 %.
TOLERANCE = 0.005


@pytest.mark.parametrize("name", [*(name for name in CASES if name not in SLOW), *RARE])
def test_planned_is_allocated(name: str) -> None:
    run = make_run_config(**CASES[name])
    assert planned_peak(run) == pytest.approx(really_allocated(run).tensors, rel=TOLERANCE)


class ScratchInProducts(TorchDispatchMode):
    """Kernels of another CPU: each matrix product allocates `size` bytes and frees them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        scratch = torch.empty(self._size if func in PRODUCTS else 0, dtype=torch.uint8)
        out = func(*args, **(kwargs or {}))
        del scratch
        return out


def test_scratch_memory_of_kernels_is_no_tensor() -> None:
    """5 % of the peak in each product: the plan is as right as without."""
    run = make_run_config(gradient_checkpointing=False)
    planned = planned_peak(run)
    size = planned // 20
    with ScratchInProducts(size):
        real = really_allocated(run)
    assert planned == pytest.approx(real.tensors, rel=TOLERANCE)
    assert {str(name) for name in PRODUCTS} <= real.scratch.keys()
    assert all(real.scratch[str(name)] >= size for name in PRODUCTS)


def test_a_tensor_that_outlives_its_operation_is_no_scratch_memory() -> None:
    with ScratchInProducts(1000):
        real = allocated(lambda: torch.ones(100, 100).mm(torch.ones(100, 100)))
    assert real.tensors == 3 * 40_000
    assert real.scratch["aten.mm.default"] >= 1000


@pytest.mark.parametrize("shape", [(464, 1024), (2, 4, 232, 64)], ids=["MLP", "attention"])
def test_an_activation_left_out_shows(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a block with 2 x (192 image + 40 text) tokens: the MLP's hidden activation, a head's."""

    class Forgetful(MemoryTrackerMode):
        forgotten = 0  # bytes

        def _track(self, tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            chosen = tensor.shape == shape and self._part_now() == "activations"
            if chosen and not self.forgotten and storage._cdata not in self._tracked:
                Forgetful.forgotten = storage.nbytes()
                self._tracked.add(storage._cdata)
                weakref.finalize(storage, self._tracked.discard, storage._cdata).atexit = False
            super()._track(tensor)

    run = make_run_config(gradient_checkpointing=False)
    whole, real = planned_peak(run), really_allocated(run).tensors
    monkeypatch.setattr(fake_step, "MemoryTrackerMode", Forgetful)
    planned = planned_peak(run)
    assert Forgetful.forgotten == 2 * math.prod(shape)
    assert planned == whole - Forgetful.forgotten
    assert whole == pytest.approx(real, rel=TOLERANCE)
    assert planned != pytest.approx(real, rel=TOLERANCE)
