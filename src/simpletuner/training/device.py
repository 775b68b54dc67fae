"""Which device a run uses, and in which number formats."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "no": torch.float32}


@dataclass(frozen=True)
class Device:
    """weights: dtype the network is held in. compute: autocast dtype, None where weights already have it."""

    device: torch.device
    weights: torch.dtype
    compute: torch.dtype | None

    def autocast(self) -> AbstractContextManager[object]:
        if self.compute is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.compute)

    def peak_memory_gib(self) -> float | None:
        """Peak of the allocator since the start; None where the device keeps no count."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) / 2**30

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{name}, {str(self.weights).removeprefix('torch.')} weights"


def choose(options: ModelOptions) -> Device:
    """The device asked for, or the best there is. ROCm answers to "cuda", as in torch."""
    if options.torch_num_threads is not None:
        torch.set_num_threads(options.torch_num_threads)
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = (
        next(kind for kind, here in present.items() if here) if options.device == "auto" else options.device
    )
    if not present[kind]:
        found = ", ".join(kind for kind, here in present.items() if here)
        raise ConfigError(f'device = "{kind}" is not available to this torch; found: {found}')
    if options.mixed_precision == "fp16" and kind == "cpu":
        raise ConfigError('mixed_precision = "fp16" needs a GPU; use "bf16" or "no" on the CPU')
    if kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = not options.disable_tf32
        torch.backends.cudnn.allow_tf32 = not options.disable_tf32
    compute = DTYPES[options.mixed_precision]
    weights = DTYPES[options.base_model_default_dtype] if options.base_model_default_dtype else compute
    return Device(torch.device(kind), weights, compute if compute != weights else None)
