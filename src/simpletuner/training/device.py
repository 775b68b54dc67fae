"""Which device a run uses, in which number formats, and all that is asked of it by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "no": torch.float32}
BF16_MIN_CAPABILITY = (8, 0)  # compute capability of Ampere
# What allocators say when they have no more, besides raising torch.OutOfMemoryError.
OUT_OF_MEMORY_PHRASES = ("out of memory", "can't allocate memory")
REQUESTED_SIZE_PATTERN = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)
FREE_SIZE_PATTERN = re.compile(r"of which ([\d.]+ \w+) is free|(max allowed: [\d.]+ \w+)")


class Hardware:
    """One kind of device, here the CPU. kind: "cuda", "rocm", "mps" or "cpu". Sizes in bytes."""

    kind = "cpu"

    @property
    def name(self) -> str:
        return self.kind

    def capability(self) -> tuple[int, int] | None:
        """NVIDIA's compute capability; None where there is no such thing."""
        return None

    def free_bytes(self) -> int | None:
        """None where the device's memory is the host's, for the host to tell."""
        return None

    def peak_bytes(self) -> int | None:
        """Of the allocator since the start; None where no count is kept."""
        return None

    def empty_cache(self) -> None:
        """Give back what the allocator keeps for later; the CPU's keeps nothing."""


class CudaHardware(Hardware):
    """NVIDIA, and AMD by ROCm, which answers to the same names in torch."""

    def __init__(self, device: torch.device) -> None:
        self.kind = "cuda" if torch.version.hip is None else "rocm"
        self._device = device

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self._device)

    def capability(self) -> tuple[int, int] | None:
        return torch.cuda.get_device_capability(self._device) if self.kind == "cuda" else None

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()


class MpsHardware(Hardware):
    """Apple's GPU, in the host's memory."""

    kind = "mps"

    def free_bytes(self) -> int:
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()

    def empty_cache(self) -> None:
        torch.mps.empty_cache()


HARDWARE_BY_TYPE: dict[str, Callable[[torch.device], Hardware]] = {
    "cuda": CudaHardware,
    "mps": lambda device: MpsHardware(),
    "cpu": lambda device: Hardware(),
}


@dataclass(frozen=True)
class ComputeDevice:
    """weights: dtype the network is held in. compute: autocast dtype, None where weights already have it."""

    device: torch.device
    weights_dtype: torch.dtype
    autocast_dtype: torch.dtype | None

    @property
    def hardware(self) -> Hardware:
        return HARDWARE_BY_TYPE[self.device.type](self.device)

    def autocast(self) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def peak_memory_gib(self) -> float | None:
        """Peak of the allocator since the start; None where the device keeps no count."""
        peak = self.hardware.peak_bytes()
        return None if peak is None else peak / 2**30

    def __str__(self) -> str:
        return f"{self.hardware.name}, {str(self.weights_dtype).removeprefix('torch.')} weights"


def select_device(options: ModelOptions) -> ComputeDevice:
    """The device asked for, or the best there is. ConfigError when it lacks what the options need."""
    if options.torch_num_threads is not None:
        torch.set_num_threads(options.torch_num_threads)
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind = (
        next(kind for kind, here in present.items() if here)
        if options.device == "auto"
        else options.device
    )
    if not present[kind]:
        found = ", ".join(kind for kind, here in present.items() if here)
        raise ConfigError(f'device = "{kind}" is not available to this torch; found: {found}')
    device = torch.device(kind)
    if missing := list(unsupported_by_hardware(HARDWARE_BY_TYPE[kind](device), options)):
        raise ConfigError("\n".join(missing))
    if kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = not options.disable_tf32
        torch.backends.cudnn.allow_tf32 = not options.disable_tf32
    compute = DTYPES[options.mixed_precision]
    weights = (
        DTYPES[options.base_model_default_dtype] if options.base_model_default_dtype else compute
    )
    return ComputeDevice(device, weights, compute if compute != weights else None)


def unsupported_by_hardware(hardware: Hardware, options: ModelOptions) -> Iterator[str]:
    """What the options ask for and the hardware does not have, each with the alternative."""
    since, has = hardware.capability(), f"this is {hardware.name}"
    if options.mixed_precision == "bf16" and since is not None and since < BF16_MIN_CAPABILITY:
        capability = ".".join(map(str, since))
        yield (
            f'mixed_precision = "bf16" needs compute capability 8.0 or newer; {has}, {capability}.'
            ' Use "no", with base_model_precision "int8" or "nf4" if memory is short'
        )
    if options.mixed_precision == "fp16" and hardware.kind == "cpu":
        yield 'mixed_precision = "fp16" needs a GPU; use "bf16" or "no" on the CPU'
    for name in ("base_model_precision", "text_encoder_1_precision"):
        if getattr(options, name) == "fp8" and hardware.kind == "mps":
            yield f'{name} = "fp8" needs a device with 8-bit floats; {has}. Use "int8": as small, more exact'
    apart = hardware.kind in ("cuda", "rocm")
    if options.musubi_blocks_to_swap and not apart:
        yield f"musubi_blocks_to_swap needs a GPU with memory of its own; {has}. Use 0"
    if options.gradient_checkpointing_backend == "offload" and not apart:
        yield f'gradient_checkpointing_backend = "offload" needs memory of the GPU\'s own; {has}. Use "torch"'


def describe_out_of_memory(error: BaseException) -> str | None:
    """What was asked for and what was free, where memory ran out; None for any other failure."""
    text = str(error)
    if isinstance(error, MemoryError):
        return f"out of host memory{': ' if text else ''}{text}"
    if not (
        isinstance(error, RuntimeError)
        and any(mark in text.lower() for mark in OUT_OF_MEMORY_PHRASES)
    ):
        return None
    asked, free = REQUESTED_SIZE_PATTERN.search(text), FREE_SIZE_PATTERN.search(text)
    what = [f"{asked[1]} was asked for" if asked else text.splitlines()[0].rstrip(".")]
    if free:
        what.append(f"{free[1]} was free" if free[1] else free[2])
    return f"out of memory: {', '.join(what)}"
